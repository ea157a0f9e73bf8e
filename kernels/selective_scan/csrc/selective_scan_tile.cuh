// How a warp holds a chunk of a row: each lane owns kItems neighbours, in scan order whatever the
// direction.
#pragma once

#include "common.cuh"

namespace scan {

constexpr int kLanes = 32;
constexpr int kWarps = 8;         // of a backward block
constexpr int kForwardWarps = 4;  // of a forward block, where no warp waits for another
constexpr unsigned kAllLanes = 0xffffffffu;

// What the compiler may rely on. kOneState: one state per channel, and every row starts and ends on
// 16 bytes. kAligned: the latter alone. kAny: neither.
enum class Form { kOneState, kAligned, kAny };

// Lane i holds items [i * kItems, (i + 1) * kItems) of the chunk in scan order. A reversed scan
// runs down the row, so that its lane 0 holds the last items of the chunk in memory.
template <typename T, bool kReverse_, Form kForm>
struct Tile {
  static constexpr int kItems = 16 / sizeof(T);
  static constexpr bool kAligned = kForm != Form::kAny;
  static constexpr bool kReverse = kReverse_;
  static constexpr int kLength = kLanes * kItems;

  // Place in the chunk of this lane's first item in memory order.
  __device__ static int lane_start(int lane) {
    return (kReverse ? kLanes - 1 - lane : lane) * kItems;
  }
  // Memory order of scan item i within the lane.
  __device__ static constexpr int order(int i) { return kReverse ? kItems - 1 - i : i; }
};

// kItems numbers of type T as they lie in memory.
template <typename T, int kItems, bool kAligned>
struct Packed {
  static constexpr int kWords = kItems * static_cast<int>(sizeof(T)) / 4;
  uint32_t word[kWords];

  // Reads row[start .. start + kItems); what lies at or past `length` reads as zero. kOnce marks
  // rows that no other warp reads, so that they do not push shared ones out of the caches.
  template <bool kOnce>
  __device__ void load(const T* row, int start, int length) {
    if constexpr (kAligned) {
#pragma unroll
      for (int w = 0; w < kWords; w += 4) {
        uint4 four = make_uint4(0, 0, 0, 0);
        if (start < length) {
          const auto* source = reinterpret_cast<const uint4*>(row + start) + w / 4;
          four = kOnce ? __ldcs(source) : __ldg(source);
        }
        word[w] = four.x, word[w + 1] = four.y, word[w + 2] = four.z, word[w + 3] = four.w;
      }
    } else {
      load_items(row, start, length);
    }
  }

  __device__ void store(T* row, int start, int length) const {
    if constexpr (kAligned) {
#pragma unroll
      for (int w = 0; w < kWords; w += 4) {
        const uint4 four = make_uint4(word[w], word[w + 1], word[w + 2], word[w + 3]);
        if (start < length) __stcs(reinterpret_cast<uint4*>(row + start) + w / 4, four);
      }
    } else {
      store_items(row, start, length);
    }
  }

 private:
  __device__ void load_items(const T* row, int start, int length) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        word[i] = start + i < length ? reinterpret_cast<const uint32_t*>(row)[start + i] : 0;
      }
    } else {
      const auto* bits = reinterpret_cast<const uint16_t*>(row);
#pragma unroll
      for (int i = 0; i < kItems; i += 2) {
        const uint32_t low = start + i < length ? bits[start + i] : 0;
        const uint32_t high = start + i + 1 < length ? bits[start + i + 1] : 0;
        word[i / 2] = low | high << 16;
      }
    }
  }

  __device__ void store_items(T* row, int start, int length) const {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (start + i < length) {
        if constexpr (sizeof(T) == 4) {
          reinterpret_cast<uint32_t*>(row)[start + i] = word[i];
        } else {
          reinterpret_cast<uint16_t*>(row)[start + i] = word[i / 2] >> (i % 2 * 16) & 0xffff;
        }
      }
    }
  }
};

__device__ __forceinline__ float2 unpack_word(uint32_t word, __half) {
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}
__device__ __forceinline__ float2 unpack_word(uint32_t word, __nv_bfloat16) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}
__device__ __forceinline__ uint32_t pack_word(float2 pair, __half) {
  const __half2 word = __float22half2_rn(pair);
  return *reinterpret_cast<const uint32_t*>(&word);
}
__device__ __forceinline__ uint32_t pack_word(float2 pair, __nv_bfloat16) {
  const __nv_bfloat162 word = __float22bfloat162_rn(pair);
  return *reinterpret_cast<const uint32_t*>(&word);
}

template <typename Tile, typename T>
using PackedTile = Packed<T, Tile::kItems, Tile::kAligned>;

// Numbers in scan order, float32.
template <typename Tile, typename T>
__device__ __forceinline__ void unpack(const PackedTile<Tile, T>& packed,
                                       float (&x)[Tile::kItems]) {
#pragma unroll
  for (int i = 0; i < Tile::kItems; ++i) {
    if constexpr (sizeof(T) == 4) {
      x[Tile::order(i)] = __uint_as_float(packed.word[i]);
    } else if (i % 2 == 0) {
      const float2 pair = unpack_word(packed.word[i / 2], T());
      x[Tile::order(i)] = pair.x;
      x[Tile::order(i + 1)] = pair.y;
    }
  }
}

// Numbers in scan order to shared memory, in memory order.
template <typename Tile>
__device__ __forceinline__ void store_shared(const float (&x)[Tile::kItems], float* target) {
#pragma unroll
  for (int i = 0; i < Tile::kItems; i += 4) {
    reinterpret_cast<float4*>(target)[i / 4] =
        make_float4(x[Tile::order(i)], x[Tile::order(i + 1)], x[Tile::order(i + 2)],
                    x[Tile::order(i + 3)]);
  }
}

template <typename Tile, typename T>
__device__ __forceinline__ PackedTile<Tile, T> pack(const float (&x)[Tile::kItems]) {
  PackedTile<Tile, T> packed;
#pragma unroll
  for (int i = 0; i < Tile::kItems; ++i) {
    if constexpr (sizeof(T) == 4) {
      packed.word[i] = __float_as_uint(x[Tile::order(i)]);
    } else if (i % 2 == 0) {
      const float2 pair = make_float2(x[Tile::order(i)], x[Tile::order(i + 1)]);
      packed.word[i / 2] = pack_word(pair, T());
    }
  }
  return packed;
}

// scale * softplus(z) and the derivative of softplus. 16-bit inputs take the special-function unit
// in base 2, with a series where 1 + e would round e away; float32 inputs take the full-precision
// functions.
template <typename T>
struct Math {
  __device__ static float softplus(float z, float bias, float scale, float& slope) {
    const float z2 = fmaf(z, kLog2E, bias * kLog2E);
    const float e = ptx::exp2_approx(-fabsf(z2)), sum = 1.0f + e;
    const float series = e * fmaf(e, fmaf(e, kLog2E / 3.0f, -0.5f * kLog2E), kLog2E);
    slope = (z2 >= 0.0f ? 1.0f : e) * ptx::reciprocal_approx(sum);
    return scale * kLn2 * (fmaxf(z2, 0.0f) + (e < 0x1p-6f ? series : ptx::log2_approx(sum)));
  }
  // A as `decay` wants it.
  __device__ static float rate(float A) { return A * kLog2E; }
  __device__ static float decay(float delta, float rate) { return ptx::exp2_approx(delta * rate); }
};

template <>
struct Math<float> {
  __device__ static float softplus(float input, float bias, float scale, float& slope) {
    const float z = input + bias;
    const float e = expf(-fabsf(z));
    slope = (z >= 0.0f ? 1.0f : e) / (1.0f + e);
    return scale * (fmaxf(z, 0.0f) + log1pf(e));
  }
  __device__ static float rate(float A) { return A; }
  __device__ static float decay(float delta, float rate) { return expf(delta * rate); }
};

// delta and its slope from the packed input. Positions past the end get delta = 0: they pass the
// state on unchanged in both directions, whatever the bias. Their slope is 0 too, unless the whole
// lane lies past the end.
template <typename Tile, typename T>
__device__ __forceinline__ void make_delta(const PackedTile<Tile, T>& packed, float bias,
                                           bool softplus, int start, int length,
                                           float (&delta)[Tile::kItems],
                                           float (&slope)[Tile::kItems]) {
  unpack<Tile>(packed, delta);
  const float scale = start < length ? 1.0f : 0.0f;
  if (softplus) {
#pragma unroll
    for (int i = 0; i < Tile::kItems; ++i) {
      delta[i] = Math<T>::softplus(delta[i], bias, scale, slope[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < Tile::kItems; ++i) {
      delta[i] = scale * (delta[i] + bias);
      slope[i] = 1.0f;
    }
  }
  if constexpr (!Tile::kAligned) {
#pragma unroll
    for (int i = 0; i < Tile::kItems; ++i) {
      if (start + Tile::order(i) >= length) delta[i] = slope[i] = 0.0f;
    }
  }
}

// The map h -> decay * h + sum of a lane's items.
struct Segment {
  float decay, sum;
};

// Joins `own` with the segments of all earlier lanes (kUp) or all later lanes, and returns those
// alone.
template <bool kUp>
__device__ __forceinline__ Segment warp_scan(Segment& own, int lane) {
  const auto shift = [](float x, int by) {
    return kUp ? __shfl_up_sync(kAllLanes, x, by) : __shfl_down_sync(kAllLanes, x, by);
  };
  const int rank = kUp ? lane : kLanes - 1 - lane;
#pragma unroll
  for (int by = 1; by < kLanes; by *= 2) {
    const float decay = shift(own.decay, by), sum = shift(own.sum, by);
    if (rank >= by) {
      own.sum = fmaf(own.decay, sum, own.sum);
      own.decay *= decay;
    }
  }
  const float decay = shift(own.decay, 1), sum = shift(own.sum, 1);
  return rank ? Segment{decay, sum} : Segment{1.0f, 0.0f};
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int by = kLanes / 2; by; by /= 2) x += __shfl_xor_sync(kAllLanes, x, by);
  return x;
}

}  // namespace scan
