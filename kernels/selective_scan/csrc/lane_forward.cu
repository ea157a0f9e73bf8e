// Forward pass of the route scan with a lane for each channel or two; lane.cuh says how.
#include "lane_stage.cuh"

namespace scan::route::lane {
namespace {

// One chunk: the route's output is added to what memory.sum holds. First all that the positions have of their own, then
// the recurrence, by when the sum has come.
template <typename T, int kC, typename M>
__device__ __forceinline__ void walk_chunk(const Params& p, const Walk& w, const Step& s, M& memory, Route<kC>& r,
                                           bool again) {
  float decay[kRows][kC], gain[kRows][kC], y[kRows][kC];
#pragma unroll
  for (int j = 0; j < kRows; ++j) {
    const float B = memory.gates[j].x;
    float x[kC];
    unpack<T>(lane_of<kC>(memory.x[s.number % 2][j], w.lane), x);
#pragma unroll
    for (int c = 0; c < kC; ++c) {
      float u;
      const float length = softplus2<false>(memory.z[j][kC * w.lane + c] + r.bias[c], u);
      decay[j][c] = ptx::exp2_approx(length * r.A[c]);
      gain[j][c] = length * (x[c] * B);
      y[j][c] = r.D[c] * x[c];
    }
  }
  wait_async<1>();
  if (again) {
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      float sum[kC];
      unpack<T>(lane_of<kC>(memory.sum[j], w.lane), sum);
#pragma unroll
      for (int c = 0; c < kC; ++c) y[j][c] += sum[c];
    }
  }
  float state[kC];
#pragma unroll
  for (int c = 0; c < kC; ++c) state[c] = r.carry[c];
  if (p.relay > 1) {
    float factor[kC], sum[kC];
#pragma unroll
    for (int c = 0; c < kC; ++c) {
      factor[c] = 1.f, sum[c] = 0.f;
#pragma unroll
      for (int j = 0; j < kRows; ++j) factor[c] *= decay[j][c], sum[c] = fmaf(decay[j][c], sum[c], gain[j][c]);
    }
    relay<kC>(p, w, s, memory, r, factor, sum, state);
  }
  if (has_states(p, w, s)) {
#pragma unroll
    for (int c = 0; c < kC; ++c) p.states[states_of(p, w, s) + c] = state[c];
  }
#pragma unroll
  for (int j = 0; j < kRows; ++j) {
    const float C = memory.gates[j].y;
#pragma unroll
    for (int c = 0; c < kC; ++c) {
      state[c] = fmaf(decay[j][c], state[c], gain[j][c]);
      y[j][c] = fmaf(C, state[c], y[j][c]);
    }
  }
  if (p.relay == 1) {
#pragma unroll
    for (int c = 0; c < kC; ++c) r.carry[c] = state[c];
  }
#pragma unroll
  for (int j = 0; j < kRows; ++j) lane_of<kC>(memory.sum[j], w.lane) = pack<T>(y[j]);
}

template <typename T, int kC, int kN>
__global__ void __launch_bounds__(2 * kMaxGroup* kMaxRelay* kWarp) forward_kernel(const __grid_constant__ Params p) {
  constexpr int kK = (kN + 1) / 2;
  extern __shared__ __align__(16) char shared[];
  auto& memory = reinterpret_cast<Memory<T, kC, kK>*>(shared)[threadIdx.x / kWarp];
  const Walk w = make_walk(p, 32 * kC);
  const int64_t offset = static_cast<int64_t>(w.image) * p.l * p.d + w.strip * 32 * kC;
  const T* x = static_cast<const T*>(p.x) + offset;
  T* y = static_cast<T*>(p.y) + offset;
  const int first = w.direction ? p.chunks - middle(p) : middle(p);  // chunks before the barrier
  // Whether an output lies there already: of an earlier pair, or of the other direction, which came first.
  const auto again = [&](const Step& s) { return s.pair > 0 || s.index >= first; };
  const auto fetch = [&](const Step& s) {
    fetch_proj<T>(p, w, s, memory);
    fetch_tile<kC>(p, w, s, memory, x, memory.x[s.number % 2]);
  };
  start_walk<false>(p, w, memory, fetch);
  constexpr int kFragments = Shape<kC, kK>::kTiles * kK;
  uint4 weights[kFragments];
  Route<kC> r;
  for (Step step = first_step<false>(p, w); step.pair < p.end_pair; step = next_step<false>(p, w, step)) {
    if (step.index == w.turn) r = make_route<kC>(p, w, step);
    if (step.index == w.turn || kK > 1) {  // kept where there are registers for them
#pragma unroll
      for (int i = 0; i < kFragments; ++i) weights[i] = __ldg(weights_of(p, w, step, kFragments) + i * kWarp);
    }
    if (step.index == first + w.turn) __syncthreads();
    if (again(step)) fetch_tile<kC>(p, w, step, memory, y, memory.sum);
    ptx::commit_async();
    wait_async<1>();
    fetch_ahead<false>(p, w, step, memory, fetch);
    expand<T, kC, kK>(p, w, step, memory, [&](int i) { return weights[i]; });
    walk_chunk<T, kC>(p, w, step, memory, r, again(step));
    __syncwarp();
    store_tile<kC>(p, w, step, memory, [&](int j) -> auto& { return memory.sum[j]; }, y, p.d);
    __syncwarp();
    if (step.index + p.relay >= p.chunks) {
      if (first == p.chunks) __syncthreads();
      __syncthreads();
    }
  }
}

}  // namespace

int64_t forward_bytes(int channels, int ranks) {
  int64_t bytes = 0;
  with_shape(channels, ranks, [&](auto c, auto n) {
    constexpr int kC = decltype(c)::value, kN = decltype(n)::value;
    bytes = sizeof(Memory<__half, kC, (kN + 1) / 2>) + sizeof(Turn<kC>);
  });
  return bytes;
}

template <typename T>
void launch_forward(const Params& p, int channels, int ranks, cudaStream_t stream) {
  with_shape(channels, ranks, [&](auto c, auto n) {
    constexpr int kC = decltype(c)::value, kN = decltype(n)::value;
    launch_pairs<kC, Memory<T, kC, (kN + 1) / 2>>(&forward_kernel<T, kC, kN>, p, stream);
  });
}

template void launch_forward<__half>(const Params&, int, int, cudaStream_t);
template void launch_forward<__nv_bfloat16>(const Params&, int, int, cudaStream_t);

}  // namespace scan::route::lane
