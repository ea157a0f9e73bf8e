// Inner loops of the CPU kernels: one state over a tile of positions, kWidth channels side by side.
//
// A tile is float[positions][kWidth]: the channels lie next to each other, so that the recurrence
// over positions runs on whole vectors. The compiler vectorises the loops over channels;
// SCAN_CLONES lets it do so once per instruction set and choose by the processor's features when
// the library is loaded (GCC 12 and later; else the baseline).
#pragma once

#include "common.h"

#include <cmath>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__) && __GNUC__ >= 12
#define SCAN_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SCAN_CLONES
#endif
#define SCAN_TILE_LOOP SCAN_CLONES [[maybe_unused]] static

#if defined(__GNUC__)
#define SCAN_INLINE inline __attribute__((always_inline))  // into every clone
#else
#define SCAN_INLINE inline
#endif

namespace scan::cpu {

constexpr int kWidth = 16;

// exp(x) to about 1e-7 relative for -87 <= x <= 88; zero below that.
SCAN_INLINE float exp_fast(float argument) {
  float x = argument < -87.3f ? -87.3f : argument;
  x = x > 88.3f ? 88.3f : x;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: the sum's low bits hold the rounded integer
  const float shifted = x * 1.44269504088896341f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  int32_t power, bits;
  std::memcpy(&power, &shifted, sizeof power);
  std::memcpy(&bits, &p, sizeof bits);
  bits += static_cast<int32_t>(static_cast<uint32_t>(power) << 23);
  std::memcpy(&p, &bits, sizeof p);
  return argument < -87.3f ? 0.0f : p;
}

// log(1 + e) for 0 <= e <= 1: 2 atanh(e / (2 + e)), so that small e keep their relative precision.
SCAN_INLINE float log1p_fast(float e) {
  const float s = e / (2.0f + e), s2 = s * s;
  float p = 2.0f / 15.0f;
  p = p * s2 + 2.0f / 13.0f;
  p = p * s2 + 2.0f / 11.0f;
  p = p * s2 + 2.0f / 9.0f;
  p = p * s2 + 2.0f / 7.0f;
  p = p * s2 + 2.0f / 5.0f;
  p = p * s2 + 2.0f / 3.0f;
  p = p * s2 + 2.0f;
  return p * s;
}

#if defined(__GNUC__) && (defined(__clang__) || __GNUC__ >= 12)
using Vector16 = float __attribute__((vector_size(64)));

// Rows become columns: four rounds of interleaving row i with row i + 8.
SCAN_INLINE void transpose_block(Vector16 (&m)[kWidth]) {
  for (int round = 0; round < 4; ++round) {
    Vector16 next[kWidth];
    for (int i = 0; i < kWidth / 2; ++i) {
      next[2 * i] = __builtin_shufflevector(m[i], m[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5,
                                            21, 6, 22, 7, 23);
      next[2 * i + 1] = __builtin_shufflevector(m[i], m[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12,
                                                28, 13, 29, 14, 30, 15, 31);
    }
    for (int i = 0; i < kWidth; ++i) m[i] = next[i];
  }
}
#else
struct Vector16 {
  float item[kWidth];
};

inline void transpose_block(Vector16 (&m)[kWidth]) {
  for (int i = 0; i < kWidth; ++i) {
    for (int j = 0; j < i; ++j) std::swap(m[i].item[j], m[j].item[i]);
  }
}
#endif

// rows[i][0 .. count) to tile[t][i], or to tile[count - 1 - t][i] where `reverse`.
SCAN_TILE_LOOP void rows_to_tile(const float* const* rows, int64_t count, bool reverse,
                                     float* __restrict__ tile) {
  int64_t t = 0;
  for (; t + kWidth <= count; t += kWidth) {
    Vector16 block[kWidth];
    for (int i = 0; i < kWidth; ++i) std::memcpy(&block[i], rows[i] + t, sizeof block[i]);
    transpose_block(block);
    for (int i = 0; i < kWidth; ++i) {
      const int64_t at = reverse ? count - 1 - t - i : t + i;
      std::memcpy(tile + at * kWidth, &block[i], sizeof block[i]);
    }
  }
  for (; t < count; ++t) {
    const int64_t at = reverse ? count - 1 - t : t;
    for (int i = 0; i < kWidth; ++i) tile[at * kWidth + i] = rows[i][t];
  }
}

// The way back of `rows_to_tile`, for the first `channels` rows.
SCAN_TILE_LOOP void tile_to_rows(const float* __restrict__ tile, int64_t count, bool reverse,
                                     int64_t channels, float* const* rows) {
  int64_t t = 0;
  for (; t + kWidth <= count; t += kWidth) {
    Vector16 block[kWidth];
    for (int i = 0; i < kWidth; ++i) {
      const int64_t at = reverse ? count - 1 - t - i : t + i;
      std::memcpy(&block[i], tile + at * kWidth, sizeof block[i]);
    }
    transpose_block(block);
    for (int64_t i = 0; i < channels; ++i) std::memcpy(rows[i] + t, &block[i], sizeof block[i]);
  }
  for (; t < count; ++t) {
    const int64_t at = reverse ? count - 1 - t : t;
    for (int64_t i = 0; i < channels; ++i) rows[i][t] = tile[at * kWidth + i];
  }
}

// dt <- softplus(dt + bias) and slope <- its derivative, or dt <- dt + bias and slope <- 1. bias:
// (kWidth).
SCAN_TILE_LOOP void make_delta(float* __restrict__ dt, float* __restrict__ slope,
                                   const float* __restrict__ bias, bool softplus,
                                   int64_t positions) {
  if (!softplus) {
    for (int64_t i = 0; i < positions * kWidth; ++i) {
      dt[i] += bias[i % kWidth];
      slope[i] = 1.0f;
    }
    return;
  }
  for (int64_t t = 0; t < positions; ++t) {
#pragma omp simd
    for (int i = 0; i < kWidth; ++i) {
      const float z = dt[t * kWidth + i] + bias[i];
      const float e = exp_fast(-std::fabs(z));
      slope[t * kWidth + i] = (z >= 0.0f ? 1.0f : e) / (1.0f + e);
      dt[t * kWidth + i] = (z > 0.0f ? z : 0.0f) + log1p_fast(e);
    }
  }
}

// y <- D u and x <- dt x, the drive, where x holds u.
SCAN_TILE_LOOP void make_drive(const float* __restrict__ dt, const float* __restrict__ D,
                                   float* __restrict__ x, float* __restrict__ y,
                                   int64_t positions) {
  for (int64_t t = 0; t < positions; ++t) {
#pragma omp simd
    for (int i = 0; i < kWidth; ++i) {
      const int64_t at = t * kWidth + i;
      y[at] = D[i] * x[at];
      x[at] *= dt[at];
    }
  }
}

// A vector carried along the positions: a local copy, which stays in registers, written back at the
// end.
struct Carried {
  float now[kWidth];
  float* home;

  SCAN_INLINE explicit Carried(float* home) : home(home) { std::memcpy(now, home, sizeof now); }
  SCAN_INLINE ~Carried() { std::memcpy(home, now, sizeof now); }
};

// h <- exp(dt A) h + x B, y += C h over `positions`. dt, x, y: (positions, kWidth), x = dt u. B, C:
// (positions). A, h: (kWidth).
SCAN_TILE_LOOP void scan_tile(const float* __restrict__ dt, const float* __restrict__ x,
                                  const float* __restrict__ A, const float* __restrict__ B,
                                  const float* __restrict__ C, float* __restrict__ h,
                                  float* __restrict__ y, int64_t positions) {
  Carried state(h);
  for (int64_t t = 0; t < positions; ++t) {
    const float b = B[t], c = C[t];
#pragma omp simd
    for (int i = 0; i < kWidth; ++i) {
      const int64_t at = t * kWidth + i;
      state.now[i] = exp_fast(dt[at] * A[i]) * state.now[i] + x[at] * b;
      y[at] += c * state.now[i];
    }
  }
}

// The same scan for the backward pass: keeps decay = exp(dt A) and kept = decay h_{t-1}, and adds
// sum_i dy h to dC.
SCAN_TILE_LOOP void rescan_tile(const float* __restrict__ dt, const float* __restrict__ x,
                                    const float* __restrict__ dy, const float* __restrict__ A,
                                    const float* __restrict__ B, float* __restrict__ h,
                                    float* __restrict__ decay, float* __restrict__ kept,
                                    float* __restrict__ dC, int64_t positions) {
  Carried state(h);
  for (int64_t t = 0; t < positions; ++t) {
    const float b = B[t];
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < kWidth; ++i) {
      const int64_t at = t * kWidth + i;
      decay[at] = exp_fast(dt[at] * A[i]);
      kept[at] = decay[at] * state.now[i];
      state.now[i] = kept[at] + x[at] * b;
      sum += dy[at] * state.now[i];
    }
    dC[t] += sum;
  }
}

// What `adjoint_tile` reads and adds to: (positions, kWidth) each.
struct AdjointTile {
  const float *dt, *u, *dy, *decay, *kept;
  float *du, *ddt;
};

// The adjoint g_t = C_t dy_t + decay_{t+1} g_{t+1}, from the last position to the first. r:
// (kWidth) holds decay_{t+1} g_{t+1} on entry and decay_0 g_0 on return. Adds to du, ddt, dA
// (kWidth) and dB (positions).
SCAN_TILE_LOOP void adjoint_tile(const AdjointTile tile, const float* __restrict__ A,
                                     const float* __restrict__ B, const float* __restrict__ C,
                                     float* __restrict__ r, float* __restrict__ dA,
                                     float* __restrict__ dB, int64_t positions) {
  const float *__restrict__ dt = tile.dt, *__restrict__ u = tile.u, *__restrict__ dy = tile.dy;
  const float *__restrict__ decay = tile.decay, *__restrict__ kept = tile.kept;
  float *__restrict__ du = tile.du, *__restrict__ ddt = tile.ddt;
  Carried adjoint(r), sum_A(dA);
  for (int64_t t = positions - 1; t >= 0; --t) {
    const float b = B[t], c = C[t];
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < kWidth; ++i) {
      const int64_t at = t * kWidth + i;
      const float g = c * dy[at] + adjoint.now[i];
      adjoint.now[i] = decay[at] * g;
      du[at] += g * b * dt[at];
      ddt[at] += g * (A[i] * kept[at] + b * u[at]);
      sum_A.now[i] += g * kept[at] * dt[at];
      sum += g * dt[at] * u[at];
    }
    dB[t] += sum;
  }
}

// Start of a backward tile: x <- dt u, du <- D dy, ddt <- 0, dD += sum of u dy.
SCAN_TILE_LOOP void start_adjoint(const AdjointTile tile, const float* __restrict__ D,
                                      float* __restrict__ x, float* __restrict__ dD,
                                      int64_t positions) {
  const float *__restrict__ dt = tile.dt, *__restrict__ u = tile.u, *__restrict__ dy = tile.dy;
  float *__restrict__ du = tile.du, *__restrict__ ddt = tile.ddt;
  for (int64_t t = 0; t < positions; ++t) {
#pragma omp simd
    for (int i = 0; i < kWidth; ++i) {
      const int64_t at = t * kWidth + i;
      x[at] = dt[at] * u[at];
      du[at] = D[i] * dy[at];
      ddt[at] = 0.0f;
      dD[i] += u[at] * dy[at];
    }
  }
}

// End of a backward tile: ddt <- ddt slope, dbias += its sum.
SCAN_TILE_LOOP void finish_adjoint(const float* __restrict__ slope, float* __restrict__ ddt,
                                       float* __restrict__ dbias, int64_t positions) {
  for (int64_t t = 0; t < positions; ++t) {
#pragma omp simd
    for (int i = 0; i < kWidth; ++i) {
      const int64_t at = t * kWidth + i;
      ddt[at] *= slope[at];
      dbias[i] += ddt[at];
    }
  }
}

}  // namespace scan::cpu
