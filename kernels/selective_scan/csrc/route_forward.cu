// Forward pass of the route scan on the GPU, in one launch.
//
// A block holds up to 8 warps = 64 channels of one image and walks its routes one after the other, each in chunks of 64
// positions with the state in registers. The sum over the routes grows where y is written; x and y stay near in L2.
#include "route_stage.cuh"

namespace scan::route {
namespace {

// One chunk: the route's output without D x, and the states passed on. In: carry, the first state's value that enters.
// x(j): the features at the lane's position j.
template <typename T, bool kPair, typename Features>
__device__ __forceinline__ void walk_chunk(const Params& p, const float* rows, const Route& r, const Step& step,
                                           const Lane& at, Features&& x, Pairs& y, float2& carry) {
  constexpr bool kFull = std::is_same<T, float>::value;
  Pairs length, decay, gain;
  expand_dt<kFull>(p, rows, r, at, length);
#pragma unroll
  for (int j = 0; j < kSteps; ++j) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float u;
      length[j][c] = softplus2<kFull>(length[j][c], u);
    }
  }
  const float* gate = gates_at(p, rows, at.g);
  for (int i = 0; i < (kPair ? 1 : p.n); ++i) {
    const float2 A = kPair ? r.A : load_A<false>(p, step.route, i, at);
    if (!kPair) carry = load_border<false>(p, r, step.chunk - 1, i, at);
    float product[2] = {1.f, 1.f}, state[2] = {0.f, 0.f}, enter[2], leave[2];
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const float2 v = x(j);
      const float B = gates<kPair>(p, gate, j, i).x;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        decay[j][c] = ptx::exp2_approx(length[j][c] * (c ? A.y : A.x));
        gain[j][c] = length[j][c] * ((c ? v.y : v.x) * B);
        state[c] = fmaf(decay[j][c], state[c], gain[j][c]);
        product[c] *= decay[j][c];
      }
    }
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      join_lanes<true>(product[c], state[c], c ? carry.y : carry.x, at.g, enter[c], leave[c]);
    }
    store_border<kPair>(p, r, step.chunk, i, at, leave);
    if (kPair) carry = make_float2(leave[0], leave[1]);
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const float C = gates<kPair>(p, gate, j, i).y;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        enter[c] = fmaf(decay[j][c], enter[c], gain[j][c]);
        y[j][c] = kPair || i == 0 ? C * enter[c] : fmaf(C, enter[c], y[j][c]);
      }
    }
  }
}

// The step after: all chunks of a route, then the next route.
__device__ __forceinline__ Step next(const Params& p, Step s) {
  ++s.number;
  if (++s.chunk == p.chunks) s.chunk = 0, ++s.route;
  return s;
}

// The lane's rows of x, and of y as earlier routes left it: fetched a step ahead where kPair, else read when needed.
template <typename T, typename Y, bool kPair>
struct Rows {
  const T* features;
  Y* sum;
  const int* tokens;
  Ahead<T> x;
  Ahead<Y> y;
  bool all_channels;

  __device__ __forceinline__ Steps steps(const Params& p, const Step& step, const Lane& at) const {
    return make_steps<kPair>(p, tokens, step, at.g, all_channels);
  }

  // What a route left at its end is read by the next one at its start: too fresh to be fetched before the barrier.
  __device__ __forceinline__ void fetch(const Params& p, const Step& now, const Step& after, const Lane& at) const {
    if constexpr (kPair) {
      if (now.chunk == 0 && now.route > 0) y.fetch(sum, steps(p, now, at), at, now.number);
      if (after.route == p.k) return;
      const Steps s = steps(p, after, at);
      x.fetch(features, s, at, after.number);
      if (after.chunk > 0 && after.route > 0) y.fetch(sum, s, at, after.number);
    }
  }
};

// One step: on the first route y is D x plus the route's output, on the others what is there plus its output.
template <typename T, typename Y, bool kPair>
__device__ __forceinline__ void walk_step(const Params& p, const float* rows, const Route& r, const Step& step,
                                          const Lane& at, const Rows<T, Y, kPair>& data, float2 D, float2& carry) {
  const Two<T>* const x_slot = data.x.slot(step.number);
  const Two<Y>* const y_slot = data.y.slot(step.number);
  Two<T> x[kSteps];  // where not kPair
  Two<Y> base[kSteps];
  Pairs y;
  if (!kPair) load_rows<false>(data.features, data.steps(p, step, at), at, x);
  if (!kPair && !r.start) load_rows<false>(static_cast<const Y*>(data.sum), data.steps(p, step, at), at, base);
  const auto feature = [&](int j) { return widen(kPair ? x_slot[j * kWarp] : x[j]); };
  walk_chunk<T, kPair>(p, rows, r, step, at, feature, y, carry);
  if (kPair && step.chunk == 0) ptx::wait_all_async();
  if (r.start) {
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const float2 v = feature(j);
      y[j][0] = fmaf(D.x, v.x, y[j][0]), y[j][1] = fmaf(D.y, v.y, y[j][1]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const float2 v = widen(kPair ? y_slot[j * kWarp] : base[j]);
      y[j][0] += v.x, y[j][1] += v.y;
    }
  }
  store_rows<kPair>(data.sum, data.steps(p, step, at), at, y);
}

template <typename T, typename Y, bool kPair>
__global__ void __launch_bounds__(kForwardWarps* kWarp, kForwardBlocks)
    forward_kernel(const __grid_constant__ Params p) {
  extern __shared__ float rows[];
  int* tokens = reinterpret_cast<int*>(rows + kForwardCopies * p.rows);
  Two<T>* const raw = reinterpret_cast<Two<T>*>(tokens + kTokens * kChunk);
  const Stage<T, kPair> stage{p, rows, tokens, raw, kForwardCopies};
  const int image = blockIdx.x / p.slabs, slab = blockIdx.x % p.slabs;
  const Lane at = make_lane(p, slab);
  const int64_t offset = static_cast<int64_t>(image) * p.l * p.d + at.channel;
  Two<T>* const x_buffer = raw + kChunk * p.m / 2;
  const Rows<T, Y, kPair> data{static_cast<const T*>(p.x) + offset,
                               static_cast<Y*>(p.y) + offset,
                               tokens,
                               {x_buffer},
                               {reinterpret_cast<Two<Y>*>(x_buffer + 2 * kSteps * blockDim.x)},
                               (slab + 1) * static_cast<int>(blockDim.x / kWarp) * kStrip <= p.d};
  const float2 D = load_two(p.D + at.channel);
  float2 carry;
  Route r;
  Step step{image, 0, 0, 0};
  stage.start(step, next(p, step), p.k * p.chunks > 1);
  if (kPair) data.x.fetch(data.features, data.steps(p, step, at), at, 0);
  ptx::wait_all_async();
  for (; step.route < p.k; step = next(p, step)) {
    const Step after = next(p, step), later = next(p, after);
    if (step.chunk == 0) r = make_route<kPair>(p, step, at), carry = make_float2(0.f, 0.f);
    __syncthreads();  // this step's rows and the next one's tokens are there, older ones are free
    if (after.route < p.k) stage.fetch_rows(after);
    if (later.route < p.k) stage.fetch_tokens(later);
    data.fetch(p, step, after, at);
    walk_step<T, Y, kPair>(p, rows + step.number % kForwardCopies * p.rows, r, step, at, data, D, carry);
    ptx::wait_all_async();
    if (after.route < p.k) stage.place_rows(after);
  }
}

}  // namespace

template <typename T, typename Y>
void launch_forward(const Params& p, int warps, bool pair, cudaStream_t stream) {
  const int bytes = forward_bytes(p.rows, p.m, warps, pair, sizeof(T), sizeof(Y));
  auto* kernel = pair ? &forward_kernel<T, Y, true> : &forward_kernel<T, Y, false>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), kOp);
  kernel<<<static_cast<unsigned>(int64_t{p.b} * p.slabs), warps * kWarp, bytes, stream>>>(p);
  check_launch(kOp);
}

template void launch_forward<float, float>(const Params&, int, bool, cudaStream_t);
template void launch_forward<__half, float>(const Params&, int, bool, cudaStream_t);
template void launch_forward<__half, __half>(const Params&, int, bool, cudaStream_t);
template void launch_forward<__nv_bfloat16, float>(const Params&, int, bool, cudaStream_t);
template void launch_forward<__nv_bfloat16, __nv_bfloat16>(const Params&, int, bool, cudaStream_t);

}  // namespace scan::route
