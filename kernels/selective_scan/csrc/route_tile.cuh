// Tiles of the route scan on the GPU: 64 positions x 8 channels per warp, and the pieces both directions share.
//
// Lane (g, q) = (lane / 4, lane % 4) of a warp owns the positions 8g .. 8g+7 of a chunk and the channels 2q, 2q+1 of
// the warp's strip: the accumulator layout of mma.m16n8k8 if its row g is position 8g + 2m and row g + 8 position
// 8g + 2m + 1, m = 0 .. 3. So delta comes out of the tensor cores in place. "Row" j of a chunk is position 8g + j.
//
// Units: z and delta are kept in units of log2, L = log2(1 + 2^z), so exp(delta A) = 2^(A L) and delta = ln2 L; the
// factor log2(e) is folded into the weight and bias, ln2 into B.
#pragma once

#include "common.cuh"
#include "route.h"

namespace scan::route {

constexpr int kSteps = 8;   // consecutive positions of a lane
constexpr int kStrip = 8;   // channels of a warp
constexpr int kWarp = 32;
constexpr int kTokens = 4;  // steps whose tokens are kept
constexpr int kForwardWarps = 8, kForwardBlocks = 3;    // warps of a block at most, blocks at a time
constexpr int kBackwardWarps = 12, kBackwardBlocks = 1;
constexpr unsigned kAll = 0xffffffffu;

using Pairs = float[kSteps][2];  // one number per position and channel of a lane

// Two adjacent features as they lie in memory.
template <typename T>
struct PairType;
template <>
struct PairType<float> {
  using type = float2;
};
template <>
struct PairType<__half> {
  using type = __half2;
};
template <>
struct PairType<__nv_bfloat16> {
  using type = __nv_bfloat162;
};
template <typename T>
using Two = typename PairType<T>::type;

__device__ __forceinline__ float2 widen(float2 v) { return v; }
__device__ __forceinline__ float2 widen(__half2 v) { return __half22float2(v); }
__device__ __forceinline__ float2 widen(__nv_bfloat162 v) { return __bfloat1622float2(v); }
template <typename T>
__device__ __forceinline__ Two<T> narrow(float2 v);
template <>
__device__ __forceinline__ float2 narrow<float>(float2 v) { return v; }
template <>
__device__ __forceinline__ __half2 narrow<__half>(float2 v) { return __float22half2_rn(v); }
template <>
__device__ __forceinline__ __nv_bfloat162 narrow<__nv_bfloat16>(float2 v) {
  return __float22bfloat162_rn(v);
}

struct Params {
  const void* x;           // (b, l, d)
  const void* proj;        // (b, l, k, m)
  const float4* expand;    // (k, strips, kt, 32): fragments of dt_weight, see pack_kernel
  const float4* contract;  // (k, strips, kt, 32): the same weights for the gradient of dt
  const float* bias;       // (k, 8 strips)
  const float* A;          // (k, d, n)
  const float* D;          // (8 strips): the sum over the routes
  const int* tables;       // (t, l)
  const int* select;       // (b, columns) or (1, columns); route i takes column i modulo columns
  float* states;           // (b, k, chunks - 1, n, d): the state that crosses each border of two chunks
  float* adjoints;         // (b, k, n, d): the same of the backward recurrence at the border just crossed
  void* y;                 // (b, l, d); dx in the backward pass
  const void* dy;          // (b, l, d)
  void* dproj;             // (b, l, k, m), or with several slabs (slabs, b, l, k, m) in float32
  float* dweights;         // (groups, k, d, r + 2 + n): sums of dt_weight, dt_bias, D, A over a group of images
  int b, l, d, k, r, n, m;
  int chunks, strips, slabs, kt, rows, group;  // rows: floats of a chunk's numbers in shared memory
  int columns, select_row;  // of select: its columns, and how far rows are apart, 0 where one row serves all images
  unsigned reverse;  // bit i: route i is reversed
  unsigned magic;    // 2^32 / (loads per row of proj), rounded up
};

struct Lane {
  int g, q, lane, warp;
  int channel;         // the first of two
  bool first, second;  // which of the two exist
};

__device__ __forceinline__ Lane make_lane(const Params& p, int slab) {
  Lane a;
  a.lane = threadIdx.x % kWarp;
  a.warp = threadIdx.x / kWarp;
  a.g = a.lane / 4;
  a.q = a.lane % 4;
  a.channel = (slab * (blockDim.x / kWarp) + a.warp) * kStrip + 2 * a.q;
  a.first = a.channel < p.d;
  a.second = a.channel + 1 < p.d;
  return a;
}

// ---- two adjacent numbers in memory; kPair promises an even address and an even count ----

template <bool kPair, typename T>
__device__ __forceinline__ Two<T> load_raw(const T* at, bool first, bool second) {
  Two<T> v = narrow<T>(make_float2(0.f, 0.f));
  if (kPair) {
    if (first) v = *reinterpret_cast<const Two<T>*>(at);
  } else {
    if (first) v.x = at[0];
    if (second) v.y = at[1];
  }
  return v;
}

template <bool kPair, typename T>
__device__ __forceinline__ float2 load_pair(const T* at, bool first, bool second) {
  return widen(load_raw<kPair>(at, first, second));
}

template <bool kPair, typename T>
__device__ __forceinline__ void store_pair(T* at, float2 v, bool first, bool second) {
  if (kPair) {
    if (first) *reinterpret_cast<Two<T>*>(at) = narrow<T>(v);
  } else {
    if (first) at[0] = from_float<T>(v.x);
    if (second) at[1] = from_float<T>(v.y);
  }
}

__device__ __forceinline__ float2 load_two(const float* at) {
  return *reinterpret_cast<const float2*>(at);
}

// ---- arithmetic ----

// With kFull, a is any float32, else it has no more than tf32 holds. b = (high, high, low, low); kLow: use the low half.
template <bool kFull, bool kLow>
__device__ __forceinline__ void mma_split(float (&c)[4], const float (&a)[4], float4 b) {
  if (kFull) {
    float high[4], low[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      high[i] = ptx::round_tf32(a[i]);
      low[i] = a[i] - high[i];
    }
    ptx::mma_tf32(c, low, b.x, b.y);
    ptx::mma_tf32(c, high, b.z, b.w);
    ptx::mma_tf32(c, high, b.x, b.y);
  } else {
    if (kLow) ptx::mma_tf32(c, a, b.z, b.w);
    ptx::mma_tf32(c, a, b.x, b.y);
  }
}

// log2(1 + 2^z) = max(z, 0) + u P(u) with u = 2^-|z| in (0, 1]; P is the minimax polynomial of log2(1 + u) / u, to a
// relative error of 2e-7 (kFull) or 1.3e-6. It spares a special-function call and stays exact where delta is small.
template <bool kFull>
__device__ __forceinline__ float softplus2(float z, float& u) {
  u = ptx::exp2_approx(-fabsf(z));
  float s;
  if (kFull) {
    s = fmaf(-1.231947407e-02f, u, 6.360789395e-02f);
    s = fmaf(s, u, -1.553518745e-01f);
    s = fmaf(s, u, 2.560097190e-01f);
    s = fmaf(s, u, -3.533948276e-01f);
    s = fmaf(s, u, 4.800636965e-01f);
    s = fmaf(s, u, -7.213100882e-01f);
    s = fmaf(s, u, 1.442694761e+00f);
  } else {
    s = fmaf(2.040118531e-02f, u, -9.579754896e-02f);
    s = fmaf(s, u, 2.152845460e-01f);
    s = fmaf(s, u, -3.390890291e-01f);
    s = fmaf(s, u, 4.776683787e-01f);
    s = fmaf(s, u, -7.211594744e-01f);
    s = fmaf(s, u, 1.442693211e+00f);
  }
  return fmaf(s, u, fmaxf(z, 0.f));
}

// Each lane's positions map a state s to decay s + gain. Gives the state that enters the lane's positions and the one
// that leaves the chunk, walking the lanes' g upwards (kUp) or downwards from `carry`.
template <bool kUp>
__device__ __forceinline__ void join_lanes(float decay, float gain, float carry, int g, float& enter, float& leave) {
#pragma unroll
  for (int step = 1; step < kSteps; step *= 2) {
    const float before = kUp ? __shfl_up_sync(kAll, decay, 4 * step) : __shfl_down_sync(kAll, decay, 4 * step);
    const float state = kUp ? __shfl_up_sync(kAll, gain, 4 * step) : __shfl_down_sync(kAll, gain, 4 * step);
    if (kUp ? g >= step : g + step < kSteps) {
      gain = fmaf(decay, state, gain);
      decay *= before;
    }
  }
  const float after = fmaf(decay, carry, gain);
  const float before = kUp ? __shfl_up_sync(kAll, after, 4) : __shfl_down_sync(kAll, after, 4);
  enter = (kUp ? g == 0 : g == kSteps - 1) ? carry : before;
  leave = __shfl_sync(kAll, after, (threadIdx.x & 3) + (kUp ? 28 : 0));
}

// ---- shared memory, in bytes ----

constexpr int kForwardCopies = 2;   // the rows of this step and of the next
constexpr int kBackwardCopies = 3;  // and of the step before
constexpr int kTile = kChunk * kStrip;

// Floats of a chunk's numbers [dt, B, C].
inline int64_t row_floats(int64_t kt, int64_t n) { return 8 * kChunk * kt + 2 * kChunk * n; }

inline int64_t stage_bytes(int64_t floats, int64_t m, int copies, int64_t size) {
  return (copies * floats + kTokens * kChunk) * 4 + kChunk * m * size;
}

// size, y_size: bytes of a feature and of an output.
inline int64_t forward_bytes(int64_t floats, int64_t m, int warps, bool pair, int64_t size, int64_t y_size) {
  const int64_t ahead = pair ? 2 * kTile * warps * (size + y_size) : 0;
  return stage_bytes(floats, m, kForwardCopies, size) + ahead;
}

inline int64_t backward_bytes(int64_t floats, int64_t m, int warps, int64_t size) {
  return stage_bytes(floats, m, kBackwardCopies, size) + 4 * warps * kTile * 4;
}

// ---- launches (route_forward.cu, route_backward.cu, route_pack.cu) ----

struct Gradients {
  void* dproj;  // (b, l, k, m)
  float *weight, *bias, *A, *D;
};

// The form of lane.cuh, on tensors that `takes_lanes` accepts.
bool takes_lanes(const Inputs& in, bool out_float);
ForwardResult forward_lanes(const Inputs& in);
BackwardResult backward_lanes(const Inputs& in, const Tensor& dy, const Tensor& states);

template <typename T, typename Y>
void launch_forward(const Params& p, int warps, bool pair, cudaStream_t stream);
template <typename T, typename Y>
void launch_backward(const Params& p, int warps, bool pair, cudaStream_t stream);
template <typename T>
void launch_sums(const Params& p, const Gradients& to, int groups, cudaStream_t stream);
void launch_pack(const float* weight, const float* bias, const float* D, const Params& p, cudaStream_t stream);

}  // namespace scan::route
