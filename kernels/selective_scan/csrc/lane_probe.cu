// What enters the segments of a long table: each segment says what it makes of a state that enters (factor x state +
// gain), walked by a warp of its own; a second kernel follows the recurrence over the segments.
#include "lane_stage.cuh"

namespace scan::route::lane {
namespace {

// What a chunk makes of the state, or of its adjoint: its part of `length` and `gain`. First all that the positions have
// of their own, then the recurrence.
template <typename T, int kC, bool kBackward, typename M>
__device__ __forceinline__ void probe_chunk(const Walk& w, const Step& s, M& memory, const Route<kC>& r,
                                            float (&length)[kC], float (&gain)[kC]) {
  float decay[kRows][kC], drive[kRows][kC];
#pragma unroll
  for (int j = 0; j < kRows; ++j) {
    const float2 gate = memory.gates[j];
    float v[kC];
    unpack<T>(lane_of<kC>(memory.x[s.number % 2][j], w.lane), v);
#pragma unroll
    for (int c = 0; c < kC; ++c) {
      float u;
      const float step = softplus2<false>(memory.z[j][kC * w.lane + c] + r.bias[c], u);
      decay[j][c] = ptx::exp2_approx(step * r.A[c]);
      drive[j][c] = kBackward ? gate.y * v[c] : step * (v[c] * gate.x);
      length[c] += step;
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int j = kBackward ? kRows - 1 - i : i;
#pragma unroll
    for (int c = 0; c < kC; ++c) {
      gain[c] = kBackward ? decay[j][c] * (drive[j][c] + gain[c]) : fmaf(decay[j][c], gain[c], drive[j][c]);
    }
  }
}

// Whether the pass walks the direction's table from its end.
__device__ __forceinline__ bool descends(int direction, bool backward) { return (direction == 1) != backward; }

// kBackward: the same of the adjoint that crosses the segment's end.
template <typename T, int kC, int kN, bool kBackward>
__global__ void __launch_bounds__(2 * kMaxGroup* kMaxRelay* kWarp) probe_kernel(const __grid_constant__ Params p) {
  constexpr int kK = (kN + 1) / 2, kFragments = Shape<kC, kK>::kTiles * kK;
  extern __shared__ __align__(16) char shared[];
  auto& memory = reinterpret_cast<Memory<T, kC, kK>*>(shared)[threadIdx.x / kWarp];
  const Walk w = make_walk(p, 32 * kC);
  if (w.segment == (descends(w.direction, kBackward) ? 0 : p.segments - 1)) return;  // nothing follows it
  const T* rows = static_cast<const T*>(kBackward ? p.dy : p.x) + static_cast<int64_t>(w.image) * p.l * p.d;
  const auto fetch = [&](const Step& s) {
    fetch_proj<T>(p, w, s, memory);
    fetch_tile<kC>(p, w, s, memory, rows + w.strip * 32 * kC, memory.x[s.number % 2]);
  };
  start_walk<kBackward>(p, w, memory, fetch);
  uint4 weights[kFragments];
  Route<kC> r;
  float length[kC], gain[kC];
  const int last = kBackward ? 0 : p.chunks - 1, begin = p.chunks - 1 - last;
  for (Step s = first_step<kBackward>(p, w); s.pair < p.end_pair; s = next_step<kBackward>(p, w, s)) {
    if (s.index == begin) {
      r = make_route<kC>(p, w, s);
#pragma unroll
      for (int c = 0; c < kC; ++c) length[c] = gain[c] = 0.f;
    }
    if (s.index == begin || kK > 1) {  // kept where there are registers for them
#pragma unroll
      for (int i = 0; i < kFragments; ++i) weights[i] = __ldg(weights_of(p, w, s, kFragments) + i * kWarp);
    }
    wait_async<0>();
    fetch_ahead<kBackward>(p, w, s, memory, fetch);
    expand<T, kC, kK>(p, w, s, memory, [&](int i) { return weights[i]; });
    auto& tile = memory.x[s.number % 2];
    if (kBackward) clear_tail<kC>(p, w, s, tile);
    probe_chunk<T, kC, kBackward>(w, s, memory, r, length, gain);
    __syncwarp();
    if (s.index == last && w.active) {
#pragma unroll
      for (int c = 0; c < kC; ++c) {
        p.spans[span_of(p, w, s) + c] = make_float2(ptx::exp2_approx(length[c] * r.A[c]), gain[c]);
      }
    }
  }
}

// A thread for each image, route and channel; the segments in the order in which the pass comes to them.
__global__ void enter_kernel(Params p, bool backward) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= static_cast<int64_t>(p.b) * p.k * p.d) return;
  const int64_t row = index / p.d, channel = index % p.d;  // row: image and route
  const bool from_end = descends(row % p.k >= p.k / 2, backward);
  float state = 0.f;
  for (int i = 0; i < p.segments; ++i) {
    const int64_t at = (row * p.segments + (from_end ? p.segments - 1 - i : i)) * p.d + channel;
    p.enter[at] = state;
    if (i + 1 == p.segments) break;
    const float2 span = p.spans[at];
    state = fmaf(span.x, state, span.y);
  }
}

}  // namespace

template <typename T>
void launch_probe(const Params& given, int channels, int ranks, bool backward, cudaStream_t stream) {
  Params p = given;
  p.relay = 1;
  with_shape(channels, ranks, [&](auto c, auto n) {
    constexpr int kC = decltype(c)::value, kN = decltype(n)::value;
    using M = Memory<T, kC, (kN + 1) / 2>;
    backward ? launch<kC, M>(&probe_kernel<T, kC, kN, true>, p, stream)
             : launch<kC, M>(&probe_kernel<T, kC, kN, false>, p, stream);
  });
  constexpr int kThreads = 128;
  const int64_t count = int64_t{p.b} * p.k * p.d;
  enter_kernel<<<static_cast<unsigned>(ceil_div(count, kThreads)), kThreads, 0, stream>>>(p, backward);
  check_launch(kOp);
}

template void launch_probe<__half>(const Params&, int, int, bool, cudaStream_t);
template void launch_probe<__nv_bfloat16>(const Params&, int, int, bool, cudaStream_t);

}  // namespace scan::route::lane
