// How a block goes through its steps: tokens, rows of features and the numbers [dt, B, C] on their way to the lanes.
#pragma once

#include "route_tile.cuh"

namespace scan::route {

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

// The lane's own copy in shared memory of the rows of a (b, l, d) tensor at its positions, for two steps: it is filled a
// step ahead, costs no registers meanwhile, and no other thread touches it. (2, warps, 8, lane) pairs.
template <typename T>
struct Ahead {
  Two<T>* buffer;

  __device__ __forceinline__ Two<T>* slot(int number) const {
    return buffer + number % 2 * (blockDim.x * kSteps) + threadIdx.x / kWarp * (kWarp * kSteps) + threadIdx.x % kWarp;
  }

  __device__ __forceinline__ void fetch(const T* from, const Steps& s, const Lane& at, int number) const {
    Two<T>* const to = slot(number);
    if (s.whole) {
#pragma unroll
      for (int j = 0; j < kSteps; ++j) ptx::copy_async<sizeof(Two<T>)>(to + j * kWarp, from + s.offset[j]);
    } else {
#pragma unroll
      for (int j = 0; j < kSteps; ++j) {
        if (at.first && j < s.count) {
          ptx::copy_async<sizeof(Two<T>)>(to + j * kWarp, from + s.offset[j]);
        } else {
          to[j * kWarp] = narrow<T>(make_float2(0.f, 0.f));
        }
      }
    }
  }
};

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
      const int row = p.select[static_cast<int64_t>(step.image) * p.select_row + step.route % p.columns];
      const bool reversed = (p.reverse >> step.route) & 1;
      const int* from = p.tables + static_cast<int64_t>(row) * p.l + (reversed ? p.l - 1 - position : position);
      ptx::copy_async<4>(tokens + step.number % kTokens * kChunk + i, from);
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
    if constexpr (kPair) {
      for (int i = threadIdx.x; i < count(); i += blockDim.x) {
        int position, column;
        decode(i, position, column);
        ptx::copy_async<sizeof(Two<T>)>(raw + i, source(step, position, column));
      }
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
    ptx::wait_all_async();
    __syncthreads();
    fetch_rows(first);
    ptx::wait_all_async();
    place_rows(first);
  }
};

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

}  // namespace scan::route
