// The route scan on the CPU, in float32. A task takes some images and a slab of channels. It walks a route chunk by
// chunk and in each, while its rows are in cache, goes through blocks of kWidth channels, gathered so that positions
// follow the route, in the loops of scan_cpu.h.
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
    const int64_t columns = data.in.select.size(1), from = data.in.select.size(0) == 1 ? 0 : image;
    const int64_t pick = from * columns + route % columns;
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
  std::vector<float> state;      // (n, kWidth): what crosses to the next chunk of the walk
  std::vector<float> sums;       // backward: rows [dt_weight (r), dt_bias, D, A (n)] of kWidth

  Block(const Data& data, int64_t image, int64_t route, int64_t first)
      : image(image), route(route), first(first), bias{}, D{} {
    const auto& s = data.in.size;
    count = std::min<int64_t>(kWidth, s.d - first);
    weight.assign(s.r * kWidth, 0.0f);
    A.assign(s.n * kWidth, 0.0f);
    state.assign(s.n * kWidth, 0.0f);
    sums.assign(data.weights * kWidth, 0.0f);
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

// Rows of `from` (b, l, d) at the chunk's tokens, missing channels zero. A full block copies a length known here.
void gather(const float* from, const Data& data, const Block& block, const Chunk& chunk, float* tile) {
  const auto& s = data.in.size;
  for (int64_t t = 0; t < chunk.count; ++t, tile += kWidth) {
    const float* at = from + (block.image * s.l + chunk.token[t]) * s.d + block.first;
    if (block.count == kWidth) {
      std::memcpy(tile, at, sizeof(Lanes));
    } else {
      std::fill(std::copy(at, at + block.count, tile), tile + kWidth, 0.0f);
    }
  }
}

SCAN_CLONES static void add_lanes(const float* __restrict__ from, float* __restrict__ to) {
#pragma omp simd
  for (int i = 0; i < kWidth; ++i) to[i] += from[i];
}

void scatter_add(const float* tile, const Data& data, const Block& block, const Chunk& chunk, float* to) {
  const auto& s = data.in.size;
  for (int64_t t = 0; t < chunk.count; ++t, tile += kWidth) {
    float* at = to + (block.image * s.l + chunk.token[t]) * s.d + block.first;
    if (block.count == kWidth) {
      add_lanes(tile, at);
    } else {
      for (int64_t i = 0; i < block.count; ++i) at[i] += tile[i];
    }
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
  float turned[kWidth][kChunk], *lines[kWidth];
  for (int i = 0; i < kWidth; ++i) lines[i] = turned[i];
  cpu::tile_to_rows(dz, chunk.count, false, kWidth, lines);
  for (int64_t j = 0; j < r; ++j) {
    Line sum = {};
    for (int i = 0; i < kWidth; ++i) {
      const float w = weight[j * kWidth + i];
#pragma omp simd
      for (int64_t t = 0; t < chunk.count; ++t) sum[t] += turned[i][t] * w;
    }
    Lanes own = {};
    for (int64_t t = 0; t < chunk.count; ++t) {
      const float value = chunk.row[t][j];
      ddt[t][j] += sum[t];
#pragma omp simd
      for (int i = 0; i < kWidth; ++i) own[i] += dz[t * kWidth + i] * value;
    }
    for (int i = 0; i < kWidth; ++i) dweight[j * kWidth + i] += own[i];
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

void forward_chunk(const Data& data, Block& block, int64_t index, Buffers& buf) {
  const auto& s = data.in.size;
  const int64_t count = buf.chunk.count;
  gather(data.x, data, block, buf.chunk, buf.x);
  expand(buf.chunk, block.weight.data(), s.r, buf.dt);
  cpu::make_delta(buf.dt, buf.slope, block.bias, true, count);
  cpu::make_drive(buf.dt, block.D, buf.x, buf.y, count);
  for (int64_t i = 0; i < s.n; ++i) {
    float *const enter = block.entering(data, index, i), *const h = &block.state[i * kWidth];
    if (enter) std::memcpy(enter, h, block.count * sizeof(float));
    gates(buf.chunk, s, i, buf.B, buf.C);
    cpu::scan_tile(buf.dt, buf.x, &block.A[i * kWidth], buf.B, buf.C, h, buf.y, count);
  }
  scatter_add(buf.y, data, block, buf.chunk, data.y);
}

void backward_chunk(const Data& data, Block& block, int64_t index, Buffers& buf, float* const* row) {
  const auto& s = data.in.size;
  const int64_t count = buf.chunk.count;
  float *dbias = &block.sums[s.r * kWidth], *dD = dbias + kWidth, *dA = dD + kWidth;
  const cpu::AdjointTile tile{buf.dt, buf.u, buf.dy, buf.decay, buf.kept, buf.du, buf.ddt};
  gather(data.x, data, block, buf.chunk, buf.u);
  gather(data.dy, data, block, buf.chunk, buf.dy);
  expand(buf.chunk, block.weight.data(), s.r, buf.dt);
  cpu::make_delta(buf.dt, buf.slope, block.bias, true, count);
  cpu::start_adjoint(tile, block.D, buf.x, dD, count);
  for (int64_t i = 0; i < s.n; ++i) {
    Lanes h = {};
    if (const float* enter = block.entering(data, index, i)) std::memcpy(h, enter, block.count * sizeof(float));
    gates(buf.chunk, s, i, buf.B, buf.C);
    std::fill(buf.dB, buf.dB + count, 0.0f);
    std::fill(buf.dC, buf.dC + count, 0.0f);
    const float* A = &block.A[i * kWidth];
    cpu::rescan_tile(buf.dt, buf.x, buf.dy, A, buf.B, h, buf.decay, buf.kept, buf.dC, count);
    cpu::adjoint_tile(tile, A, buf.B, buf.C, &block.state[i * kWidth], dA + i * kWidth, buf.dB, count);
    for (int64_t t = 0; t < count; ++t) {
      row[t][s.r + i] += buf.dB[t];
      row[t][s.r + s.n + i] += buf.dC[t];
    }
  }
  cpu::finish_adjoint(buf.slope, buf.ddt, dbias, count);
  contract(buf.chunk, buf.ddt, block.weight.data(), s.r, row, block.sums.data());
  scatter_add(buf.du, data, block, buf.chunk, data.dx);
}

// The slab's blocks of an image and route.
std::vector<Block> make_blocks(const Data& data, int64_t image, int64_t route, int64_t slab, int64_t slabs) {
  std::vector<Block> blocks;
  for (int64_t first = slab * kWidth; first < data.in.size.d; first += slabs * kWidth) {
    blocks.emplace_back(data, image, route, first);
  }
  return blocks;
}

void forward_route(const Data& data, std::vector<Block> blocks, Buffers& buf) {
  for (int64_t index = 0; index < data.chunks; ++index) {
    buf.chunk.load(data, blocks[0].image, blocks[0].route, index);
    for (Block& block : blocks) forward_chunk(data, block, index, buf);
  }
}

// dproj (b, l, k, m) and dweights (k, d, weights) are this task's own.
void backward_route(const Data& data, std::vector<Block> blocks, Buffers& buf, float* dproj, float* dweights) {
  float* row[kChunk];
  for (int64_t index = data.chunks - 1; index >= 0; --index) {
    buf.chunk.load(data, blocks[0].image, blocks[0].route, index);
    for (int64_t t = 0; t < buf.chunk.count; ++t) row[t] = dproj + (buf.chunk.row[t] - data.proj);
    for (Block& block : blocks) backward_chunk(data, block, index, buf, row);
  }
  for (const Block& block : blocks) {
    float* to = dweights + (block.route * data.in.size.d + block.first) * data.weights;
    for (int64_t i = 0; i < block.count; ++i, to += data.weights) {
      for (int64_t j = 0; j < data.weights; ++j) to[j] += block.sums[j * kWidth + i];
    }
  }
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

// Shares of the channels, so that every thread has work where there are fewer images than threads.
int64_t count_slabs(const Sizes& s) {
  const int64_t threads = torch::stable::get_num_threads(), blocks = ceil_div(s.d, kWidth);
  return std::max<int64_t>(std::min(ceil_div(threads, std::max<int64_t>(s.b, 1)), blocks), 1);
}

ForwardResult forward_cpu(const Tensor& x, const Tensor& proj, const Tensor& weight, const Tensor& bias,
                          const Tensor& A, const Tensor& D, const Tensor& tables, const Tensor& select,
                          int64_t reverse, bool out_float) {
  const Inputs in = make_inputs(x, proj, weight, bias, A, D, tables, select, reverse);
  const auto& s = in.size;
  Data data = make_data(in);
  const Tensor y = zeros_like_on(x, {s.b, s.l, s.d}, kFloat);
  const Tensor states = empty_like_on(x, {s.b, s.k, std::max<int64_t>(data.chunks - 1, 0), s.n, s.d}, kFloat);
  if (y.numel() == 0) return {out_float ? y : to_dtype(y, x.scalar_type()), states};
  data.y = static_cast<float*>(y.mutable_data_ptr());
  data.states = static_cast<float*>(states.mutable_data_ptr());
  const int64_t slabs = count_slabs(s);
  torch::stable::parallel_for(0, s.b * slabs, 1, [&](int64_t begin, int64_t end) {
    const auto buffers = std::make_unique<Buffers>();
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t route = 0; route < s.k; ++route) {
        forward_route(data, make_blocks(data, i / slabs, route, i % slabs, slabs), *buffers);
      }
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
  const int64_t groups = std::max<int64_t>(std::min<int64_t>(s.b, torch::stable::get_num_threads()), 1);
  const int64_t slabs = count_slabs(s);
  const Tensor dx = zeros_like_on(x, {s.b, s.l, s.d}, kFloat);
  const Tensor dproj = zeros_like_on(x, {slabs, s.b, s.l, s.k, s.m}, kFloat);
  const Tensor dweights = zeros_like_on(x, {groups, s.k, s.d, data.weights}, kFloat);
  data.dy = static_cast<const float*>(gradient.const_data_ptr());
  data.states = static_cast<float*>(kept.mutable_data_ptr());
  data.dx = static_cast<float*>(dx.mutable_data_ptr());
  torch::stable::parallel_for(0, dx.numel() ? groups * slabs : 0, 1, [&](int64_t begin, int64_t end) {
    const auto buffers = std::make_unique<Buffers>();
    for (int64_t i = begin; i < end; ++i) {
      float* const to = static_cast<float*>(dproj.mutable_data_ptr()) + i % slabs * s.b * s.l * s.k * s.m;
      float* const sums = static_cast<float*>(dweights.mutable_data_ptr()) + i / slabs * s.k * s.d * data.weights;
      for (int64_t image = i / slabs; image < s.b; image += groups) {
        for (int64_t route = 0; route < s.k; ++route) {
          backward_route(data, make_blocks(data, image, route, i % slabs, slabs), *buffers, to, sums);
        }
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
