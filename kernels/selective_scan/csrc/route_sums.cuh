// Sums of the backward pass over channels and positions, from the tiles in shared memory.
#pragma once

#include "route_stage.cuh"

namespace scan::route {

constexpr int kMaxColumns = 8;           // tiles of 8 ranks a warp can own

// Shared memory beside the Stage: dz as fragments (2, warps, 4, lane, 4), see `fragment`; gradients of B and C
// (2, warps, 64, 4, 2). kTile numbers per warp each.
struct Tiles {
  float *dz, *gates;
  int warps;

  __device__ float* dz_of(const Step& step, int warp) const { return dz + (step.number % 2 * warps + warp) * kTile; }
  __device__ float* gates_of(const Step& step, int warp) const {
    return gates + (step.number % 2 * warps + warp) * kTile;
  }
};

// What a warp sums over the positions and images of its block. kColumns: tiles of 8 ranks it owns of dt_weight.
template <int kColumns>
struct Sums {
  float weight[kColumns][4];
  float bias[2], A[2], D[2];
};

// dz of the lane's positions, cut to tf32 unless kFull: its own fragments of the left operand of `write_dt`.
template <bool kFull>
__device__ __forceinline__ void store_dz(float* tile, const Lane& at, const Pairs& dz) {
#pragma unroll
  for (int m = 0; m < kSteps / 2; ++m) {
    float4 v = make_float4(dz[2 * m][0], dz[2 * m + 1][0], dz[2 * m][1], dz[2 * m + 1][1]);
    if (!kFull) v = make_float4(ptx::round_tf32(v.x), ptx::round_tf32(v.y), ptx::round_tf32(v.z), ptx::round_tf32(v.w));
    *reinterpret_cast<float4*>(tile + (m * kWarp + at.lane) * 4) = v;
  }
}

__device__ __forceinline__ float sum_positions(float v) {
  v += __shfl_xor_sync(kAll, v, 4);
  v += __shfl_xor_sync(kAll, v, 8);
  return v + __shfl_xor_sync(kAll, v, 16);
}

// Where the sums of a channel begin: dt_weight (r), dt_bias, D, A (n).
__device__ __forceinline__ float* sums_of(const Params& p, int group, int route, int channel) {
  const int64_t row = (static_cast<int64_t>(group) * p.k + route) * p.d + channel;
  return p.dweights + row * (p.r + 2 + p.n);
}

// Adds the two channels' sums over the lanes at `column`. No other block touches these numbers.
__device__ __forceinline__ void add_sums(const Params& p, int group, int route, const Lane& at, int column,
                                         float first, float second) {
  first = sum_positions(first);
  second = sum_positions(second);
  if (at.g == 0 && at.first) sums_of(p, group, route, at.channel)[column] += first;
  if (at.g == 0 && at.second) sums_of(p, group, route, at.channel + 1)[column] += second;
}

// Writes two columns (or the first) of a token's row of dproj, or of this slab's part of it.
template <typename T>
__device__ __forceinline__ void put_proj(const Params& p, const int* tokens, int slab, const Step& step,
                                         int position, int column, float first, float second, bool both) {
  if (step.chunk * kChunk + position >= p.l) return;
  const int token = tokens[step.number % kTokens * kChunk + position];
  const int64_t row = (static_cast<int64_t>(step.image) * p.l + token) * p.k + step.route;
  if (p.slabs == 1) {
    T* at = static_cast<T*>(p.dproj) + row * p.m + column;
    at[0] = from_float<T>(first);
    if (both) at[1] = from_float<T>(second);
  } else {
    const int64_t part = static_cast<int64_t>(slab) * p.b * p.l * p.k;
    float* at = static_cast<float*>(p.dproj) + (part + row) * p.m + column;
    at[0] = first;
    if (both) at[1] = second;
  }
}

// Gradients of B and C of state i at the chunk's positions: the tiles' sum over lanes and warps.
template <typename T>
__device__ __forceinline__ void write_gates(const Params& p, const Tiles& tiles, const int* tokens, int slab,
                                            const Step& step, int i) {
#pragma unroll 1
  for (int t = threadIdx.x; t < kChunk * 4; t += blockDim.x) {
    float2 sum = make_float2(0.f, 0.f);
#pragma unroll 4
    for (int w = 0; w < tiles.warps; ++w) {
      const float2 v = load_two(tiles.gates_of(step, w) + 2 * t);
      sum.x += v.x;
      sum.y += v.y;
    }
#pragma unroll
    for (int span = 1; span < 4; span *= 2) {
      sum.x += __shfl_xor_sync(kAll, sum.x, span);
      sum.y += __shfl_xor_sync(kAll, sum.y, span);
    }
    const int row = t / 4, column = p.r + (t % 4 ? p.n : 0) + i;
    const float v = t % 4 ? sum.y : sum.x * kLn2;
    if (t % 4 < 2) put_proj<T>(p, tokens, slab, step, row % 8 * 8 + row / 8, column, v, 0.f, false);
  }
}

// Gradient of dt at the chunk's positions: dz (64 x channels) times dt_weight (channels x r), tile by tile.
template <typename T>
__device__ __forceinline__ void write_dt(const Params& p, const Tiles& tiles, const int* tokens, int slab,
                                         const Step& step, const Lane& at) {
  constexpr bool kFull = std::is_same<T, float>::value;
  // Odd warps first: with one tile of ranks they have no part in `sum_weight`.
  const int rank = at.warp % 2 ? at.warp / 2 : tiles.warps / 2 + at.warp / 2;
#pragma unroll 1
  for (int t = rank; t < 4 * p.kt; t += tiles.warps) {
    const int m = t % 4, tile = t / 4;
    float c[4] = {};
    const int64_t strip = static_cast<int64_t>(step.route) * p.strips + slab * tiles.warps;
    const float4* weight = p.contract + (strip * p.kt + tile) * kWarp + at.lane;
    const float* dz = tiles.dz_of(step, 0) + (m * kWarp + at.lane) * 4;
#pragma unroll 4
    for (int w = 0; w < tiles.warps; ++w) {
      const float4 v = *reinterpret_cast<const float4*>(dz + w * kTile);
      const float a[4] = {v.x, v.y, v.z, v.w};
      mma_split<kFull, false>(c, a, weight[w * p.kt * kWarp]);
    }
    const int position = at.g * kSteps + 2 * m, column = tile * 8 + 2 * at.q;
    if (column >= p.r) continue;
    put_proj<T>(p, tokens, slab, step, position, column, c[0], c[1], column + 1 < p.r);
    put_proj<T>(p, tokens, slab, step, position + 1, column, c[2], c[3], column + 1 < p.r);
  }
}

// Gradient of dt_weight: dz^T (16 channels of two warps x 64) times dt (64 x r). The two warps share the rank tiles.
// One product takes row j of the chunk: positions 8q + j and 8q + 32 + j of lane (g, q), channel or rank g.
template <bool kFull, int kColumns>
__device__ __forceinline__ void sum_weight(const Params& p, const Tiles& tiles, const float* rows, const Step& step,
                                           const Lane& at, float (&sums)[kColumns][4]) {
  const int spot = fragment(8 * at.q, at.g, 1), later = fragment(32, 0, 1);
  const float* even = tiles.dz_of(step, at.warp & ~1) + spot;
  const float* odd = tiles.dz_of(step, at.warp | 1) + spot;
  rows += step.number % kBackwardCopies * p.rows + spot;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int tile = 2 * c + (at.warp & 1);
    if (tile >= p.kt) continue;
    float part[4] = {};  // summed per chunk: the tensor cores cut rather than round, long sums would drift
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const int of_dz = j / 2 * kWarp * 4 + j % 2, of_dt = (j / 2 * p.kt + tile) * kWarp * 4 + j % 2;
      const float a[4] = {even[of_dz], odd[of_dz], even[of_dz + later], odd[of_dz + later]};
      const float first = rows[of_dt], second = rows[of_dt + later];
      float4 b = make_float4(first, second, 0.f, 0.f);
      if (kFull) {
        b.x = ptx::round_tf32(first), b.y = ptx::round_tf32(second);
        b.z = first - b.x, b.w = second - b.y;
      }
      mma_split<kFull, false>(part, a, b);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[c][i] += part[i];
  }
}

// Adds a route's sums to the group's row.
template <bool kPair, int kColumns>
__device__ __forceinline__ void flush(const Params& p, int group, int slab, int warps, int route, const Lane& at,
                                      const Sums<kColumns>& sums) {
  add_sums(p, group, route, at, p.r, sums.bias[0] * kLog2E, sums.bias[1] * kLog2E);
  add_sums(p, group, route, at, p.r + 1, sums.D[0], sums.D[1]);
  if (kPair) add_sums(p, group, route, at, p.r + 2, sums.A[0] * kLn2, sums.A[1] * kLn2);
  const int channel = (slab * warps + (at.warp & ~1)) * kStrip + at.g;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int column = (2 * c + (at.warp & 1)) * 8 + 2 * at.q;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = channel + (i / 2) * kStrip;
      if (row < p.d && column + i % 2 < p.r) {
        sums_of(p, group, route, row)[column + i % 2] = sums.weight[c][i] * kLog2E;
      }
    }
  }
}

}  // namespace scan::route
