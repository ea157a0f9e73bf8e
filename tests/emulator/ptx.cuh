// What csrc/ptx.cuh has, for the emulator: the same names and operands, computed by the CPU.
#pragma once

#include "emulator.h"

#include <cmath>

namespace scan::ptx {

inline float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.f, x) : x; }
inline float exp2_approx(float x) { return flush(exp2f(flush(x))); }
inline float log2_approx(float x) { return log2f(flush(x)); }
inline float reciprocal_approx(float x) { return flush(1.f / flush(x)); }

inline float round_tf32(float x) {
  return std::isnan(x) ? x : __uint_as_float((__float_as_uint(x) + 0x1000u) & ~0x1fffu);
}
inline float cut_tf32(float x) { return __uint_as_float(__float_as_uint(x) & ~0x1fffu); }

// ---- tensor cores ----

template <int kA>
struct Product {
  float (*c)[4];
  float a[kA], b[kA / 2];
};

// kK: columns of a; kPack: adjacent ones that a register holds.
template <int kK, int kPack, int kA>
void multiply(Product<kA>* (&lanes)[emulator::kWarp]) {
  float a[16][kK], b[kK][8];
  for (int lane = 0; lane < emulator::kWarp; ++lane) {
    const int g = lane / 4, q = lane % 4;
    for (int i = 0; i < kA; ++i) {
      const int part = i / kPack, column = part / 2 * (kK / 2) + kPack * q + i % kPack;
      a[g + part % 2 * 8][column] = lanes[lane]->a[i];
    }
    for (int i = 0; i < kA / 2; ++i) b[i / kPack * (kK / 2) + kPack * q + i % kPack][g] = lanes[lane]->b[i];
  }
  for (int lane = 0; lane < emulator::kWarp; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = 2 * (lane % 4) + i % 2;
      float sum = 0.f;
      for (int k = 0; k < kK; ++k) sum += a[row][k] * b[k][column];
      (*lanes[lane]->c)[i] += sum;
    }
  }
}

inline void mma_tf32(float (&c)[4], const float (&a)[4], float b0, float b1) {
  Product<4> operands{&c, {}, {cut_tf32(b0), cut_tf32(b1)}};
  for (int i = 0; i < 4; ++i) operands.a[i] = cut_tf32(a[i]);
  emulator::meet("mma_tf32", operands, [](auto& lanes) { multiply<8, 1>(lanes); });
}

inline float2 two(unsigned bits, __half) {
  __half2 v;
  std::memcpy(&v, &bits, 4);
  return __half22float2(v);
}
inline float2 two(unsigned bits, __nv_bfloat16) {
  return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
}

template <typename T>
void mma_half(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  Product<8> operands{&c, {}, {}};
  for (int i = 0; i < 4; ++i) {
    const float2 v = two(a[i], T{});
    operands.a[2 * i] = v.x, operands.a[2 * i + 1] = v.y;
  }
  const float2 first = two(b0, T{}), second = two(b1, T{});
  operands.b[0] = first.x, operands.b[1] = first.y, operands.b[2] = second.x, operands.b[3] = second.y;
  emulator::meet("mma_half", operands, [](auto& lanes) { multiply<16, 2>(lanes); });
}

// ---- shared memory ----

template <int kTiles>
struct Rows {
  const uint16_t* at;
  unsigned (*a)[kTiles];
};

template <int kTiles, bool kTransposed>
void load(const char* name, unsigned (&a)[kTiles], const void* at) {
  if (reinterpret_cast<uintptr_t>(at) % 16) emulator::block().fail(std::string(name) + ": a row is not on 16 bytes");
  Rows<kTiles> operands{static_cast<const uint16_t*>(at), &a};
  emulator::meet(name, operands, [](auto& lanes) {
    for (int lane = 0; lane < emulator::kWarp; ++lane) {
      const int g = lane / 4, q = lane % 4;
      for (int i = 0; i < kTiles; ++i) {
        const auto number = [&](int row, int column) { return unsigned{lanes[8 * i + row]->at[column]}; };
        (*lanes[lane]->a)[i] = kTransposed ? number(2 * q, g) | number(2 * q + 1, g) << 16
                                           : number(g, 2 * q) | number(g, 2 * q + 1) << 16;
      }
    }
  });
}
inline void load_matrix(unsigned (&a)[4], const void* at) { load<4, false>("load_matrix", a, at); }
inline void load_transposed(unsigned (&a)[4], const void* at) { load<4, true>("load_transposed", a, at); }
inline void load_transposed(unsigned (&b)[2], const void* at) { load<2, true>("load_transposed", b, at); }

// ---- asynchronous copies ----

template <int kBytes>
void copy_async(void* to, const void* from) {
  for (const void* at : {static_cast<const void*>(to), from}) {
    if (reinterpret_cast<uintptr_t>(at) % kBytes) emulator::block().fail("copy_async: an address is not aligned");
  }
  if (emulator::block().toss()) {
    std::memcpy(to, from, kBytes);
  } else {
    emulator::block().fiber().groups.back().push_back({to, from, kBytes});
  }
}
inline void commit_async() { emulator::block().fiber().groups.emplace_back(); }

inline void finish(std::vector<emulator::Copy>& copies) {
  for (const emulator::Copy& copy : copies) std::memcpy(copy.to, copy.from, copy.bytes);
  copies.clear();
}
template <int kLeft>
void wait_async() {
  auto& groups = emulator::block().fiber().groups;
  while (groups.size() > kLeft + 1) finish(groups.front()), groups.erase(groups.begin());
}
inline void wait_all_async() {
  for (auto& group : emulator::block().fiber().groups) finish(group);
  emulator::block().fiber().groups.assign(1, {});
}

inline void barrier(int number, int threads) { emulator::block().wait(number, threads); }

}  // namespace scan::ptx
