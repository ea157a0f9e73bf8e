// The route scan on the CPU, in float32. A task takes some images and a slab of channels; in it kWidth channels at a
// time walk a route chunk by chunk, gathered so that positions follow the route, in the loops of scan_cpu.h.
#include "route.h"
#include "scan_cpu.h"

#include <memory>

namespace scan::route {
namespace {

using cpu::kWidth;
using Tile = float[kChunk * kWidth];
using Line = float[kChunk];
using Lanes = float[kWidth];

// Everything as float32 in token order; grad members only in the backward pass.
struct Data {
  Inputs in;
  int64_t chunks, weights;  // weights: sums per channel, r + 2 + n
  const float *x, *proj, *weight, *bias, *A, *D, *dy = nullptr;
  float *y = nullptr, *states = nullptr;
  float *dx = nullptr, *dproj = nullptr, *dweights = nullptr;
};

// Tokens of a chunk in the order of a route, and their numbers [dt, B, C].
struct Chunk {
  int64_t count, token[kChunk];
  const float* row[kChunk];

  void load(const Data& data, int64_t image, int64_t route, int64_t index) {
    const auto& s = data.in.size;
    const int* tables = static_cast<const int*>(data.in.tables.const_data_ptr());
    const int* select = static_cast<const int*>(data.in.select.const_data_ptr());
    const int64_t pick = data.in.select.size(0) == 1 ? route : image * s.k + route;
    const int* table = tables + int64_t{select[pick]} * s.l;
    const int64_t start = index * kChunk;
    count = std::min<int64_t>(kChunk, s.l - start);
    const bool reversed = is_reversed(data.in.reverse, route);
    for (int64_t t = 0; t < count; ++t) {
      token[t] = table[reversed ? s.l - 1 - start - t : start + t];
      row[t] = data.proj + ((image * s.l + token[t]) * s.k + route) * s.m;
    }
  }
};

// Channels [first, first + count) of one image and route, with their parameters laid out for the lanes.
struct Block {
  int64_t image, route, first, count;
  Lanes bias, D;
  std::vector<float> weight, A;  // (r, kWidth), (n, kWidth)

  Block(const Data& data, int64_t image, int64_t route, int64_t first)
      : image(image), route(route), first(first), bias{}, D{} {
    const auto& s = data.in.size;
    count = std::min<int64_t>(kWidth, s.d - first);
    weight.assign(s.r * kWidth, 0.0f);
    A.assign(s.n * kWidth, 0.0f);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t channel = route * s.d + first + i;
      bias[i] = data.bias[channel], D[i] = data.D[channel];
      for (int64_t j = 0; j < s.r; ++j) weight[j * kWidth + i] = data.weight[channel * s.r + j];
      for (int64_t j = 0; j < s.n; ++j) A[j * kWidth + i] = data.A[channel * s.n + j];
    }
  }

  // The state that enters a chunk of this route, as kept by the forward pass, or null for the first one.
  float* entering(const Data& data, int64_t chunk, int64_t state) const {
    const auto& s = data.in.size;
    if (chunk == 0) return nullptr;
    return data.states + (((image * s.k + route) * (data.chunks - 1) + chunk - 1) * s.n + state) * s.d + first;
  }
};

// Rows of `from` (b, l, d) at the chunk's tokens, missing channels zero.
void gather(const float* from, const Data& data, const Block& block, const Chunk& chunk, float* tile) {
  const auto& s = data.in.size;
  for (int64_t t = 0; t < chunk.count; ++t) {
    const float* at = from + (block.image * s.l + chunk.token[t]) * s.d + block.first;
    std::memcpy(tile + t * kWidth, at, block.count * sizeof(float));
    for (int64_t i = block.count; i < kWidth; ++i) tile[t * kWidth + i] = 0.0f;
  }
}

void scatter_add(const float* tile, const Data& data, const Block& block, const Chunk& chunk, float* to) {
  const auto& s = data.in.size;
  for (int64_t t = 0; t < chunk.count; ++t) {
    float* at = to + (block.image * s.l + chunk.token[t]) * s.d + block.first;
    for (int64_t i = 0; i < block.count; ++i) at[i] += tile[t * kWidth + i];
  }
}

// z <- dt_weight dt. weight: (r, kWidth).
SCAN_CLONES static void expand(const Chunk& chunk, const float* __restrict__ weight, int64_t r,
                               float* __restrict__ z) {
  for (int64_t t = 0; t < chunk.count; ++t) {
    const float* row = chunk.row[t];
    Lanes sum = {};
    for (int64_t j = 0; j < r; ++j) {
#pragma omp simd
      for (int i = 0; i < kWidth; ++i) sum[i] += row[j] * weight[j * kWidth + i];
    }
    std::memcpy(z + t * kWidth, sum, sizeof sum);
  }
}

// The adjoint of `expand`: ddt (positions, r) += dz weight^T, dweight (r, kWidth) += dt^T dz.
SCAN_CLONES static void contract(const Chunk& chunk, const float* __restrict__ dz, const float* __restrict__ weight,
                                 int64_t r, float* const* ddt, float* __restrict__ dweight) {
  for (int64_t t = 0; t < chunk.count; ++t) {
    const float *row = chunk.row[t], *__restrict__ g = dz + t * kWidth;
    float* __restrict__ to = ddt[t];
    for (int64_t j = 0; j < r; ++j) {
      float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
      for (int i = 0; i < kWidth; ++i) {
        sum += g[i] * weight[j * kWidth + i];
        dweight[j * kWidth + i] += g[i] * row[j];
      }
      to[j] += sum;
    }
  }
}

void gates(const Chunk& chunk, const Sizes& s, int64_t state, float* B, float* C) {
  for (int64_t t = 0; t < chunk.count; ++t) {
    B[t] = chunk.row[t][s.r + state];
    C[t] = chunk.row[t][s.r + s.n + state];
  }
}

struct Buffers {
  Chunk chunk;
  Tile dt, slope, u, x, y, dy, decay, kept, du, ddt;
  Line B, C, dB, dC;
};

void forward_block(const Data& data, const Block& block, Buffers& buf) {
  const auto& s = data.in.size;
  std::vector<float> h(s.n * kWidth, 0.0f);
  for (int64_t index = 0; index < data.chunks; ++index) {
    buf.chunk.load(data, block.image, block.route, index);
    const int64_t count = buf.chunk.count;
    gather(data.x, data, block, buf.chunk, buf.x);
    expand(buf.chunk, block.weight.data(), s.r, buf.dt);
    cpu::make_delta(buf.dt, buf.slope, block.bias, true, count);
    cpu::make_drive(buf.dt, block.D, buf.x, buf.y, count);
    for (int64_t i = 0; i < s.n; ++i) {
      float* const enter = block.entering(data, index, i);
      if (enter) std::memcpy(enter, &h[i * kWidth], block.count * sizeof(float));
      gates(buf.chunk, s, i, buf.B, buf.C);
      cpu::scan_tile(buf.dt, buf.x, &block.A[i * kWidth], buf.B, buf.C, &h[i * kWidth], buf.y, count);
    }
    scatter_add(buf.y, data, block, buf.chunk, data.y);
  }
}

// A route's sums for the lanes of a block, rows [dt_weight (r), dt_bias, D, A (n)] of kWidth, added to `to` (d, weights).
void add_sums(const std::vector<float>& sums, const Data& data, const Block& block, float* to) {
  for (int64_t i = 0; i < block.count; ++i) {
    for (int64_t j = 0; j < data.weights; ++j) to[(block.first + i) * data.weights + j] += sums[j * kWidth + i];
  }
}

void backward_block(const Data& data, const Block& block, Buffers& buf, float* dproj, float* dweights) {
  const auto& s = data.in.size;
  std::vector<float> carry(s.n * kWidth, 0.0f), sums(data.weights * kWidth, 0.0f);
  float *dbias = &sums[s.r * kWidth], *dD = dbias + kWidth, *dA = dD + kWidth;
  const cpu::AdjointTile tile{buf.dt, buf.u, buf.dy, buf.decay, buf.kept, buf.du, buf.ddt};
  for (int64_t index = data.chunks - 1; index >= 0; --index) {
    buf.chunk.load(data, block.image, block.route, index);
    const int64_t count = buf.chunk.count;
    gather(data.x, data, block, buf.chunk, buf.u);
    gather(data.dy, data, block, buf.chunk, buf.dy);
    expand(buf.chunk, block.weight.data(), s.r, buf.dt);
    cpu::make_delta(buf.dt, buf.slope, block.bias, true, count);
    cpu::start_adjoint(tile, block.D, buf.x, dD, count);
    float* row[kChunk];
    for (int64_t t = 0; t < count; ++t) row[t] = dproj + (buf.chunk.row[t] - data.proj);
    for (int64_t i = 0; i < s.n; ++i) {
      Lanes h = {};
      if (const float* enter = block.entering(data, index, i)) std::memcpy(h, enter, block.count * sizeof(float));
      gates(buf.chunk, s, i, buf.B, buf.C);
      std::fill(buf.dB, buf.dB + kChunk, 0.0f);
      std::fill(buf.dC, buf.dC + kChunk, 0.0f);
      const float* A = &block.A[i * kWidth];
      cpu::rescan_tile(buf.dt, buf.x, buf.dy, A, buf.B, h, buf.decay, buf.kept, buf.dC, count);
      cpu::adjoint_tile(tile, A, buf.B, buf.C, &carry[i * kWidth], dA + i * kWidth, buf.dB, count);
      for (int64_t t = 0; t < count; ++t) {
        row[t][s.r + i] += buf.dB[t];
        row[t][s.r + s.n + i] += buf.dC[t];
      }
    }
    cpu::finish_adjoint(buf.slope, buf.ddt, dbias, count);
    contract(buf.chunk, buf.ddt, block.weight.data(), s.r, row, sums.data());
    scatter_add(buf.du, data, block, buf.chunk, data.dx);
  }
  add_sums(sums, data, block, dweights + block.route * s.d * data.weights);
}

Data make_data(const Inputs& given) {
  Inputs in = given;
  in.x = to_dtype(given.x, kFloat);
  in.proj = to_dtype(given.proj, kFloat);
  const auto pointer = [](const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); };
  Data data{in, ceil_div(in.size.l, kChunk), in.size.r + 2 + in.size.n, pointer(in.x), pointer(in.proj),
            pointer(in.weight), pointer(in.bias), pointer(in.A), pointer(in.D)};
  return data;
}

// Calls f(route, first channel) for the slab's blocks of channels, then the next route.
template <typename Function>
void for_blocks(const Sizes& s, int64_t slab, int64_t slabs, Function&& f) {
  for (int64_t route = 0; route < s.k; ++route) {
    for (int64_t first = slab * kWidth; first < s.d; first += slabs * kWidth) f(route, first);
  }
}

ForwardResult forward_cpu(const Tensor& x, const Tensor& proj, const Tensor& weight, const Tensor& bias,
                          const Tensor& A, const Tensor& D, const Tensor& tables, const Tensor& select,
                          int64_t reverse, bool out_float) {
  const Inputs in = make_inputs(x, proj, weight, bias, A, D, tables, select, reverse);
  const auto& s = in.size;
  Data data = make_data(in);
  const Tensor y = zeros_like_on(x, {s.b, s.l, s.d}, kFloat);
  const Tensor states = empty_like_on(x, {s.b, s.k, std::max<int64_t>(data.chunks - 1, 0), s.n, s.d}, kFloat);
  data.y = static_cast<float*>(y.mutable_data_ptr());
  data.states = static_cast<float*>(states.mutable_data_ptr());
  const int64_t slabs = ceil_div(s.d, kWidth);
  torch::stable::parallel_for(0, s.b * slabs, 1, [&](int64_t begin, int64_t end) {
    const auto buffers = std::make_unique<Buffers>();
    for (int64_t i = begin; i < end; ++i) {
      for_blocks(s, i % slabs, slabs, [&](int64_t route, int64_t first) {
        forward_block(data, Block(data, i / slabs, route, first), *buffers);
      });
    }
  });
  return {out_float ? y : to_dtype(y, x.scalar_type()), states};
}

BackwardResult backward_cpu(const Tensor& dy, const Tensor& x, const Tensor& proj, const Tensor& weight,
                            const Tensor& bias, const Tensor& A, const Tensor& D, const Tensor& tables,
                            const Tensor& select, const Tensor& states, int64_t reverse) {
  const Inputs in = make_inputs(x, proj, weight, bias, A, D, tables, select, reverse);
  check_gradient(in, dy);
  const auto& s = in.size;
  Data data = make_data(in);
  const Tensor gradient = torch::stable::contiguous(to_dtype(dy, kFloat)), kept = torch::stable::contiguous(states);
  // A task sums the gradients of the weights over its images, and those of proj over its slab of channels.
  const int64_t threads = torch::stable::get_num_threads(), blocks = ceil_div(s.d, kWidth);
  const int64_t groups = std::max<int64_t>(std::min(s.b, threads), 1);
  const int64_t slabs = std::max<int64_t>(std::min(ceil_div(threads, groups), blocks), 1);
  const Tensor dx = zeros_like_on(x, {s.b, s.l, s.d}, kFloat);
  const Tensor dproj = zeros_like_on(x, {slabs, s.b, s.l, s.k, s.m}, kFloat);
  const Tensor dweights = zeros_like_on(x, {groups, s.k, s.d, data.weights}, kFloat);
  data.dy = static_cast<const float*>(gradient.const_data_ptr());
  data.states = static_cast<float*>(kept.mutable_data_ptr());
  data.dx = static_cast<float*>(dx.mutable_data_ptr());
  torch::stable::parallel_for(0, groups * slabs, 1, [&](int64_t begin, int64_t end) {
    const auto buffers = std::make_unique<Buffers>();
    for (int64_t i = begin; i < end; ++i) {
      float* const to = static_cast<float*>(dproj.mutable_data_ptr()) + i % slabs * s.b * s.l * s.k * s.m;
      float* const sums = static_cast<float*>(dweights.mutable_data_ptr()) + i / slabs * s.k * s.d * data.weights;
      for (int64_t image = i / slabs; image < s.b; image += groups) {
        for_blocks(s, i % slabs, slabs, [&](int64_t route, int64_t first) {
          backward_block(data, Block(data, image, route, first), *buffers, to, sums);
        });
      }
    }
  });
  Tensor sums = sum_dim(dweights, 0);
  const auto part = [&](int64_t start, int64_t length) {
    return torch::stable::contiguous(torch::stable::narrow(sums, 2, start, length));
  };
  const auto flat = [&](int64_t start) {
    return torch::stable::reshape(part(start, 1), {s.k, s.d});
  };
  return {to_dtype(dx, x.scalar_type()), to_dtype(sum_dim(dproj, 0), x.scalar_type()),
          part(0, s.r), flat(s.r), part(s.r + 2, s.n), flat(s.r + 1)};
}

}  // namespace
}  // namespace scan::route

STABLE_TORCH_LIBRARY_IMPL(selective_scan, CPU, m) {
  m.impl("route_scan_fwd", TORCH_BOX(&scan::route::forward_cpu));
  m.impl("route_scan_bwd", TORCH_BOX(&scan::route::backward_cpu));
}
