"""The released model once more, by the letter: official tensor names, masks, and loops over tokens.

Nothing of the package is used. It follows the formulas of the paper and of the released code, one
token at a time where they speak of tokens, for grids whose sides divide by 4 in the quad stages.
"""

import torch
import torch.nn.functional as F

SIGNS = ((1, 1), (-1, -1), (1, -1), (-1, 1))


class OfficialState(dict):
    """Random tensors in float32, added under official names."""

    def __init__(self, seed):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def tensor(self, name, *shape, at=0.0, by=None):
        by = by or 0.8 * (shape[-1] if len(shape) > 1 else 25) ** -0.5
        self[name] = at + by * torch.randn(*shape, generator=self.generator)

    def norm(self, name, size):
        self.tensor(f"{name}.weight", size, at=1.0)
        self.tensor(f"{name}.bias", size)

    def linear(self, name, wide, size):
        self.tensor(f"{name}.weight", wide, size)
        self.tensor(f"{name}.bias", wide)

    def filters(self, name, wide, size):
        self.tensor(f"{name}.weight", wide, size, 3, 3, by=(9 * size) ** -0.5)
        self.tensor(f"{name}.bias", wide)

    def mixer(self, op, c, d, n, quad):
        r, k = -(-c // 16), 2 if quad else 4
        self.tensor(f"{op}.in_proj.weight", d, c)
        self.tensor(f"{op}.conv2d.weight", d, 1, 3, 3, by=0.4)
        self.tensor(f"{op}.x_proj_weight", k, r + 2 * n, d)
        self.tensor(f"{op}.dt_projs_weight", k, d, r, by=0.7)
        self.tensor(f"{op}.dt_projs_bias", k, d, at=-3.0)
        self.tensor(f"{op}.A_logs", k * d, n, by=0.5)
        self.tensor(f"{op}.Ds", k * d, at=1.0)
        self.norm(f"{op}.out_norm", d)
        self.tensor(f"{op}.out_proj.weight", c, d)
        if quad:
            self.norm(f"{op}.score_predictor.in_conv.0", d)
            self.linear(f"{op}.score_predictor.in_conv.1", d, d)
            self.linear(f"{op}.score_predictor.out_conv.0", d // 2, d)
            self.linear(f"{op}.score_predictor.out_conv.2", d // 4, d // 2)
            self.linear(f"{op}.score_predictor.out_conv.4", 2, d // 4)


def official_state(dims, depths, quad, ratio, n, mlp_ratio, classes, seed=0):
    """Random tensors in float32 under the official names. quad: which stages have a predictor."""
    state = OfficialState(seed)
    state.filters("patch_embed.0", dims[0] // 2, 3)
    state.norm("patch_embed.2", dims[0] // 2)
    state.filters("patch_embed.5", dims[0], dims[0] // 2)
    state.norm("patch_embed.7", dims[0])
    for i, c in enumerate(dims):
        for j in range(depths[i]):
            at = f"layers.{i}.blocks.{j}"
            state.norm(f"{at}.norm", c)
            state.mixer(f"{at}.op", c, int(ratio * c), n, quad[i])
            state.norm(f"{at}.norm2", c)
            state.linear(f"{at}.mlp.fc1", int(mlp_ratio * c), c)
            state.linear(f"{at}.mlp.fc2", c, int(mlp_ratio * c))
        if i < 3:
            state.filters(f"layers.{i}.downsample.1", dims[i + 1], c)
            state.norm(f"layers.{i}.downsample.3", dims[i + 1])
    state.norm("classifier.norm", dims[-1])
    state.linear("classifier.head", classes, dims[-1])
    return dict(state)


def literal_logits(w, images, training):
    """Logits (b, classes) of images (b, 3, H, W) under the official tensors w."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def halve(x, name):
        x = F.conv2d(x.movedim(-1, 1), w[f"{name}.weight"], w[f"{name}.bias"], 2, 1)
        return x.movedim(1, -1)

    x = halve(images.movedim(1, -1), "patch_embed.0")  # (b, h, w, c)
    x = F.gelu(norm(x, "patch_embed.2"))
    x = norm(halve(x, "patch_embed.5"), "patch_embed.7")
    block = 0
    for i in range(4):
        j = 0
        while f"layers.{i}.blocks.{j}.norm.weight" in w:
            at = f"layers.{i}.blocks.{j}"
            z = linear(norm(x, f"{at}.norm"), f"{at}.op.in_proj").movedim(-1, 1)
            z = F.conv2d(z, w[f"{at}.op.conv2d.weight"], padding=1, groups=z.shape[1])
            z = F.silu(z).movedim(1, -1)  # (b, h, w, d)
            if f"{at}.op.score_predictor.in_conv.0.weight" in w:
                sign = SIGNS[block // 2 % 4] if j % 2 else (0, 0)
                z = quad_core(w, f"{at}.op", z, sign, training, norm, linear)
            else:
                z = cross_core(w, f"{at}.op", z)
            x = x + linear(norm(z, f"{at}.op.out_norm"), f"{at}.op.out_proj")
            z = F.gelu(linear(norm(x, f"{at}.norm2"), f"{at}.mlp.fc1"))
            x = x + linear(z, f"{at}.mlp.fc2")
            block, j = block + 1, j + 1
        if i < 3:
            x = norm(halve(x, f"layers.{i}.downsample.1"), f"layers.{i}.downsample.3")
    return linear(norm(x, "classifier.norm").mean((1, 2)), "classifier.head")


def quad_core(w, op, x, sign, training, norm, linear):
    b, h, width, d = x.shape
    s = norm(x, f"{op}.score_predictor.in_conv.0")
    s = F.gelu(linear(s, f"{op}.score_predictor.in_conv.1"))
    s = F.gelu(linear(s, f"{op}.score_predictor.out_conv.0"))
    s = F.gelu(linear(s, f"{op}.score_predictor.out_conv.2"))
    s = linear(s, f"{op}.score_predictor.out_conv.4").log_softmax(-1)[..., 0]  # (b, h, w)
    logits = F.adaptive_avg_pool2d(s[:, None], 2).flatten(1)
    if training:
        choice = F.gumbel_softmax(logits, tau=1, hard=True)
    else:
        choice = F.one_hot(logits.argmax(-1), 4).to(x.dtype)
    h2, w2, h4, w4 = h // 2, width // 2, h // 4, width // 4
    fine, coarse, quadrant = [], [], []
    for y in range(h):
        for z in range(width):
            (qy, qx), (sy, sx) = (y // h2, z // w2), (y % h2 // h4, z % w2 // w4)
            quadrant.append(2 * qy + qx)
            coarse.append(((2 * qy + qx) * h2 + y % h2) * w2 + z % w2)
            window = ((2 * qy + sy) * 2 + qx) * 2 + sx
            fine.append((window * h4 + y % h4) * w4 + z % w4)
    m = choice[:, quadrant, None]  # (b, l, 1)
    shift = (sign[0] * (h // 8), sign[1] * (h // 8))
    tokens = torch.roll(x, shift, (1, 2)).flatten(1, 2)  # (b, l, d)
    empty = torch.zeros_like(tokens)
    seq = empty.index_add(1, torch.tensor(fine), m * tokens)
    seq = seq + empty.index_add(1, torch.tensor(coarse), (1 - m) * tokens)
    y = scan(w, op, 0, seq) + scan(w, op, 1, seq.flip(1)).flip(1)
    y = m * y[:, fine] + (1 - m) * y[:, coarse]
    return torch.roll(y.view(b, h, width, d), (-shift[0], -shift[1]), (1, 2))


def cross_core(w, op, x):
    b, h, width, d = x.shape
    rows = x.flatten(1, 2)
    columns = x.transpose(1, 2).flatten(1, 2)
    y = scan(w, op, 0, rows) + scan(w, op, 2, rows.flip(1)).flip(1)
    z = scan(w, op, 1, columns) + scan(w, op, 3, columns.flip(1)).flip(1)
    return y.view(b, h, width, d) + z.view(b, width, h, d).transpose(1, 2)


def scan(w, op, k, x):
    """Route k over the sequence x (b, l, d), one position after the other."""
    d = x.shape[-1]
    rows, low = w[f"{op}.x_proj_weight"][k], w[f"{op}.dt_projs_weight"][k]
    r = low.shape[1]
    n = (rows.shape[0] - r) // 2
    A = -torch.exp(w[f"{op}.A_logs"][k * d : (k + 1) * d])  # (d, n)
    D = w[f"{op}.Ds"][k * d : (k + 1) * d]
    state, ys = x.new_zeros(len(x), d, n), []
    for u in x.unbind(1):  # (b, d)
        dt, B, C = (u @ rows.T).split([r, n, n], 1)
        delta = F.softplus(dt @ low.T + w[f"{op}.dt_projs_bias"][k])[..., None]  # (b, d, 1)
        state = torch.exp(delta * A) * state + delta * B[:, None] * u[..., None]
        ys.append((state * C[:, None]).sum(-1) + D * u)
    return torch.stack(ys, 1)
