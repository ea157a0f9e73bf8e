"""The scan through tables equals gather, scan, gather, with every gradient, the decision's too."""

import pytest
import torch

from quadmamba.kernels import selective_scan
from quadmamba.kernels.quadtree_scan import quadtree_scan, quadtree_scan_ref
from quadmamba.models.orders import QuadtreeOrder

SIZES = [(1, 1), (1, 6), (4, 4), (5, 7), (14, 14), (20, 36)]
NAMES = ["x", "proj", "decision", "dt_weight", "dt_bias", "A", "D"]
DEVICES = [device for device in ("cpu", "cuda") if device in selective_scan.route_ops.KERNELS]
# Error relative to the float64 reference's largest value
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def make_inputs(h, w, device, dtype, n=1, d=12, r=3):
    torch.manual_seed(h * 100 + w)
    order = QuadtreeOrder()
    maps = order.maps(h, w, order.shift(h, w, (1, -1)), torch.device(device))
    l = h * w
    values = {
        "x": torch.randn(6, l, d),
        "proj": torch.randn(6, l, 2, r + 2 * n),
        "decision": torch.eye(4)[torch.arange(6) % 4],
        "dt_weight": torch.randn(2, d, r) * 0.3,
        "dt_bias": torch.randn(2, d) - 2,
        "A": -torch.rand(2, d, n) - 0.2,
        "D": torch.randn(2, d),
    }
    wide = {k: (v.to(dtype) if k in ("x", "proj") else v) for k, v in values.items()}
    return {k: v.to(device).requires_grad_() for k, v in wide.items()}, maps


def run(scan, values, maps):
    x, proj, decision, *parameters = values.values()
    index = (maps.fine, maps.coarse, maps.quadrant)
    tables = [maps.tables] if scan is quadtree_scan else []
    y = scan(x, proj, decision, tuple(parameters), index, *tables)
    torch.manual_seed(7)
    grad = torch.randn(y.shape, dtype=torch.float32).to(y.device, y.dtype)
    grads = torch.autograd.grad(y, list(values.values()), grad)
    return {"y": y.detach(), **dict(zip(NAMES, grads))}


@pytest.mark.skipif(not DEVICES, reason="needs the compiled kernels")
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize(("h", "w"), SIZES)
def test_equals_the_reference_with_every_gradient(h, w, n, dtype):
    for device in DEVICES if torch.cuda.is_available() else ["cpu"]:
        values, maps = make_inputs(h, w, device, dtype, n)
        ours = run(quadtree_scan, values, maps)
        exact = {k: v.detach().double().requires_grad_() for k, v in values.items()}
        truth = run(quadtree_scan_ref, exact, maps)
        for name, value in truth.items():
            error = (ours[name].double() - value).abs().max() / value.abs().max().clamp(min=1)
            assert error <= TOLERANCES[dtype], f"{device} {name}: {error}"


def test_float64_is_the_reference():
    values, maps = make_inputs(5, 7, "cpu", torch.float64)
    ours, truth = (run(scan, values, maps) for scan in (quadtree_scan, quadtree_scan_ref))
    assert all(torch.equal(ours[name], truth[name]) for name in truth)


@pytest.mark.skipif("cpu" not in DEVICES, reason="needs the compiled kernels")
def test_the_op_is_registered_as_torch_library_asks():
    values, maps = make_inputs(4, 6, "cpu", torch.float32)
    inputs = (*values.values(), maps.tables, maps.fine, maps.coarse, maps.quadrant)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.quadmamba.quadtree_scan.default, inputs, test_utils=checks)


@pytest.mark.parametrize("narrow", ["x", "proj"])
def test_autocast_widens_mixed_dtypes_on_both_ways(narrow):
    values, maps = make_inputs(4, 6, "cpu", torch.float32)
    values[narrow] = values[narrow].detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = run(quadtree_scan, values, maps)
    exact = {k: v.detach().double().requires_grad_() for k, v in values.items()}
    truth = run(quadtree_scan_ref, exact, maps)
    for name, value in truth.items():
        error = (found[name].double() - value).abs().max() / value.abs().max().clamp(min=1)
        assert error <= 1e-2, name


def test_a_projection_that_does_not_fit_is_named():
    values, maps = make_inputs(3, 4, "cpu", torch.float32)
    x, proj, decision, *parameters = (v.detach() for v in values.values())
    index = (maps.fine, maps.coarse, maps.quadrant)
    with pytest.raises(ValueError, match="expected proj of shape"):
        quadtree_scan(x, proj[..., 1:], decision, tuple(parameters), index, maps.tables)


@pytest.mark.parametrize(("name", "size"), [("decision", (2, 7)), ("tables", (3, 12))])
def test_wrong_shapes_are_named_and_not_read(name, size):
    values, maps = make_inputs(3, 4, "cpu", torch.float32)
    x, proj, decision, *parameters = (v.detach() for v in values.values())
    tables = maps.tables if name != "tables" else torch.zeros(size, dtype=torch.int32)
    decision = decision if name != "decision" else torch.zeros(size)
    index = (maps.fine, maps.coarse, maps.quadrant)
    with pytest.raises(ValueError, match=name):
        quadtree_scan(x, proj, decision, tuple(parameters), index, tables)
