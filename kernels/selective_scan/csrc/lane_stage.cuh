// What a warp does around the walk over its channels: rows in and out, z and the gates, the state between warps.
#pragma once

#include "lane.cuh"

namespace scan::route::lane {

// ---- rows between the device's memory and a warp's ----

// Waits for the warp's copies, of all groups but the last `kLeft`.
template <int kLeft>
__device__ __forceinline__ void wait_async() {
  ptx::wait_async<kLeft>();
  __syncwarp();
}

// The tokens of a step, in the order of the walk; a position past the end has the table's last token.
template <typename M>
__device__ __forceinline__ void fetch_tokens(const Params& p, const Walk& w, const Step& s, M& memory) {
  if (w.lane < kRows) {
    const int row = p.select[static_cast<int64_t>(w.image) * p.select_row + s.pair];
    const int position = min(position_of(p, w, s, w.lane), p.l - 1);
    ptx::copy_async<4>(&memory.tokens[s.number % 4][w.lane], p.tables + static_cast<int64_t>(row) * p.l + position);
  }
}

// The step's rows of proj: two lanes a row, pairs of numbers where their count is even.
template <typename T, typename M>
__device__ __forceinline__ void fetch_proj(const Params& p, const Walk& w, const Step& s, M& memory) {
  const int row = w.lane / 2, odd = w.lane % 2;
  const T* from = static_cast<const T*>(p.proj) + proj_row(p, w, s, memory.tokens[s.number % 4][row]) * p.m;
  T* to = memory.rows[s.number % 2][row];
  if (p.m % 2 == 0) {
    for (int i = 2 * odd; i < p.m; i += 4) ptx::copy_async<4>(to + i, from + i);
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
    ptx::copy_async<16>(&to[row][part], from);
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

// The rows of a tile past the end of the table: nothing comes back from there.
template <int kC, typename T>
__device__ __forceinline__ void clear_tail(const Params& p, const Walk& w, const Step& s, Tile<T, kC>& tile) {
  if (is_whole(p, w, s)) return;
  for (int j = 0; j < kRows; ++j) {
    if (position_of(p, w, s, j) < p.l) continue;
    for (auto& number : tile[j]) number = 0.f;
  }
  __syncwarp();
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

// ---- the warp's way through its chunks: forwards, or as the backward pass goes, from the last to the first ----

template <bool kBackward>
__device__ __forceinline__ Step first_step(const Params& p, const Walk& w) {
  return {p.pair, kBackward ? p.chunks - 1 - w.turn : w.turn, 0};
}

// The next chunk: of the route, then of the next pair's.
template <bool kBackward>
__device__ __forceinline__ Step next_step(const Params& p, const Walk& w, Step s) {
  ++s.number;
  s.index += kBackward ? -p.relay : p.relay;
  if (kBackward ? s.index < 0 : s.index >= p.chunks) s.index = first_step<kBackward>(p, w).index, ++s.pair;
  return s;
}

// Asks for what the first step needs. fetch(step): asks for the step's rows, whose tokens are there.
template <bool kBackward, typename M, typename Fetch>
__device__ __forceinline__ void start_walk(const Params& p, const Walk& w, M& memory, Fetch&& fetch) {
  const Step step = first_step<kBackward>(p, w), after = next_step<kBackward>(p, w, step);
  clear(memory);
  fetch_tokens(p, w, step, memory);
  if (after.pair < p.end_pair) fetch_tokens(p, w, after, memory);
  ptx::commit_async();
  wait_async<0>();
  fetch(step);
  ptx::commit_async();
}

// Asks for what the next steps need, when the rows of this one have come.
template <bool kBackward, typename M, typename Fetch>
__device__ __forceinline__ void fetch_ahead(const Params& p, const Walk& w, const Step& s, M& memory, Fetch&& fetch) {
  const Step after = next_step<kBackward>(p, w, s), later = next_step<kBackward>(p, w, after);
  if (after.pair < p.end_pair) fetch(after);
  if (later.pair < p.end_pair) fetch_tokens(p, w, later, memory);
  ptx::commit_async();
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
  for (int k = 0; k < kK; ++k) ptx::load_matrix(a[k], &rows[w.lane % 16][16 * k + w.lane / 16 * 8]);
#pragma unroll
  for (int t = 0; t < S::kTiles; ++t) {
    float c[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int k = 0; k < kK; ++k) {
      const uint4 b = weight(t * kK + k);
      ptx::mma_half<T>(c, a[k], b.z, b.w);
      ptx::mma_half<T>(c, a[k], b.x, b.y);
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
  load_floats<kC>(p.enter + span_of(p, w, s), p.segments > 1 && w.active, r.carry);
  return r;
}

// The warps of a strip take its chunks in turns: each says what its chunk makes of the state (factor x state + gain), and
// finds out the state that enters its own; r.carry moves on by a chunk of each. `memory`: of this warp.
template <int kC, typename M>
__device__ __forceinline__ void relay(const Params& p, const Walk& w, const Step& s, const M& memory, Route<kC>& r,
                                      const float (&factor)[kC], const float (&gain)[kC], float (&enter)[kC]) {
  const int warp = threadIdx.x / kWarp;
  const M* end = &memory - warp + 2 * p.group * p.relay;
  Turn<kC>* turns = reinterpret_cast<Turn<kC>*>(const_cast<M*>(end)) + warp - w.turn;
#pragma unroll
  for (int c = 0; c < kC; ++c) turns[w.turn][s.number % 2][kC * w.lane + c] = make_float2(factor[c], gain[c]);
  ptx::barrier(3 + warp / p.relay, p.relay * kWarp);
  for (int turn = 0; turn < p.relay; ++turn) {
#pragma unroll
    for (int c = 0; c < kC; ++c) {
      const float2 v = turns[turn][s.number % 2][kC * w.lane + c];
      if (turn == w.turn) enter[c] = r.carry[c];
      r.carry[c] = fmaf(v.x, r.carry[c], v.y);
    }
  }
}

// Launches a kernel whose warps have an M each.
template <int kC, typename M>
void launch(void (*kernel)(Params), const Params& p, cudaStream_t stream) {
  const int warps = 2 * p.group * p.relay;
  const int bytes = warps * static_cast<int>(sizeof(M) + (p.relay > 1 ? sizeof(Turn<kC>) : 0));
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), kOp);
  kernel<<<static_cast<unsigned>(int64_t{p.b} * p.segments * p.slabs), warps * kWarp, bytes, stream>>>(p);
  check_launch(kOp);
}

// The same for a kernel that walks the pairs of routes: where there are segments, one pair at a time.
template <int kC, typename M>
void launch_pairs(void (*kernel)(Params), Params p, cudaStream_t stream) {
  const int pairs = p.end_pair, step = p.segments > 1 ? 1 : pairs;
  for (p.pair = 0; p.pair < pairs; p.pair += step) {
    p.end_pair = p.pair + step;
    launch<kC, M>(kernel, p, stream);
  }
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

}  // namespace scan::route::lane
