// Backward pass of the route scan with a lane for each channel or two: the states that enter the chunks come from the
// forward pass, everything else is computed again. lane.cuh says how.
#include "lane_sums.cuh"

namespace scan::route::lane {
namespace {

// How many chunks of the route come before, as the backward pass goes: from the last to the first.
__device__ __forceinline__ int done(const Params& p, const Step& s) { return p.chunks - 1 - s.index; }

constexpr int kHalf = kRows / 2;  // positions that are in registers at a time

// Lanes 2i and 2i + 1 get the sum over the lanes of their v[i]: each round halves the numbers and the lanes that share
// them.
template <int kCount>
__device__ __forceinline__ float sum_lanes(float (&v)[2 * kHalf], int lane) {
  constexpr int kSpan = kCount;  // lanes apart
  const bool upper = lane & kSpan;
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const float keep = upper ? v[i + kCount / 2] : v[i], give = upper ? v[i] : v[i + kCount / 2];
    v[i] = keep + __shfl_xor_sync(kAll, give, kSpan);
  }
  if constexpr (kCount > 2) return sum_lanes<kCount / 2>(v, lane);
  return v[0] + __shfl_xor_sync(kAll, v[0], 1);
}

// The recurrence over a chunk from the state that enters: L takes the place of z; kept: exp(delta A) times the state
// before each position.
template <typename T, int kC, typename M>
__device__ __forceinline__ void walk_up(const Walk& w, const Step& s, M& memory, const Route<kC>& r,
                                        float (&state)[kC], float (&kept)[kRows][kC]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float length[kHalf][kC], decay[kHalf][kC];
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
#pragma unroll
      for (int c = 0; c < kC; ++c) {
        float u;
        length[i][c] = softplus2<false>(memory.z[half * kHalf + i][kC * w.lane + c] + r.bias[c], u);
        decay[i][c] = ptx::exp2_approx(length[i][c] * r.A[c]);
      }
    }
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const int j = half * kHalf + i;
      const float B = memory.gates[j].x;
      float x[kC];
      unpack<T>(lane_of<kC>(memory.x[s.number % 2][j], w.lane), x);
#pragma unroll
      for (int c = 0; c < kC; ++c) {
        kept[j][c] = decay[i][c] * state[c];
        state[c] = fmaf(length[i][c], x[c] * B, kept[j][c]);
      }
    }
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
#pragma unroll
      for (int c = 0; c < kC; ++c) memory.z[half * kHalf + i][kC * w.lane + c] = length[i][c];
    }
  }
}

// What a chunk makes of the adjoint that crosses its end, for the warps that take turns.
template <typename T, int kC, typename M>
__device__ __forceinline__ void pass_on(const Params& p, const Walk& w, const Step& s, M& memory, Route<kC>& r,
                                        float (&enter)[kC]) {
  float factor[kC], gain[kC];
#pragma unroll
  for (int c = 0; c < kC; ++c) factor[c] = 1.f, gain[c] = 0.f;
#pragma unroll
  for (int j = kRows - 1; j >= 0; --j) {
    float dy[kC];
    unpack<T>(lane_of<kC>(memory.dy[j], w.lane), dy);
#pragma unroll
    for (int c = 0; c < kC; ++c) {
      const float decay = ptx::exp2_approx(memory.z[j][kC * w.lane + c] * r.A[c]);
      factor[c] *= decay;
      gain[c] = decay * fmaf(memory.gates[j].y, dy[c], gain[c]);
    }
  }
  relay<kC>(p, w, s, memory, r, factor, gain, enter);
}

// The adjoint over a chunk: dx is added to what memory.sum holds, dz takes the place of L, and the gradients of B and C
// of each position, summed over the warp's channels, go to `part`.
template <typename T, int kC, int kN, typename M>
__device__ __forceinline__ void walk_down(const Params& p, const Walk& w, const Step& s, M& memory, Route<kC>& r,
                                          const float (&kept)[kRows][kC], Sums<kC, kN>& sums) {
  float adjoint[kC];
#pragma unroll
  for (int c = 0; c < kC; ++c) adjoint[c] = r.carry[c];
  if (p.relay > 1) pass_on<T, kC>(p, w, s, memory, r, adjoint);
#pragma unroll
  for (int half = 1; half >= 0; --half) {
    float v[2 * kHalf];
    Raw<T, kC> dxs[kHalf], dzs[kHalf];
#pragma unroll
    for (int i = kHalf - 1; i >= 0; --i) {
      const int j = half * kHalf + i;
      const float2 gate = memory.gates[j];
      float x[kC], dy[kC], dx[kC], dz[kC];
      unpack<T>(lane_of<kC>(memory.x[s.number % 2][j], w.lane), x);
      unpack<T>(lane_of<kC>(memory.dy[j], w.lane), dy);
      unpack<T>(lane_of<kC>(memory.sum[j], w.lane), dx);
      v[2 * i] = v[2 * i + 1] = 0.f;
#pragma unroll
      for (int c = 0; c < kC; ++c) {
        const float length = memory.z[j][kC * w.lane + c];
        const float gradient = fmaf(gate.y, dy[c], adjoint[c]);  // of the state
        adjoint[c] = ptx::exp2_approx(length * r.A[c]) * gradient;
        const float scaled = gradient * length, drive = x[c] * gate.x;
        const float rate = fmaf(r.A[c] * kLn2, kept[j][c], drive);
        dz[c] = gradient * rate * (1.f - ptx::exp2_approx(-length));
        if (kN > kSumTiles) dz[c] *= kLog2E;  // of dt_weight dt itself, as the product that follows takes it
        dx[c] += fmaf(r.D[c], dy[c], scaled * gate.x);
        v[2 * i] = fmaf(scaled, x[c], v[2 * i]);
        v[2 * i + 1] = fmaf(fmaf(length, drive, kept[j][c]), dy[c], v[2 * i + 1]);
        sums.A[c] = fmaf(scaled, kept[j][c], sums.A[c]);
        sums.D[c] = fmaf(x[c], dy[c], sums.D[c]);
        sums.bias[c] += dz[c];
      }
      dxs[i] = pack<T>(dx);
      dzs[i] = pack<T>(dz);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const int j = half * kHalf + i;
      lane_of<kC>(memory.sum[j], w.lane) = dxs[i];
      *reinterpret_cast<Raw<T, kC>*>(&memory.dz(j)[kC * w.lane]) = dzs[i];
    }
    const float sum = sum_lanes<2 * kHalf>(v, w.lane);
    const bool of_B = w.lane % 4 < 2;
    if (w.lane % 2 == 0) memory.part_of(s)[half * kHalf + w.lane / 4][M::kGates + !of_B] = of_B ? sum * kLn2 : sum;
  }
  if (p.relay == 1) {
#pragma unroll
    for (int c = 0; c < kC; ++c) r.carry[c] = adjoint[c];
  }
}

template <typename T, int kC, int kN>
__global__ void __launch_bounds__(2 * kMaxGroup* kMaxRelay* kWarp) backward_kernel(const __grid_constant__ Params p) {
  using M = BackwardMemory<T, kC, kN>;
  constexpr int kK = (kN + 1) / 2;
  extern __shared__ __align__(16) char shared[];
  M* const memories = reinterpret_cast<M*>(shared);
  M& memory = memories[threadIdx.x / kWarp];
  const Walk w = make_walk(p, 32 * kC);
  const int64_t offset = static_cast<int64_t>(w.image) * p.l * p.d + w.strip * 32 * kC;
  const T* x = static_cast<const T*>(p.x) + offset;
  const T* dy = static_cast<const T*>(p.dy) + offset;
  T* dx = static_cast<T*>(p.y) + offset;
  T* dz = static_cast<T*>(p.dz) + static_cast<int64_t>(w.image) * p.l * p.k * p.d + w.strip * 32 * kC;
  const int first = w.direction ? middle(p) : p.chunks - middle(p);  // chunks before the barrier
  // Whether a gradient lies there already: of an earlier pair, or of the other direction, which came first.
  const auto again = [&](const Step& s) { return s.pair > 0 || done(p, s) >= first; };
  const auto fetch = [&](const Step& s) {
    fetch_proj<T>(p, w, s, memory);
    fetch_tile<kC>(p, w, s, memory, x, memory.x[s.number % 2]);
  };
  start_walk<true>(p, w, memory, fetch);
  constexpr int kFragments = Shape<kC, kK>::kTiles * kK;
  Route<kC> r;
  Sums<kC, kN> sums;
  for (Step step = first_step<true>(p, w); step.pair < p.end_pair; step = next_step<true>(p, w, step)) {
    if (done(p, step) == w.turn) r = make_route<kC>(p, w, step), sums = {};
    if (done(p, step) == first + w.turn) __syncthreads();
    // Used when the copies have come; asked for now, so that they come meanwhile.
    uint4 weights[kFragments];
    float state[kC];
#pragma unroll
    for (int i = 0; i < kFragments; ++i) weights[i] = __ldg(weights_of(p, w, step, kFragments) + i * kWarp);
    load_floats<kC>(p.states + states_of(p, w, step), has_states(p, w, step), state);
    fetch_tile<kC>(p, w, step, memory, dy, memory.dy);
    if (again(step)) fetch_tile<kC>(p, w, step, memory, dx, memory.sum);
    ptx::commit_async();
    wait_async<1>();
    fetch_ahead<true>(p, w, step, memory, fetch);
    expand<T, kC, kK>(p, w, step, memory, [&](int i) { return weights[i]; });
    float kept[kRows][kC];
    walk_up<T, kC>(w, step, memory, r, state, kept);
    wait_async<1>();
    clear_tail<kC>(p, w, step, memory.dy);
    if (!again(step)) {
#pragma unroll
      for (int j = 0; j < kRows; ++j) lane_of<kC>(memory.sum[j], w.lane) = Raw<T, kC>{};
    }
    if (M::kParts == 1) meet(p, w);
    uint2 back[2 * kC * kN];
    const auto load_back = [&] {
      const int64_t strip = static_cast<int64_t>(route_of(p, w, step)) * p.strips + w.strip;
#pragma unroll
      for (int i = 0; i < 2 * kC * kN; ++i) back[i] = __ldg(p.contract + (strip * 2 * kC * kN + i) * kWarp + w.lane);
    };
    if (kN <= kSumTiles) load_back();  // else there are no registers to spare
    walk_down<T, kC, kN>(p, w, step, memory, r, kept, sums);
    if (kN > kSumTiles) load_back();
    __syncwarp();
    store_tile<kC>(p, w, step, memory, [&](int j) -> auto& { return memory.sum[j]; }, dx, p.d);
    contract<T, kC, kN>(w, step, memory, back);
    if constexpr (kN <= kSumTiles) {
      sum_weights<T, kC, kN>(w, step, memory, sums);
    } else {
      store_tile<kC>(p, w, step, memory, [&](int j) -> auto& { return memory.dz(j); },
                     dz + static_cast<int64_t>(route_of(p, w, step)) * p.d, static_cast<int64_t>(p.k) * p.d);
    }
    write_proj<T>(p, w, step, memories);
    if (step.index < p.relay) {
      write_sums<kC, kN>(p, w, step, sums);
      if (first == p.chunks) __syncthreads();
      __syncthreads();
    }
  }
}

}  // namespace

int64_t backward_bytes(int channels, int ranks) {
  int64_t bytes = 0;
  with_shape(channels, ranks, [&](auto c, auto n) {
    constexpr int kC = decltype(c)::value, kN = decltype(n)::value;
    bytes = sizeof(BackwardMemory<__half, kC, kN>) + sizeof(Turn<kC>);
  });
  return bytes;
}

template <typename T>
void launch_backward(const Params& p, int channels, int ranks, cudaStream_t stream) {
  with_shape(channels, ranks, [&](auto c, auto n) {
    constexpr int kC = decltype(c)::value, kN = decltype(n)::value;
    launch_pairs<kC, BackwardMemory<T, kC, kN>>(&backward_kernel<T, kC, kN>, p, stream);
  });
}

template void launch_backward<__half>(const Params&, int, int, cudaStream_t);
template void launch_backward<__nv_bfloat16>(const Params&, int, int, cudaStream_t);

}  // namespace scan::route::lane
