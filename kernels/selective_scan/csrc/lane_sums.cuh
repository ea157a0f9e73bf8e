// Sums of the backward pass, over channels into dproj and over positions into the weights' gradients.
#pragma once

#include "lane_stage.cuh"

namespace scan::route::lane {

template <typename T, int kC, int kN>
struct alignas(16) BackwardMemory : Memory<T, kC, (kN + 1) / 2> {
  static constexpr int kGates = 8 * kN;  // columns of the gradients of B and C in `part`
  static constexpr int kParts = kN <= kSumTiles ? 2 : 1;
  using Row = T[2 * Shape<kC, 1>::kWide];
  Tile<T, kC> dy;
  float part[kParts][kRows][kGates + 8];  // this warp's part of the chunk's rows of dproj

  // dz of a position, in the place of its z.
  __device__ __forceinline__ Row& dz(int j) { return reinterpret_cast<Row&>(this->z[j]); }
  __device__ __forceinline__ auto& part_of(const Step& s) { return part[s.number % kParts]; }
  __device__ __forceinline__ const auto& part_of(const Step& s) const { return part[s.number % kParts]; }
};

// Sums over the positions of a segment.
template <int kC, int kN>
struct Sums {
  static constexpr int kTiles = kN <= kSumTiles ? kN : 0;
  float weight[2 * kC][kTiles ? kTiles : 1][4];  // fragments of dt_weight's gradient
  float bias[kC], D[kC], A[kC];
};

// The warp's part of the gradient of dt: dz (16 x channels) times dt_weight (channels x r).
template <typename T, int kC, int kN, typename M>
__device__ __forceinline__ void contract(const Walk& w, const Step& s, M& memory, const uint2 (&weights)[2 * kC * kN]) {
  auto& part = memory.part_of(s);
  const int g = w.lane / 4, q = w.lane % 4;
  float c[kN][4] = {};
#pragma unroll
  for (int k = 0; k < 2 * kC; ++k) {
    unsigned a[4];
    ptx::load_matrix(a, &memory.dz(w.lane % 16)[16 * k + w.lane / 16 * 8]);
#pragma unroll
    for (int t = 0; t < kN; ++t) {
      const uint2 b = weights[k * kN + t];
      ptx::mma_half<T>(c[t], a, b.x, b.y);
    }
  }
#pragma unroll
  for (int t = 0; t < kN; ++t) {
    *reinterpret_cast<float2*>(&part[g][8 * t + 2 * q]) = make_float2(c[t][0], c[t][1]);
    *reinterpret_cast<float2*>(&part[g + 8][8 * t + 2 * q]) = make_float2(c[t][2], c[t][3]);
  }
}

// Adds dz^T (channels x 16) times dt (16 x r) to the weights' gradient.
template <typename T, int kC, int kN, typename M>
__device__ __forceinline__ void sum_weights(const Walk& w, const Step& s, M& memory, Sums<kC, kN>& sums) {
  constexpr int kTiles = Sums<kC, kN>::kTiles;
  const int eight = w.lane / 8, row = w.lane % 8;
  unsigned b[kTiles ? kTiles : 1][2];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) ptx::load_transposed(b[t], &memory.rows[s.number % 2][w.lane % 16][8 * t]);
#pragma unroll
  for (int k = 0; k < (kTiles ? 2 * kC : 0); ++k) {
    unsigned a[4];
    ptx::load_transposed(a, &memory.dz(row + eight / 2 * 8)[16 * k + eight % 2 * 8]);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) ptx::mma_half<T>(sums.weight[k][t], a, b[t][0], b[t][1]);
  }
}

// Waits for the warps of the same direction.
__device__ __forceinline__ void meet(const Params& p, const Walk& w) {
  ptx::barrier(1 + w.direction, p.group * p.relay * kWarp);
}

// The rows of dproj of a chunk: the sum of the parts of the direction's warps, in their order.
template <typename T, typename M>
__device__ __forceinline__ void write_proj(const Params& p, const Walk& w, const Step& s, const M* memories) {
  const int warp = threadIdx.x / kWarp / p.relay % p.group, row = w.lane / 2;
  const M* own = memories + w.direction * p.group * p.relay + w.turn;  // every relay-th is at the same chunk
  meet(p, w);
  if (position_of(p, w, s, row) >= p.l) return;
  const int64_t at = proj_row(p, w, s, own[warp * p.relay].tokens[s.number % 4][row]) * p.m;
  const int64_t slab = static_cast<int64_t>(blockIdx.x % p.slabs) * p.b * p.l * p.k * p.m;
  for (int i = w.lane % 2 + 2 * warp; i < p.m; i += 2 * p.group) {
    const int column = i < p.r ? i : i - p.r + M::kGates;
    float sum = 0.f;
    for (int other = 0; other < p.group; ++other) sum += own[other * p.relay].part_of(s)[row][column];
    if (p.slabs == 1) {
      static_cast<T*>(p.dproj)[at + i] = from_float<T>(sum);
    } else {
      static_cast<float*>(p.dproj)[slab + at + i] = sum;
    }
  }
}

// Writes the warp's sums of a route.
template <int kC, int kN>
__device__ __forceinline__ void write_sums(const Params& p, const Walk& w, const Step& s, const Sums<kC, kN>& sums) {
  constexpr int kTiles = Sums<kC, kN>::kTiles;
  const int ranks = p.columns - 3, g = w.lane / 4, q = w.lane % 4;
  const int64_t group = (static_cast<int64_t>(w.image) * p.segments + w.segment) * p.relay + w.turn;
  const int64_t row = (group * p.k + route_of(p, w, s)) * p.d;
#pragma unroll
  for (int c = 0; c < kC; ++c) {
    if (!w.active) break;
    float* to = p.dweights + (row + w.channel + c) * p.columns + ranks;
    to[0] = sums.bias[c] * (kTiles ? kLog2E : 1.f), to[1] = sums.D[c], to[2] = sums.A[c] * kLn2;
  }
#pragma unroll
  for (int k = 0; k < 2 * kC; ++k) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int channel = w.strip * 32 * kC + 16 * k + g + i / 2 * 8, rank = 8 * t + 2 * q + i % 2;
        if (channel < p.d && rank < ranks) {
          p.dweights[(row + channel) * p.columns + rank] = sums.weight[k][t][i] * kLog2E;
        }
      }
    }
  }
}

}  // namespace scan::route::lane
