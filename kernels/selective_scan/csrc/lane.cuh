// The route scan in half precision with one state: a lane walks its own channels through the sequence by itself.
//
// A warp holds a strip of 32 or 64 channels (1 or 2 a lane) on one route of one image and takes 16 positions at a time.
// delta comes out of the tensor cores: a tile of 16 positions by 16 ranks times the strip's weights, which lie ready as
// fragments, high and low half; shared memory turns the tile so that each lane finds its own channels. From there on
// nothing crosses lanes but the gradients of B, C and dt.
//
// Routes come in pairs, one forwards and one backwards over the same row of tables. Both are walked at the same time
// from the two ends; each adds its output to the token's row where the other has been before, so the sum over the pair
// needs no second tensor. A barrier in the middle keeps the two apart. Where a GPU would have few warps, two take the
// chunks of a strip in turns: each says what its chunk makes of the state, and the recurrence follows. Where there are
// still few, a long table is cut into segments, each walked by blocks of its own; a pass before (lane_probe.cu) finds
// the states that enter them.
//
// Units as in route_tile.cuh: z and L = log2(1 + 2^z) in log2, exp(delta A) = 2^(A L), ln2 folded into B.
#pragma once

#include "route_tile.cuh"

namespace scan::route::lane {

constexpr int kRows = 16;       // positions of a chunk
constexpr int kMaxGroup = 3;    // strips of a block
constexpr int kMaxRelay = 2;    // warps that take turns at a strip's chunks
constexpr int kMinSpan = 4;     // chunks of a segment, about, at least
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
  float* states;          // (b, k, slots, d): the state that enters each chunk of the table
  void* y;                // (b, l, d); dx in the backward pass
  const void* dy;         // (b, l, d)
  void* dproj;            // (b, l, k, m), or with several slabs (slabs, b, l, k, m) in float32
  void* dz;               // (b, l, k, d), or none
  float* dweights;        // (b segments relay, k, d, columns): a warp's sums: dt_weight (or none of it), dt_bias, D, A
  float2* spans;          // (b, k, segments, d): what a segment makes of the state, x state + y
  float* enter;           // (b, k, segments, d): the state that enters a segment, or its adjoint
  int b, l, d, k, r, m, strips, group, relay, slabs, columns;
  int chunks, segments;   // chunks of a segment, those past the end of the table included
  int slots;              // chunks of the table
  int pair, end_pair;     // the pairs of this launch: segments of two pairs share tokens, one has to end before the next
  int select_row;         // k / 2, or 0 where one row serves all images
};

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

// What a chunk makes of the state (x state + y), by the number of the step modulo 2. Lies behind the memories of the
// block's warps where they take turns.
template <int kC>
using Turn = float2[2][Shape<kC, 1>::kWidth];

// ---- where a warp is ----

struct Walk {
  int image, segment, direction, strip, turn, lane, channel;
  bool active;  // whether the lane's channels exist
};

// A chunk of a route; `index` counts the chunks in the order of the walk, forwards also in the backward pass.
struct Step {
  int pair, index, number;  // the pair of routes; the chunk; how many steps came before
};

// Warps: directions, then strips, then turns.
__device__ __forceinline__ Walk make_walk(const Params& p, int width) {
  Walk w;
  const int warp = threadIdx.x / kWarp;
  w.lane = threadIdx.x % kWarp;
  w.turn = warp % p.relay;
  w.image = blockIdx.x / (p.slabs * p.segments);
  w.segment = blockIdx.x / p.slabs % p.segments;
  w.direction = warp / (p.group * p.relay);
  w.strip = blockIdx.x % p.slabs * p.group + warp / p.relay % p.group;
  w.channel = w.strip * width + w.lane * (width / kWarp);
  w.active = w.channel < p.d;
  return w;
}

__device__ __forceinline__ int route_of(const Params& p, const Walk& w, const Step& s) {
  return s.pair + w.direction * (p.k / 2);
}
// The chunk of the table, counted forwards for both directions.
__device__ __forceinline__ int chunk_of(const Params& p, const Walk& w, const Step& s) {
  return w.segment * p.chunks + (w.direction ? p.chunks - 1 - s.index : s.index);
}
// Position j of a walk's chunk, in the table.
__device__ __forceinline__ int position_of(const Params& p, const Walk& w, const Step& s, int j) {
  return chunk_of(p, w, s) * kRows + (w.direction ? kRows - 1 - j : j);
}
// Whether all positions exist; only the table's last chunks can lack some.
__device__ __forceinline__ bool is_whole(const Params& p, const Walk& w, const Step& s) {
  return (chunk_of(p, w, s) + 1) * kRows <= p.l;
}
// Chunks of the segment that the forward direction takes before the barrier in the middle.
__device__ __forceinline__ int middle(const Params& p) { return p.chunks / (2 * p.relay) * p.relay; }

// Where the numbers of a channel and a route lie in A, D and the sums.
__device__ __forceinline__ int64_t channel_of(const Params& p, const Walk& w, const Step& s) {
  return static_cast<int64_t>(route_of(p, w, s)) * p.d + w.channel;
}
// Where the lane's states at a chunk lie; only chunks below `slots` exist, the rest evens out the turns.
__device__ __forceinline__ bool has_states(const Params& p, const Walk& w, const Step& s) {
  return w.active && chunk_of(p, w, s) < p.slots;
}
__device__ __forceinline__ int64_t states_of(const Params& p, const Walk& w, const Step& s) {
  const int64_t row = static_cast<int64_t>(w.image) * p.k + route_of(p, w, s);
  return (row * p.slots + chunk_of(p, w, s)) * p.d + w.channel;
}
// Where the lane's numbers are in `spans` and `enter`.
__device__ __forceinline__ int64_t span_of(const Params& p, const Walk& w, const Step& s) {
  const int64_t row = static_cast<int64_t>(w.image) * p.k + route_of(p, w, s);
  return (row * p.segments + w.segment) * p.d + w.channel;
}
__device__ __forceinline__ int64_t proj_row(const Params& p, const Walk& w, const Step& s, int token) {
  return (static_cast<int64_t>(w.image) * p.l + token) * p.k + route_of(p, w, s);
}

// ---- launches (lane_forward.cu, lane_backward.cu, lane_pack.cu, lane_probe.cu) ----

// Shared memory of a warp, at most.
int64_t forward_bytes(int channels, int ranks);
int64_t backward_bytes(int channels, int ranks);

template <typename T>
void launch_forward(const Params& p, int channels, int ranks, cudaStream_t stream);
template <typename T>
void launch_backward(const Params& p, int channels, int ranks, cudaStream_t stream);
// Fills p.enter, for the forward pass or the backward pass.
template <typename T>
void launch_probe(const Params& p, int channels, int ranks, bool backward, cudaStream_t stream);
template <typename T>
void launch_pack(const float* weight, const float* bias, const Params& p, int channels, int ranks,
                 cudaStream_t stream);

}  // namespace scan::route::lane
