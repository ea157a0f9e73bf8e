// Forward pass of the route scan on the GPU, in one launch.
//
// A block holds up to 8 warps = 64 channels of one image and walks its routes one after the other, each in chunks of 64
// positions with the state in registers. The sum over the routes grows where y is written; x and y stay near in L2.
#include "route_tile.cuh"

namespace scan::route {
namespace {

constexpr int kForwardCopies = 2;  // this step's rows and the next one's

// One chunk: the route's output without D x, and the states passed on. In: carry, the first state's value that enters.
// `fetch` starts the reading of what earlier routes left at the tokens.
template <typename T, bool kPair, typename Fetch>
__device__ __forceinline__ void walk_chunk(const Params& p, const float* rows, const Route& r, const Step& step,
                                           const Lane& at, const Two<T> (&x)[kSteps], Pairs& y, float2& carry,
                                           Fetch&& fetch) {
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
      const float2 v = widen(x[j]);
      const float B = gates<kPair>(p, gate, j, i).x;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        decay[j][c] = fast_exp2(length[j][c] * (c ? A.y : A.x));
        gain[j][c] = length[j][c] * ((c ? v.y : v.x) * B);
        state[c] = fmaf(decay[j][c], state[c], gain[j][c]);
        product[c] *= decay[j][c];
      }
    }
    if (i == 0) fetch();
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

template <typename T, typename Y, bool kPair>
__global__ void __launch_bounds__(kForwardWarps* kWarp, kForwardBlocks)
    forward_kernel(const __grid_constant__ Params p) {
  extern __shared__ float rows[];
  int* tokens = reinterpret_cast<int*>(rows + kForwardCopies * p.rows);
  const Stage<T, kPair> stage{p, rows, tokens, reinterpret_cast<Two<T>*>(tokens + kTokens * kChunk), kForwardCopies};
  const int image = blockIdx.x / p.slabs, slab = blockIdx.x % p.slabs;
  const Lane at = make_lane(p, slab);
  const bool all_channels = (slab + 1) * static_cast<int>(blockDim.x / kWarp) * kStrip <= p.d;
  const int64_t offset = static_cast<int64_t>(image) * p.l * p.d + at.channel;
  const T* features = static_cast<const T*>(p.x) + offset;
  Y* sum = static_cast<Y*>(p.y) + offset;
  float2 carry;
  Route r;
  Step step{image, 0, 0, 0};
  stage.start(step, next(p, step), p.k * p.chunks > 1);
  for (; step.route < p.k; step = next(p, step)) {
    const Step after = next(p, step), later = next(p, after);
    if (step.chunk == 0) r = make_route<kPair>(p, step, at), carry = make_float2(0.f, 0.f);
    const auto steps = [&] { return make_steps<kPair>(p, tokens, step, at.g, all_channels); };
    Two<T> x[kSteps];
    load_rows<kPair>(features, steps(), at, x);
    __syncthreads();  // this step's rows and the next one's tokens are there, older ones are free
    if (after.route < p.k) stage.fetch_rows(after);
    if (later.route < p.k) stage.fetch_tokens(later);
    // On the first route y is D x plus its output, on the others what is there plus its output.
    Pairs y;
    Two<Y> base[kSteps];
    walk_chunk<T, kPair>(p, rows + step.number % kForwardCopies * p.rows, r, step, at, x, y, carry, [&] {
      if (r.start) {
        load_rows<kPair>(features, steps(), at, x);
#pragma unroll
        for (int j = 0; j < kSteps; ++j) base[j] = narrow<Y>(widen(x[j]));
      } else {
        load_rows<kPair>(static_cast<const Y*>(sum), steps(), at, base);
      }
    });
    const float2 factor = r.start ? sum_D(p, at) : make_float2(1.f, 1.f);
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      y[j][0] = fmaf(factor.x, widen(base[j]).x, y[j][0]);
      y[j][1] = fmaf(factor.y, widen(base[j]).y, y[j][1]);
    }
    store_rows<kPair>(sum, steps(), at, y);
    wait_async();
    if (after.route < p.k) stage.place_rows(after);
  }
}

}  // namespace

template <typename T, typename Y>
void launch_forward(const Params& p, int warps, bool pair, cudaStream_t stream) {
  const int bytes = stage_bytes(p, kForwardCopies, sizeof(T));
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
