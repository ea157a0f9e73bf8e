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
  const float* D;          // (k, d)
  const int* tables;       // (t, l)
  const int* select;       // (b, k) or (1, k)
  float* states;           // (b, k, chunks - 1, n, d): the state that crosses each border of two chunks
  float* adjoints;         // (b, k, n, d): the same of the backward recurrence at the border just crossed
  void* y;                 // (b, l, d); dx in the backward pass
  const void* dy;          // (b, l, d)
  void* dproj;             // (b, l, k, m), or with several slabs (slabs, b, l, k, m) in float32
  float* dweights;         // (groups, k, d, r + 2 + n): sums of dt_weight, dt_bias, D, A over a group of images
  int b, l, d, k, r, n, m;
  int chunks, strips, slabs, kt, rows, group;  // rows: floats of a chunk's numbers in shared memory
  int select_row;    // k, or 0 where one row serves all images
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

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float round_tf32(float x) {
  unsigned y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return __uint_as_float(y);
}

// c (16 x 8) += a (16 x 8) b (8 x 8) on the tensor cores, operands cut to tf32.
__device__ __forceinline__ void mma(float (&c)[4], const float (&a)[4], float b0, float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
        "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

// With kFull, a is any float32, else it has no more than tf32 holds. b = (high, high, low, low); kLow: use the low half.
template <bool kFull, bool kLow>
__device__ __forceinline__ void mma_split(float (&c)[4], const float (&a)[4], float4 b) {
  if (kFull) {
    float high[4], low[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      high[i] = round_tf32(a[i]);
      low[i] = a[i] - high[i];
    }
    mma(c, low, b.x, b.y);
    mma(c, high, b.z, b.w);
    mma(c, high, b.x, b.y);
  } else {
    if (kLow) mma(c, a, b.z, b.w);
    mma(c, a, b.x, b.y);
  }
}

// log2(1 + 2^z) = max(z, 0) + u P(u) with u = 2^-|z| in (0, 1]; P is the minimax polynomial of log2(1 + u) / u, to a
// relative error of 2e-7 (kFull) or 1.3e-6. It spares a special-function call and stays exact where delta is small.
template <bool kFull>
__device__ __forceinline__ float softplus2(float z, float& u) {
  u = fast_exp2(-fabsf(z));
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

// ---- a route of an image, and a chunk's tokens on it ----

// One step of a block: a chunk on a route of an image. Steps are numbered through; a step's data lies in shared memory
// at its number modulo the copies there are.
struct Step {
  int image, route, chunk, number;
};

// What a lane holds of a route.
struct Route {
  bool start;            // the first route of the image to be walked
  const float4* expand;  // this lane's fragments of the warp's strip
  float* states;         // the borders of this image and route, at the lane's channel
  float4 weight;         // the first fragment
  float2 bias, A;        // of the lane's channels, A of the first state
};

template <bool kPair>
__device__ __forceinline__ float2 load_A(const Params& p, int route, int i, const Lane& a) {
  const float* at = p.A + (static_cast<int64_t>(route) * p.d + a.channel) * p.n + i;
  if (kPair) return load_pair<true>(at, a.first, a.second);
  return make_float2(a.first ? at[0] : 0.f, a.second ? at[p.n] : 0.f);
}

template <bool kPair>
__device__ __forceinline__ Route make_route(const Params& p, const Step& step, const Lane& at) {
  Route r;
  r.start = step.route == 0;
  const int64_t strip = static_cast<int64_t>(step.route) * p.strips + at.channel / kStrip;
  r.expand = p.expand + strip * p.kt * kWarp + at.lane;
  r.weight = *r.expand;
  const int64_t row = static_cast<int64_t>(step.image) * p.k + step.route;
  r.states = p.states + row * (p.chunks - 1) * p.n * p.d + at.channel;
  r.bias = load_two(p.bias + strip * kStrip + 2 * at.q);
  r.A = load_A<kPair>(p, step.route, 0, at);
  return r;
}

// The lane's positions of a chunk: where their tokens begin in the image, and how many exist. `whole`: all of the
// block's positions and channels exist.
struct Steps {
  unsigned offset[kSteps];
  int count;
  bool whole;
};

template <bool kPair>
__device__ __forceinline__ Steps make_steps(const Params& p, const int* tokens, const Step& step, int g,
                                            bool all_channels) {
  Steps s;
  s.count = min(max(p.l - step.chunk * kChunk - g * kSteps, 0), kSteps);
  s.whole = kPair && all_channels && (step.chunk + 1) * kChunk <= p.l;
  const int4* at = reinterpret_cast<const int4*>(tokens + step.number % kTokens * kChunk + g * kSteps);
  const int4 low = at[0], high = at[1];
  const int v[kSteps] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int j = 0; j < kSteps; ++j) s.offset[j] = v[j] * p.d;
  return s;
}

// Reads the rows of an image at the tokens; zero where position or channel do not exist.
template <bool kPair, typename T>
__device__ __forceinline__ void load_rows(const T* from, const Steps& s, const Lane& at, Two<T> (&to)[kSteps]) {
  if (s.whole) {
#pragma unroll
    for (int j = 0; j < kSteps; ++j) to[j] = load_raw<true>(from + s.offset[j], true, true);
  } else {
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      to[j] = load_raw<kPair>(from + s.offset[j], at.first && j < s.count, at.second && j < s.count);
    }
  }
}

template <bool kPair, typename T>
__device__ __forceinline__ void store_rows(T* to, const Steps& s, const Lane& at, const Pairs& v) {
  if (s.whole) {
#pragma unroll
    for (int j = 0; j < kSteps; ++j) store_pair<true>(to + s.offset[j], make_float2(v[j][0], v[j][1]), true, true);
  } else {
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      store_pair<kPair>(to + s.offset[j], make_float2(v[j][0], v[j][1]), at.first && j < s.count,
                        at.second && j < s.count);
    }
  }
}

// ---- a chunk's numbers [dt, B, C] in shared memory ----
//
// First dt as fragments of the left operand (m, kt, lane, 4), which `expand_dt` reads whole, padded with zeros; then
// B (times ln2) and C of each row, (64, 2n).

// Where rank c at a position lies: also the place of a number in a tile of dz, with kt = 1.
__device__ __forceinline__ int fragment(int position, int c, int kt) {
  const int m = position % 8 / 2, g = position / 8;
  return (((m * kt + c / 8) * 8 + g) * 4 + c % 8 / 2) * 4 + position % 2 + 2 * (c % 2);
}

__device__ __forceinline__ const float* gates_at(const Params& p, const float* rows, int g) {
  return rows + 512 * p.kt + g * 2 * p.n;
}

// ln2 B and C of state i; `at` as given by gates_at.
template <bool kPair>
__device__ __forceinline__ float2 gates(const Params& p, const float* at, int j, int i) {
  if (kPair) return load_two(at + 16 * j);
  return make_float2(at[16 * j * p.n + i], at[16 * j * p.n + p.n + i]);
}

template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, const void* from) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(kBytes) : "memory");
}

__device__ __forceinline__ void wait_async() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// How a step's tokens and rows of proj come to shared memory: the tokens two steps ahead, the rows one step ahead as
// they are, then each thread turns the numbers that it copied itself into float32 in their place. A thread takes every
// blockDim-th pair of numbers (single numbers, and no copy ahead, unless kPair: n = 1, r even).
template <typename T, bool kPair>
struct Stage {
  const Params& p;
  float* rows;    // (copies, p.rows)
  int* tokens;    // (kTokens, 64)
  Two<T>* raw;    // (64, m / 2)
  int copies;

  // Past the end, the token of the last position.
  __device__ __forceinline__ void fetch_tokens(const Step& step) const {
    for (int i = threadIdx.x; i < kChunk; i += blockDim.x) {
      const int position = min(step.chunk * kChunk + i, p.l - 1);
      const int row = p.select[static_cast<int64_t>(step.image) * p.select_row + step.route];
      const bool reversed = (p.reverse >> step.route) & 1;
      const int* from = p.tables + static_cast<int64_t>(row) * p.l + (reversed ? p.l - 1 - position : position);
      copy_async<4>(tokens + step.number % kTokens * kChunk + i, from);
    }
  }

  __device__ __forceinline__ int count() const { return kChunk * (kPair ? p.m / 2 : p.m); }

  __device__ __forceinline__ void decode(int i, int& position, int& column) const {
    const int loads = kPair ? p.m / 2 : p.m;
    position = __umulhi(i, p.magic);
    column = (i - position * loads) * (kPair ? 2 : 1);
  }

  __device__ __forceinline__ const T* source(const Step& step, int position, int column) const {
    const int token = tokens[step.number % kTokens * kChunk + position];
    const int64_t row = (static_cast<int64_t>(step.image) * p.l + token) * p.k + step.route;
    return static_cast<const T*>(p.proj) + row * p.m + column;
  }

  __device__ __forceinline__ void fetch_rows(const Step& step) const {
    if (!kPair) return;
    for (int i = threadIdx.x; i < count(); i += blockDim.x) {
      int position, column;
      decode(i, position, column);
      copy_async<sizeof(Two<T>)>(raw + i, source(step, position, column));
    }
  }

  // After wait_async.
  __device__ __forceinline__ void place_rows(const Step& step) const {
    float* to = rows + step.number % copies * p.rows;
    for (int i = threadIdx.x; i < count(); i += blockDim.x) {
      int position, column;
      decode(i, position, column);
      const float2 v = kPair ? widen(raw[i]) : make_float2(to_float(*source(step, position, column)), 0.f);
      if (column < p.r) {
        float* at = to + fragment(position, column, p.kt);
        at[0] = v.x;
        if (kPair) at[2] = v.y;
      } else {
        float* at = to + 512 * p.kt + (position % 8 * 8 + position / 8) * 2 * p.n + column - p.r;
        at[0] = column < p.r + p.n ? v.x * kLn2 : v.x;
        if (kPair) at[1] = v.y;
      }
    }
  }

  // The first step, and the tokens of the second. Ends with the first step's rows not yet visible to other threads.
  __device__ __forceinline__ void start(const Step& first, const Step& second, bool more) const {
    for (int i = threadIdx.x; i < copies * p.rows; i += blockDim.x) rows[i] = 0.f;
    fetch_tokens(first);
    if (more) fetch_tokens(second);
    wait_async();
    __syncthreads();
    fetch_rows(first);
    wait_async();
    place_rows(first);
  }
};

// Bytes of shared memory that a Stage takes.
inline int stage_bytes(const Params& p, int copies, int number_bytes) {
  return (copies * p.rows + kTokens * kChunk) * 4 + kChunk * p.m * number_bytes;
}

// z = log2(e) (dt_weight dt + dt_bias) for the lane's positions and channels.
template <bool kFull>
__device__ __forceinline__ void expand_dt(const Params& p, const float* rows, const Route& r, const Lane& at,
                                          Pairs& z) {
  float c[kSteps / 2][4];
#pragma unroll
  for (int m = 0; m < kSteps / 2; ++m) {
    c[m][0] = c[m][2] = r.bias.x;
    c[m][1] = c[m][3] = r.bias.y;
  }
#pragma unroll 1
  for (int t = 0; t < p.kt; ++t) {
    const float4 w = t ? r.expand[t * kWarp] : r.weight;
#pragma unroll
    for (int m = 0; m < kSteps / 2; ++m) {
      const float4 v = *reinterpret_cast<const float4*>(rows + ((m * p.kt + t) * kWarp + at.lane) * 4);
      const float a[4] = {v.x, v.y, v.z, v.w};
      mma_split<kFull, true>(c[m], a, w);
    }
  }
#pragma unroll
  for (int j = 0; j < kSteps; ++j) z[j][0] = c[j / 2][j % 2 * 2], z[j][1] = c[j / 2][j % 2 * 2 + 1];
}

// The state i that crosses the border after a chunk; zero before the first.
template <bool kPair>
__device__ __forceinline__ float2 load_border(const Params& p, const Route& r, int chunk, int i, const Lane& at) {
  if (chunk < 0) return make_float2(0.f, 0.f);
  return load_pair<kPair>(r.states + static_cast<unsigned>((chunk * p.n + i) * p.d), at.first, at.second);
}

template <bool kPair>
__device__ __forceinline__ void store_border(const Params& p, const Route& r, int chunk, int i, const Lane& at,
                                             const float (&v)[2]) {
  if (chunk + 1 < p.chunks && at.g == 0) {
    store_pair<kPair>(r.states + static_cast<unsigned>((chunk * p.n + i) * p.d), make_float2(v[0], v[1]), at.first,
                      at.second);
  }
}

// Sum of D over the routes for the lane's channels.
__device__ __forceinline__ float2 sum_D(const Params& p, const Lane& a) {
  float2 sum = make_float2(0.f, 0.f);
  for (int i = 0; i < p.k; ++i) {
    const float* at = p.D + static_cast<int64_t>(i) * p.d + a.channel;
    if (a.first) sum.x += at[0];
    if (a.second) sum.y += at[1];
  }
  return sum;
}

// ---- launches (route_forward.cu, route_backward.cu, route_pack.cu) ----

struct Gradients {
  void* dproj;  // (b, l, k, m)
  float *weight, *bias, *A, *D;
};

template <typename T, typename Y>
void launch_forward(const Params& p, int warps, bool pair, cudaStream_t stream);
template <typename T, typename Y>
void launch_backward(const Params& p, int warps, bool pair, cudaStream_t stream);
template <typename T>
void launch_sums(const Params& p, const Gradients& to, int groups, cudaStream_t stream);
void launch_pack(const float* weight, const float* bias, const Params& p, cudaStream_t stream);

}  // namespace scan::route
