// Backward pass of the route scan on the GPU: states from the forward pass, everything else computed again.
//
// A block walks each route of its images from the last chunk to the first. Sums over channels (dt, B, C) and over
// positions (weights) are small matrix products over the tiles that its warps left in shared memory; they belong to the
// chunk before, so that one barrier per chunk is enough. No atomics: one order of summation, equal bits each run.
#include "route_sums.cuh"

namespace scan::route {
namespace {

// A lane's rows of x, dy and the dx so far for one chunk, as they lie in memory.
template <typename T, typename G>
struct Loaded {
  Two<T> x[kSteps], dx[kSteps];
  Two<G> dy[kSteps];
};

// What one state of a chunk takes and gives. D: of the first route, zero for the others.
struct Walk {
  Pairs length, slope, dy, dx, dz;
  float dA[2];
  float2 carry;  // the adjoint that crosses the chunk's end, then its start
};

// One state over one chunk: dx and dz (set where kPair, else added to), and the parts of dB and dC in shared memory.
template <typename T, bool kPair>
__device__ __forceinline__ void walk_state(const Params& p, const float* gate_at, float* tile, const Route& r,
                                           const Step& step, int i, const Lane& at, const Two<T> (&x)[kSteps], Walk& w) {
  constexpr bool kFull = std::is_same<T, float>::value;
  const float2 A = kPair ? r.A : load_A<false>(p, step.route, i, at);
  const float2 state = load_border<kPair>(p, r, step.chunk - 1, i, at);
  Pairs decay, kept, drive;  // drive: ln2 B x
  float dC[kSteps], product[2] = {1.f, 1.f}, h[2] = {0.f, 0.f}, e[2] = {0.f, 0.f}, leave[2], unused;
#pragma unroll
  for (int j = 0; j < kSteps; ++j) {
    const float B = gates<kPair>(p, gate_at, j, i).x;
    const float2 v = widen(x[j]);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      decay[j][c] = ptx::exp2_approx(w.length[j][c] * (c ? A.y : A.x));
      drive[j][c] = (c ? v.y : v.x) * B;
      h[c] = fmaf(decay[j][c], h[c], w.length[j][c] * drive[j][c]);
      product[c] *= decay[j][c];
    }
  }
#pragma unroll
  for (int j = kSteps - 1; j >= 0; --j) {
    const float C = gates<kPair>(p, gate_at, j, i).y;
#pragma unroll
    for (int c = 0; c < 2; ++c) e[c] = decay[j][c] * fmaf(C, w.dy[j][c], e[c]);
  }
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    join_lanes<true>(product[c], h[c], c ? state.y : state.x, at.g, h[c], unused);
    join_lanes<false>(product[c], e[c], c ? w.carry.y : w.carry.x, at.g, e[c], leave[c]);
  }
  w.carry = make_float2(leave[0], leave[1]);
#pragma unroll
  for (int j = 0; j < kSteps; ++j) {
    dC[j] = 0.f;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      kept[j][c] = decay[j][c] * h[c];
      h[c] = fmaf(w.length[j][c], drive[j][c], kept[j][c]);
      dC[j] = fmaf(h[c], w.dy[j][c], dC[j]);
    }
  }
#pragma unroll
  for (int j = kSteps - 1; j >= 0; --j) {
    const float2 gate = gates<kPair>(p, gate_at, j, i), v = widen(x[j]);
    float dB = 0.f;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float gradient = fmaf(gate.y, w.dy[j][c], e[c]);  // of the state h_t
      e[c] = decay[j][c] * gradient;
      const float scaled = gradient * w.length[j][c];
      dB = fmaf(scaled, c ? v.y : v.x, dB);
      w.dA[c] = fmaf(scaled, kept[j][c], w.dA[c]);
      const float rate = fmaf((c ? A.y : A.x) * kLn2, kept[j][c], drive[j][c]);
      if (kPair) {
        // d length / d z; the short form is good to 2e-7 beside 1, as good as the tf32 products that follow need.
        w.dz[j][c] = gradient * rate * (kFull ? w.slope[j][c] : 1.f - ptx::exp2_approx(-w.length[j][c]));
        w.dx[j][c] = scaled * gate.x;
      } else {
        w.dz[j][c] = fmaf(gradient * rate, w.slope[j][c], w.dz[j][c]);
        w.dx[j][c] = fmaf(scaled, gate.x, w.dx[j][c]);
      }
    }
    *reinterpret_cast<float2*>(tile + ((8 * j + at.g) * 4 + at.q) * 2) = make_float2(dB, dC[j]);
  }
}

// What a block works with: its shared memory and which channels and images are its own.
template <typename T, bool kPair>
struct Block {
  Stage<T, kPair> stage;
  Tiles tiles;
  int group, slab;
};

// One chunk of a route: the lane's sums and dx, and the tiles from which `finish` makes the rest.
template <typename T, typename G, bool kPair, int kColumns>
__device__ __forceinline__ void walk_chunk(const Params& p, const Block<T, kPair>& block, const Step& step,
                                           const Route& r, const Lane& at, const Loaded<T, G>& in,
                                           Sums<kColumns>& sums, Walk& w) {
  constexpr bool kFull = std::is_same<T, float>::value;
  const float* rows = block.stage.rows + step.number % kBackwardCopies * p.rows;
  const float* gate_at = gates_at(p, rows, at.g);
  float* tile = block.tiles.gates_of(step, at.warp);
  expand_dt<kFull>(p, rows, r, at, w.length);
#pragma unroll
  for (int j = 0; j < kSteps; ++j) {
    const float2 v = widen(in.dy[j]);
    w.dy[j][0] = v.x, w.dy[j][1] = v.y;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float u;
      const float z = w.length[j][c];
      w.length[j][c] = softplus2<kFull>(z, u);
      if (kFull || !kPair) {
        const float inverse = ptx::reciprocal_approx(1.f + u);
        w.slope[j][c] = z >= 0.f ? inverse : u * inverse;
        w.dz[j][c] = w.dx[j][c] = 0.f;
      }
    }
  }
  if constexpr (kPair) {
    walk_state<T, true>(p, gate_at, tile, r, step, 0, at, in.x, w);
    if (step.chunk == 0) sums.A[0] += w.dA[0], sums.A[1] += w.dA[1];
  } else {
    const bool last = step.chunk == p.chunks - 1;
    float* const adjoint =
        p.adjoints + (static_cast<int64_t>(step.image) * p.k + step.route) * p.n * p.d + at.channel;
    for (int i = 0; i < p.n; ++i) {
      float* const spot = adjoint + static_cast<int64_t>(i) * p.d;
      w.dA[0] = w.dA[1] = 0.f;
      w.carry = load_pair<false>(spot, at.first && !last, at.second && !last);
      walk_state<T, false>(p, gate_at, tile, r, step, i, at, in.x, w);
      __syncthreads();
      if (at.g == 0) store_pair<false>(spot, w.carry, at.first, at.second);
      add_sums(p, block.group, step.route, at, p.r + 2 + i, w.dA[0] * kLn2, w.dA[1] * kLn2);
      write_gates<T>(p, block.tiles, block.stage.tokens, block.slab, step, i);
      __syncthreads();
    }
  }
#pragma unroll
  for (int j = 0; j < kSteps; ++j) {
#pragma unroll
    for (int c = 0; c < 2; ++c) sums.bias[c] += w.dz[j][c];
  }
  store_dz<kFull>(block.tiles.dz_of(step, at.warp), at, w.dz);
}

// What needs the tiles of all warps: the chunk's dproj, and dt_weight's sum.
template <typename T, bool kPair, int kColumns>
__device__ __forceinline__ void finish(const Params& p, const Block<T, kPair>& block, const Step& step,
                                       const Lane& at, Sums<kColumns>& sums) {
  const int* tokens = block.stage.tokens;
  if (kPair) write_gates<T>(p, block.tiles, tokens, block.slab, step, 0);
  write_dt<T>(p, block.tiles, tokens, block.slab, step, at);
  sum_weight<std::is_same<T, float>::value>(p, block.tiles, block.stage.rows, step, at, sums.weight);
}

// The step after: a route's chunks from the last to the first, the same of the group's next image.
__device__ __forceinline__ Step next(const Params& p, Step s) {
  ++s.number;
  if (--s.chunk < 0) s.chunk = p.chunks - 1, ++s.image;
  return s;
}

// The first route finds sum(D) dy in place of the dx so far; the gradient of every D is the sum of x dy.
template <typename T, typename G, bool kPair, int kColumns>
__device__ __forceinline__ void step_chunk(const Params& p, const Block<T, kPair>& block, const Step& step,
                                           const Route& r, const Lane& at, bool all_channels, bool finish_before,
                                           const Step& before, int images, Sums<kColumns>& sums, Walk& w) {
  const int* tokens = block.stage.tokens;
  const int64_t base = static_cast<int64_t>(step.image) * p.l * p.d + at.channel;
  T* dx = static_cast<T*>(p.y) + base;
  const Step after = next(p, step), later = next(p, after);
  const auto steps = [&] { return make_steps<kPair>(p, tokens, step, at.g, all_channels); };
  Loaded<T, G> in;
  load_rows<kPair>(static_cast<const G*>(p.dy) + base, steps(), at, in.dy);
  load_rows<kPair>(static_cast<const T*>(p.x) + base, steps(), at, in.x);
  __syncthreads();  // this step's rows, the next one's tokens and the last one's tiles are there, older ones are free
  if (after.image < images) block.stage.fetch_rows(after);
  if (later.image < images) block.stage.fetch_tokens(later);
  if (finish_before) finish<T, kPair>(p, block, before, at, sums);
  if (!r.start) load_rows<kPair>(static_cast<const T*>(dx), steps(), at, in.dx);
  walk_chunk<T, G, kPair>(p, block, step, r, at, in, sums, w);
  const float2 D = load_two(p.D + at.channel);
#pragma unroll
  for (int j = 0; j < kSteps; ++j) {
    const float2 v = widen(in.x[j]), e = widen(in.dx[j]);
    if (r.start) sums.D[0] = fmaf(w.dy[j][0], v.x, sums.D[0]), sums.D[1] = fmaf(w.dy[j][1], v.y, sums.D[1]);
    w.dx[j][0] += r.start ? D.x * w.dy[j][0] : e.x;
    w.dx[j][1] += r.start ? D.y * w.dy[j][1] : e.y;
  }
  store_rows<kPair>(dx, steps(), at, w.dx);
  ptx::wait_all_async();
  if (after.image < images) block.stage.place_rows(after);
}

template <typename T, typename G, bool kPair, int kColumns>
__global__ void __launch_bounds__(kBackwardWarps* kWarp, kBackwardBlocks)
    backward_kernel(const __grid_constant__ Params p) {
  extern __shared__ float rows[];
  const int warps = blockDim.x / kWarp, slab = blockIdx.x % p.slabs, group = blockIdx.x / p.slabs;
  float* const dz = rows + kBackwardCopies * p.rows;
  int* const tokens = reinterpret_cast<int*>(dz + 4 * warps * kTile);
  const Block<T, kPair> block{
      {p, rows, tokens, reinterpret_cast<Two<T>*>(tokens + kTokens * kChunk), kBackwardCopies},
      {dz, dz + 2 * warps * kTile, warps},
      group,
      slab};
  const Lane at = make_lane(p, slab);
  const bool all_channels = (slab + 1) * warps * kStrip <= p.d;
  const int first = group * p.group, images = min(p.b, first + p.group);
  for (int route = 0; route < p.k; ++route) {
    Sums<kColumns> sums = {};
    Walk w;
    Route r;
    Step step{first, route, p.chunks - 1, 0}, before = step;
    __syncthreads();
    block.stage.start(step, next(p, step), next(p, step).image < images);
    for (; step.image < images; before = step, step = next(p, step)) {
      if (step.chunk == p.chunks - 1) {
        r = make_route<kPair>(p, step, at);
        w.carry = make_float2(0.f, 0.f);
        w.dA[0] = w.dA[1] = 0.f;
      }
      step_chunk<T, G, kPair>(p, block, step, r, at, all_channels, step.number > 0, before, images, sums, w);
    }
    __syncthreads();
    finish<T, kPair>(p, block, before, at, sums);
    flush<kPair>(p, group, slab, warps, route, at, sums);
  }
}

}  // namespace

template <typename T, typename G>
void launch_backward(const Params& p, int warps, bool pair, cudaStream_t stream) {
  const int bytes = backward_bytes(p.rows, p.m, warps, sizeof(T));
  const int groups = (p.b + p.group - 1) / p.group;
  auto* kernel = !pair       ? &backward_kernel<T, G, false, kMaxColumns>
                 : p.kt <= 2 ? &backward_kernel<T, G, true, 1>
                             : &backward_kernel<T, G, true, 3>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), kOp);
  kernel<<<static_cast<unsigned>(int64_t{groups} * p.slabs), warps * kWarp, bytes, stream>>>(p);
  check_launch(kOp);
}

template void launch_backward<float, float>(const Params&, int, bool, cudaStream_t);
template void launch_backward<__half, float>(const Params&, int, bool, cudaStream_t);
template void launch_backward<__half, __half>(const Params&, int, bool, cudaStream_t);
template void launch_backward<__nv_bfloat16, float>(const Params&, int, bool, cudaStream_t);
template void launch_backward<__nv_bfloat16, __nv_bfloat16>(const Params&, int, bool, cudaStream_t);

}  // namespace scan::route
