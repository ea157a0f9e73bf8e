// The route scan in half precision with one state: a lane walks its own channels through the sequence by itself.
//
// A warp holds a strip of 32 or 64 channels (1 or 2 a lane) on one route of one image and takes 16 positions at a time.
// delta comes out of the tensor cores: a tile of 16 positions by 16 ranks times the strip's weights, which lie ready as
// fragments, high and low half; shared memory turns the tile so that each lane finds its own channels. From there on
// nothing crosses lanes but the gradients of B, C and dt.
//
// Routes come in pairs, one forwards and one backwards over the same row of tables. Both are walked at the same time
// from the two ends; each adds its output to the token's row where the other has been before, so the sum over the pair
// needs no second tensor. A barrier in the middle keeps the two apart.
//
// Units as in route_tile.cuh: z and L = log2(1 + 2^z) in log2, exp(delta A) = 2^(A L), ln2 folded into B.
#pragma once

#include "route_tile.cuh"

namespace scan::route::lane {

constexpr int kRows = 16;       // positions of a chunk
constexpr int kMaxGroup = 3;    // warps of one direction in a block
constexpr int kMaxTiles = 6;    // of 8 ranks
constexpr int kSumTiles = 2;    // up to so many the gradient of dt_weight is summed here, else dz is written for it

// What a lane keeps of one row: 1 or 2 adjacent numbers, in memory and as float32.
template <typename T, int kC>
struct RawType {
  using type = Two<T>;
};
template <typename T>
struct RawType<T, 1> {
  using type = T;
};
template <typename T, int kC>
using Raw = typename RawType<T, kC>::type;

template <typename T>
__device__ __forceinline__ void unpack(Two<T> raw, float (&v)[2]) {
  const float2 pair = widen(raw);
  v[0] = pair.x, v[1] = pair.y;
}
template <typename T>
__device__ __forceinline__ void unpack(T raw, float (&v)[1]) {
  v[0] = to_float(raw);
}
template <typename T>
__device__ __forceinline__ Two<T> pack(const float (&v)[2]) {
  return narrow<T>(make_float2(v[0], v[1]));
}
template <typename T>
__device__ __forceinline__ T pack(const float (&v)[1]) {
  return from_float<T>(v[0]);
}

template <int kC>
__device__ __forceinline__ void load_floats(const float* from, bool active, float (&v)[kC]) {
#pragma unroll
  for (int c = 0; c < kC; ++c) v[c] = active ? from[c] : 0.f;
}

struct Params {
  const void* x;          // (b, l, d)
  const void* proj;       // (b, l, k, m)
  const uint4* expand;    // (k, strips, tiles, steps, 32): weights for z, high and low
  const uint2* contract;  // (k, strips, tiles / 2, rank tiles, 32): the same for the gradient of dt
  const float* bias;      // (k, channels of all strips), times log2(e)
  const float *A, *D;     // (k, d)
  const int* tables;      // (t, l)
  const int* select;      // (b, k / 2) or (1, k / 2)
  float* states;          // (b, k, chunks - 1, d): what enters each chunk but the first of the walk
  void* y;                // (b, l, d); dx in the backward pass
  const void* dy;         // (b, l, d)
  void* dproj;            // (b, l, k, m), or with several slabs (slabs, b, l, k, m) in float32
  void* dz;               // (b, l, k, d), or none
  float* dweights;        // (b, k, d, columns): sums over an image: dt_weight (or none of it), dt_bias, D, A
  int b, l, d, k, r, m, chunks, strips, group, slabs, columns;
  int select_row;         // k / 2, or 0 where one row serves all images
};

// ---- tensor cores ----

template <typename T>
__device__ __forceinline__ void mma16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);
template <>
__device__ __forceinline__ void mma16<__half>(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma16<__nv_bfloat16>(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ unsigned shared_address(const void* at) {
  return static_cast<unsigned>(__cvta_generic_to_shared(at));
}

// A fragment (16 x 16) of a tile in shared memory, `at` the lane's row: rows lane % 16, columns 8 (lane / 16).
__device__ __forceinline__ void load_matrix(unsigned (&a)[4], const void* at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(shared_address(at))
               : "memory");
}
__device__ __forceinline__ void load_transposed(unsigned (&a)[4], const void* at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(shared_address(at))
               : "memory");
}
__device__ __forceinline__ void load_transposed(unsigned (&b)[2], const void* at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(b[0]), "=r"(b[1])
               : "r"(shared_address(at))
               : "memory");
}

// ---- a warp's shared memory ----

template <int kC, int kK>
struct Shape {
  static constexpr int kWidth = 32 * kC;      // channels of a strip
  static constexpr int kTiles = 4 * kC;       // of 8 channels
  static constexpr int kPitch = 16 * kK + 8;  // of a row of proj: an odd number of 16 bytes keeps the banks apart
  static constexpr int kWide = kWidth + 8;    // of a row of z and of dz
};

template <typename T, int kC>
using Tile = T[kRows][Shape<kC, 1>::kWidth];  // rows of a tensor (positions, channels of the strip)

template <typename T, int kC, int kK>
struct alignas(16) Memory {
  using S = Shape<kC, kK>;
  T rows[2][kRows][S::kPitch];  // of proj, by the number of the step modulo 2
  float z[kRows][S::kWide];
  float2 gates[kRows];  // ln2 B, C
  int tokens[4][kRows];
  Tile<T, kC> x[2], sum;  // x by the number of the step; sum: the output so far, then the new one
};

// ---- where a warp is ----

struct Walk {
  int image, direction, strip, lane, channel;
  bool active;  // whether the lane's channels exist
};

// A chunk of a route; `index` counts the chunks in the order of the walk, forwards also in the backward pass.
struct Step {
  int pair, index, number;
};

__device__ __forceinline__ Walk make_walk(const Params& p, int width) {
  Walk w;
  const int warp = threadIdx.x / kWarp;
  w.lane = threadIdx.x % kWarp;
  w.image = blockIdx.x / p.slabs;
  w.direction = warp / p.group;
  w.strip = blockIdx.x % p.slabs * p.group + warp % p.group;
  w.channel = w.strip * width + w.lane * (width / kWarp);
  w.active = w.channel < p.d;
  return w;
}

__device__ __forceinline__ int route_of(const Params& p, const Walk& w, const Step& s) {
  return s.pair + w.direction * (p.k / 2);
}
// The chunk of the table, counted forwards for both directions.
__device__ __forceinline__ int chunk_of(const Params& p, const Walk& w, const Step& s) {
  return w.direction ? p.chunks - 1 - s.index : s.index;
}
// Position j of a walk's chunk, in the table.
__device__ __forceinline__ int position_of(const Params& p, const Walk& w, const Step& s, int j) {
  return chunk_of(p, w, s) * kRows + (w.direction ? kRows - 1 - j : j);
}
// Whether all positions exist; only the table's last chunk can lack some.
__device__ __forceinline__ bool is_whole(const Params& p, const Walk& w, const Step& s) {
  return (chunk_of(p, w, s) + 1) * kRows <= p.l;
}
// Chunks of the table that the forward direction takes before the barrier in the middle.
__device__ __forceinline__ int middle(const Params& p) { return p.chunks / 2; }

// Where the numbers of a channel and a route lie in A, D and the sums.
__device__ __forceinline__ int64_t channel_of(const Params& p, const Walk& w, const Step& s) {
  return static_cast<int64_t>(route_of(p, w, s)) * p.d + w.channel;
}
__device__ __forceinline__ int64_t states_of(const Params& p, const Walk& w, const Step& s) {
  const int64_t row = static_cast<int64_t>(w.image) * p.k + route_of(p, w, s);
  return (row * (p.chunks - 1) + s.index - 1) * p.d + w.channel;
}
__device__ __forceinline__ int64_t proj_row(const Params& p, const Walk& w, const Step& s, int token) {
  return (static_cast<int64_t>(w.image) * p.l + token) * p.k + route_of(p, w, s);
}

// ---- rows between the device's memory and a warp's ----

__device__ __forceinline__ void copy_word(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

// Waits for all copies but the last `kLeft` groups of them.
template <int kLeft>
__device__ __forceinline__ void wait_async() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
  __syncwarp();
}
__device__ __forceinline__ void commit_async() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// The tokens of a step, in the order of the walk; a position past the end has the table's last token.
template <typename M>
__device__ __forceinline__ void fetch_tokens(const Params& p, const Walk& w, const Step& s, M& memory) {
  if (w.lane < kRows) {
    const int row = p.select[static_cast<int64_t>(w.image) * p.select_row + s.pair];
    const int position = min(position_of(p, w, s, w.lane), p.l - 1);
    copy_word(&memory.tokens[s.number % 4][w.lane], p.tables + static_cast<int64_t>(row) * p.l + position);
  }
}

// The step's rows of proj: two lanes a row, pairs of numbers where their count is even.
template <typename T, typename M>
__device__ __forceinline__ void fetch_proj(const Params& p, const Walk& w, const Step& s, M& memory) {
  const int row = w.lane / 2, odd = w.lane % 2;
  const T* from = static_cast<const T*>(p.proj) + proj_row(p, w, s, memory.tokens[s.number % 4][row]) * p.m;
  T* to = memory.rows[s.number % 2][row];
  if (p.m % 2 == 0) {
    for (int i = 2 * odd; i < p.m; i += 4) copy_word(to + i, from + i);
  } else {
    for (int i = odd; i < p.m; i += 2) to[i] = from[i];
  }
}

// Calls f(row, channel of the strip, address in the device's memory) for each 16 bytes of a tile that this lane moves;
// rows are stride numbers apart.
template <int kC, typename T, typename M, typename Function>
__device__ __forceinline__ void each_part(const Params& p, const Walk& w, const Step& s, const M& memory, T* image,
                                          int64_t stride, Function&& f) {
  constexpr int kParts = 4 * kC;  // of a row
  const int part = w.lane % kParts * 8;
  if (w.strip * 32 * kC + part >= p.d) return;
#pragma unroll
  for (int i = 0; i < kRows * kParts / kWarp; ++i) {
    const int row = i * (kWarp / kParts) + w.lane / kParts;
    f(row, part, image + memory.tokens[s.number % 4][row] * stride + part);
  }
}

template <int kC, typename T, typename M>
__device__ __forceinline__ void fetch_tile(const Params& p, const Walk& w, const Step& s, const M& memory,
                                           const T* image, Tile<T, kC>& to) {
  each_part<kC>(p, w, s, memory, image, p.d, [&](int row, int part, const T* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(&to[row][part])), "l"(from)
                 : "memory");
  });
}

// row(j): the numbers of position j in shared memory. Positions past the end are not stored.
template <int kC, typename T, typename M, typename Rows>
__device__ __forceinline__ void store_tile(const Params& p, const Walk& w, const Step& s, const M& memory,
                                           Rows&& row_at, T* image, int64_t stride) {
  const bool whole = is_whole(p, w, s);
  each_part<kC>(p, w, s, memory, image, stride, [&](int row, int part, T* to) {
    if (whole || position_of(p, w, s, row) < p.l) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(&row_at(row)[part]);
    }
  });
}

// A lane's numbers in a row of a tile.
template <int kC, typename T>
__device__ __forceinline__ Raw<T, kC>& lane_of(T (&row)[32 * kC], int lane) {
  return reinterpret_cast<Raw<T, kC>*>(row)[lane];
}

// Numbers that an absent lane or a product reads without ever having been written must be finite.
template <typename M>
__device__ __forceinline__ void clear(M& memory) {
  int* words = reinterpret_cast<int*>(&memory);
  for (int i = threadIdx.x % kWarp; i < static_cast<int>(sizeof(M) / 4); i += kWarp) words[i] = 0;
  __syncwarp();
}

// ---- z and the gates of a chunk, for all lanes of the warp ----

// This lane's fragments of the weights that give z.
__device__ __forceinline__ const uint4* weights_of(const Params& p, const Walk& w, const Step& s, int count) {
  const int64_t strip = static_cast<int64_t>(route_of(p, w, s)) * p.strips + w.strip;
  return p.expand + strip * count * kWarp + w.lane;
}

// z without the bias; minus infinity, where delta vanishes and the state stays as it is, past the end of the table.
// weight(i): fragment i of the lane.
template <typename T, int kC, int kK, typename M, typename Weights>
__device__ __forceinline__ void expand(const Params& p, const Walk& w, const Step& s, M& memory, Weights&& weight) {
  using S = Shape<kC, kK>;
  const int g = w.lane / 4, q = w.lane % 4;
  const T(&rows)[kRows][S::kPitch] = memory.rows[s.number % 2];
  unsigned a[kK][4];
#pragma unroll
  for (int k = 0; k < kK; ++k) load_matrix(a[k], &rows[w.lane % 16][16 * k + w.lane / 16 * 8]);
#pragma unroll
  for (int t = 0; t < S::kTiles; ++t) {
    float c[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int k = 0; k < kK; ++k) {
      const uint4 b = weight(t * kK + k);
      mma16<T>(c, a[k], b.z, b.w);
      mma16<T>(c, a[k], b.x, b.y);
    }
    *reinterpret_cast<float2*>(&memory.z[g][8 * t + 2 * q]) = make_float2(c[0], c[1]);
    *reinterpret_cast<float2*>(&memory.z[g + 8][8 * t + 2 * q]) = make_float2(c[2], c[3]);
  }
  if (w.lane < kRows) {
    const T* gates = rows[w.lane] + p.r;
    memory.gates[w.lane] = make_float2(to_float(gates[0]) * kLn2, to_float(gates[1]));
  }
  __syncwarp();
  if (!is_whole(p, w, s)) {
    for (int j = 0; j < kRows; ++j) {
      if (position_of(p, w, s, j) < p.l) continue;
#pragma unroll
      for (int c = 0; c < kC; ++c) memory.z[j][kC * w.lane + c] = -INFINITY;
    }
  }
}

// ---- what a lane holds of its route ----

template <int kC>
struct Route {
  float bias[kC], A[kC], D[kC], carry[kC];  // carry: the state, or its adjoint
};

template <int kC>
__device__ __forceinline__ Route<kC> make_route(const Params& p, const Walk& w, const Step& s) {
  Route<kC> r;
  const int64_t at = channel_of(p, w, s), padded = static_cast<int64_t>(p.strips) * 32 * kC;
  load_floats<kC>(p.bias + route_of(p, w, s) * padded + w.channel, true, r.bias);
  load_floats<kC>(p.A + at, w.active, r.A);
  load_floats<kC>(p.D + at, w.active, r.D);
#pragma unroll
  for (int c = 0; c < kC; ++c) r.carry[c] = 0.f;
  return r;
}

// Calls f with the sizes (channels a lane, tiles of 8 ranks) as types.
template <typename Function>
void with_shape(int channels, int ranks, Function&& f) {
  const auto with_ranks = [&](auto c) {
    if (ranks <= 1) return f(c, std::integral_constant<int, 1>{});
    if (ranks <= 2) return f(c, std::integral_constant<int, 2>{});
    if (ranks <= 4) return f(c, std::integral_constant<int, 4>{});
    return f(c, std::integral_constant<int, kMaxTiles>{});
  };
  channels == 1 ? with_ranks(std::integral_constant<int, 1>{}) : with_ranks(std::integral_constant<int, 2>{});
}

// ---- launches (lane_forward.cu, lane_backward.cu, lane_pack.cu) ----

template <typename T>
void launch_forward(const Params& p, int channels, int ranks, cudaStream_t stream);
template <typename T>
void launch_backward(const Params& p, int channels, int ranks, cudaStream_t stream);
template <typename T>
void launch_pack(const float* weight, const float* bias, const Params& p, int channels, int ranks,
                 cudaStream_t stream);

}  // namespace scan::route::lane
