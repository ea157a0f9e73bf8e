// Selective scan on the CPU. A task takes kWidth channels that share B and C, transposes their rows
// tile by tile so that the channels lie side by side, and runs the loops of scan_cpu.h; tasks are
// shared out by PyTorch's threads.
#include "scan_cpu.h"
#include "selective_scan.h"

#include <memory>
#include <type_traits>
#include <utility>

namespace scan {
namespace {

using cpu::kWidth;
constexpr int64_t kMaxChunk = 256;
// The odd cache lines at the end keep tiles that are used together out of each other's cache sets.
using TileBuffer = float[kMaxChunk * kWidth + 5 * kWidth];

using Line = float[kMaxChunk];

// A row's place in memory for scan positions start .. start + count.
int64_t memory_start(int64_t length, bool reverse, int64_t start, int64_t count) {
  return reverse ? length - start - count : start;
}

// The rows of the channels of one task, read and written tile by tile in scan order.
template <typename T>
struct Rows {
  T* row[kWidth];
  int64_t length;
  bool reverse;

  // Channels first .. first + kWidth of an image, `share` neighbours to a row. `count` of them
  // exist, the others repeat the last one.
  Rows(T* image, int64_t stride, int64_t first, int64_t count, int64_t length, bool reverse,
       int64_t share = 1)
      : length(length), reverse(reverse) {
    for (int64_t i = 0; i < kWidth; ++i) {
      row[i] = image + (first + std::min(i, count - 1)) / share * stride;
    }
  }

  void read(int64_t start, int64_t count, float* tile) const {
    const int64_t at = memory_start(length, reverse, start, count);
    const float* source[kWidth];
    Line converted[std::is_same_v<std::remove_const_t<T>, float> ? 1 : kWidth];
    for (int i = 0; i < kWidth; ++i) {
      if constexpr (std::is_same_v<std::remove_const_t<T>, float>) {
        source[i] = row[i] + at;
      } else {
        for (int64_t t = 0; t < count; ++t) converted[i][t] = static_cast<float>(row[i][at + t]);
        source[i] = converted[i];
      }
    }
    cpu::rows_to_tile(source, count, reverse, tile);
  }

  void write(int64_t start, int64_t count, const float* tile, int64_t channels) const {
    const int64_t at = memory_start(length, reverse, start, count);
    float* target[kWidth];
    Line converted[std::is_same_v<T, float> ? 1 : kWidth];
    for (int i = 0; i < kWidth; ++i) {
      if constexpr (std::is_same_v<T, float>) {
        target[i] = row[i] + at;
      } else {
        target[i] = converted[i];
      }
    }
    cpu::tile_to_rows(tile, count, reverse, channels, target);
    if constexpr (!std::is_same_v<T, float>) {
      for (int64_t i = 0; i < channels; ++i) {
        for (int64_t t = 0; t < count; ++t) row[i][at + t] = static_cast<T>(converted[i][t]);
      }
    }
  }
};

// One task: channels [first, first + count) of an image, all of group g.
struct Task {
  int64_t image, g, first, count;
};

Task make_task(const Sizes& s, int64_t image, int64_t g, int64_t block) {
  const int64_t at = block * kWidth;
  return {image, g, g * s.group + at, std::min<int64_t>(kWidth, s.group - at)};
}

int64_t blocks_per_group(const Sizes& s) { return ceil_div(s.group, kWidth); }

template <typename T>
const T* typed(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

template <typename T>
Rows<const T> read_rows(const Tensor& tensor, const Task& task, const Inputs& in,
                        int64_t share = 1) {
  return {typed<T>(tensor) + task.image * tensor.stride(0), tensor.stride(1), task.first,
          task.count,  in.size.l, in.reverse, share};
}

template <typename T>
Rows<T> write_rows(const Tensor& tensor, const Task& task, const Inputs& in) {
  return {static_cast<T*>(tensor.mutable_data_ptr()) + task.image * tensor.stride(0),
          tensor.stride(1), task.first, task.count, in.size.l, in.reverse};
}

// One state's B or C at positions start .. start + count, in scan order.
template <typename T>
void read_line(const Tensor& tensor, const Task& task, int64_t s, const Inputs& in, int64_t start,
               int64_t count, float* line) {
  const T* row = typed<T>(tensor) + task.image * tensor.stride(0) + task.g * tensor.stride(1) +
                 s * tensor.stride(2);
  const T* memory = row + memory_start(in.size.l, in.reverse, start, count);
  for (int64_t t = 0; t < count; ++t) {
    line[in.reverse ? count - 1 - t : t] = static_cast<float>(memory[t]);
  }
}

// Parameters of the task's channels, state-major: A (n, kWidth), D and bias (kWidth).
struct Parameters {
  std::vector<float> A;
  float D[kWidth], bias[kWidth];

  Parameters(const Inputs& in, const Task& task) : A(in.size.n * kWidth) {
    const float *all_A = typed<float>(in.A), *all_D = float_pointer(in.D);
    const float* all_bias = float_pointer(in.bias);
    for (int64_t i = 0; i < kWidth; ++i) {
      const int64_t channel = task.first + std::min(i, task.count - 1);
      D[i] = all_D ? all_D[channel] : 0.0f;
      bias[i] = all_bias ? all_bias[channel / in.size.share] : 0.0f;
      for (int64_t s = 0; s < in.size.n; ++s) A[s * kWidth + i] = all_A[channel * in.size.n + s];
    }
  }
};

// Copies states (n, kWidth) of the task's channels to `target`, channel rows `stride` floats apart.
void write_states(const std::vector<float>& states, const Task& task, float* target,
                  int64_t stride) {
  const int64_t n = static_cast<int64_t>(states.size()) / kWidth;
  for (int64_t i = 0; i < task.count; ++i) {
    for (int64_t s = 0; s < n; ++s) target[i * stride + s] = states[s * kWidth + i];
  }
}

// The same with the decay over the `elapsed` sum of delta before each state.
void write_pairs(const Parameters& p, const std::vector<double>& elapsed,
                 const std::vector<float>& states, const Task& task, float* target,
                 int64_t stride) {
  const int64_t n = static_cast<int64_t>(states.size()) / kWidth;
  for (int64_t i = 0; i < task.count; ++i) {
    for (int64_t s = 0; s < n; ++s) {
      float* pair = target + 2 * (i * stride + s);
      pair[0] = std::exp(static_cast<float>(elapsed[i] * p.A[s * kWidth + i]));
      pair[1] = states[s * kWidth + i];
    }
  }
}

void read_states(std::vector<float>& states, const Task& task, const float* source,
                 int64_t stride) {
  const int64_t n = static_cast<int64_t>(states.size()) / kWidth;
  for (int64_t i = 0; i < kWidth; ++i) {
    const bool real = i < task.count;
    for (int64_t s = 0; s < n; ++s) states[s * kWidth + i] = real ? source[i * stride + s] : 0.0f;
  }
}

template <typename T, typename Y>
void forward_task(const Inputs& in, const Task& task, int64_t keep, const ForwardResult& out) {
  const auto& [y, last, states] = out;
  const auto& s = in.size;
  const int64_t chunk = chunk_length(in.u.scalar_type()), row = task.image * s.d + task.first;
  const Parameters p(in, task);
  const auto u = read_rows<T>(in.u, task, in), delta = read_rows<T>(in.delta, task, in, s.share);
  const auto y_rows = write_rows<Y>(y, task, in);
  std::vector<float> h(s.n * kWidth, 0.0f);
  std::vector<double> elapsed(kWidth, 0.0);  // the sum of dt
  alignas(64) TileBuffer x, dt, slope, total;
  Line B, C;
  for (int64_t start = 0; start < s.l; start += chunk) {
    const int64_t count = std::min(chunk, s.l - start);
    float* kept = keep ? floats(states) + (row * s.chunks + start / chunk) * keep * s.n : nullptr;
    if (keep == kEntering) write_states(h, task, kept, s.chunks * s.n);
    u.read(start, count, x);
    delta.read(start, count, dt);
    cpu::make_delta(dt, slope, p.bias, in.softplus, count);
    cpu::make_drive(dt, p.D, x, total, count);
    for (int64_t n = 0; n < s.n; ++n) {
      read_line<T>(in.B, task, n, in, start, count, B);
      read_line<T>(in.C, task, n, in, start, count, C);
      cpu::scan_tile(dt, x, &p.A[n * kWidth], B, C, &h[n * kWidth], total, count);
    }
    y_rows.write(start, count, total, task.count);
    if (keep == kPairs) {
      for (int64_t i = 0; i < count * kWidth; ++i) elapsed[i % kWidth] += dt[i];
      write_pairs(p, elapsed, h, task, kept, s.chunks * s.n);
    }
  }
  write_states(h, task, floats(last) + row * s.n, s.n);
}

ForwardResult forward_cpu(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                          const Tensor& C, const OptionalTensor& D, const OptionalTensor& bias,
                          bool softplus, bool reverse, bool out_float, int64_t keep) {
  const Inputs in = make_inputs(u, delta, A, B, C, D, bias, softplus, reverse);
  const auto& s = in.size;
  const ForwardResult out{
      empty_like_on(u, {s.b, s.d, s.l}, out_float ? kFloat : u.scalar_type()),
      zeros_like_on(u, {s.b, s.d, s.n}, kFloat), empty_states(in, keep)};
  const int64_t blocks = blocks_per_group(s);
  dispatch_dtype(kOp, u.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    torch::stable::parallel_for(0, s.b * s.g * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Task task = make_task(s, i / blocks / s.g, i / blocks % s.g, i % blocks);
        const auto run = out_float ? forward_task<T, float> : forward_task<T, T>;
        run(in, task, keep, out);
      }
    });
  });
  return out;
}

// The inputs of a backward task beside those of the scan, and where its gradients go.
struct Backward {
  Tensor dy, states;
  OptionalTensor dlast;
  BackwardResult parts;  // dA (b, d, n), dB and dC (b, g, slabs, n, l), dD and dbias (b, d)
};

// Buffers of one backward task.
struct alignas(64) Buffers {
  TileBuffer u, dt, slope, dy, x, du, ddt, decay, kept;
  Line B, C, dB, dC;
  float dD[kWidth], dbias[kWidth], part[kWidth];  // part: of one chunk, for exact sums

  cpu::AdjointTile tile() { return {dt, u, dy, decay, kept, du, ddt}; }
};

// Adds the sums of one chunk to those of the row and clears them.
void flush(float* part, float* total) {
  for (int i = 0; i < kWidth; ++i) total[i] += std::exchange(part[i], 0.0f);
}

// Adds a line in scan order to a row of memory.
void add_line(float* row, const Inputs& in, int64_t start, int64_t count, const float* line) {
  float* memory = row + memory_start(in.size.l, in.reverse, start, count);
  for (int64_t t = 0; t < count; ++t) memory[t] += line[in.reverse ? count - 1 - t : t];
}

// All states over one chunk; sums_B and sums_C: (n, l) of the slab.
template <typename T>
void backward_chunk(const Inputs& in, const Task& task, const Parameters& p, int64_t start,
                    int64_t count, std::vector<float>& h, std::vector<float>& r,
                    std::vector<float>& dA, float* sums_B, float* sums_C, Buffers& m) {
  for (int64_t n = 0; n < in.size.n; ++n) {
    read_line<T>(in.B, task, n, in, start, count, m.B);
    read_line<T>(in.C, task, n, in, start, count, m.C);
    std::fill_n(m.dB, count, 0.0f);
    std::fill_n(m.dC, count, 0.0f);
    const int64_t at = n * kWidth;
    cpu::rescan_tile(m.dt, m.x, m.dy, &p.A[at], m.B, &h[at], m.decay, m.kept, m.dC, count);
    cpu::adjoint_tile(m.tile(), &p.A[at], m.B, m.C, &r[at], m.part, m.dB, count);
    flush(m.part, &dA[at]);
    add_line(sums_B + n * in.size.l, in, start, count, m.dB);
    add_line(sums_C + n * in.size.l, in, start, count, m.dC);
  }
}

template <typename T, typename Y>
void load_chunk(const Inputs& in, const Task& task, const Backward& io, const Parameters& p,
                int64_t start, int64_t count, Buffers& m) {
  read_rows<T>(in.u, task, in).read(start, count, m.u);
  read_rows<T>(in.delta, task, in, in.size.share).read(start, count, m.dt);
  read_rows<Y>(io.dy, task, in).read(start, count, m.dy);
  for (int64_t t = 0; task.count < kWidth && t < count; ++t) {
    std::fill(m.dy + t * kWidth + task.count, m.dy + (t + 1) * kWidth, 0.0f);
  }
  cpu::make_delta(m.dt, m.slope, p.bias, in.softplus, count);
  cpu::start_adjoint(m.tile(), p.D, m.x, m.part, count);
  flush(m.part, m.dD);
}

template <typename T, typename Y>
void backward_task(const Inputs& in, const Task& task, const Backward& io, int64_t sums,
                   Buffers& m) {
  const auto& [du, ddelta, dA, dB, dC, dD, dbias] = io.parts;
  const auto& s = in.size;
  const int64_t chunk = chunk_length(in.u.scalar_type()), row = task.image * s.d + task.first;
  const Parameters p(in, task);
  std::vector<float> h(s.n * kWidth), r(s.n * kWidth, 0.0f), sum_A(s.n * kWidth, 0.0f);
  if (io.dlast) read_states(r, task, typed<float>(*io.dlast) + row * s.n, s.n);
  std::fill_n(m.dD, kWidth, 0.0f);
  std::fill_n(m.dbias, kWidth, 0.0f);
  std::fill_n(m.part, kWidth, 0.0f);
  for (int64_t step = s.chunks - 1; step >= 0; --step) {
    const int64_t start = step * chunk, count = std::min(chunk, s.l - start);
    load_chunk<T, Y>(in, task, io, p, start, count, m);
    read_states(h, task, typed<float>(io.states) + (row * s.chunks + step) * s.n, s.chunks * s.n);
    backward_chunk<T>(in, task, p, start, count, h, r, sum_A, floats(dB) + sums,
                      floats(dC) + sums, m);
    cpu::finish_adjoint(m.slope, m.ddt, m.part, count);
    flush(m.part, m.dbias);
    write_rows<T>(du, task, in).write(start, count, m.du, task.count);
    write_rows<T>(ddelta, task, in).write(start, count, m.ddt, task.count);
  }
  write_states(sum_A, task, floats(dA) + row * s.n, s.n);
  std::copy_n(m.dD, task.count, floats(dD) + row);
  std::copy_n(m.dbias, task.count, floats(dbias) + row);
}

// Blocks of a group that are summed into one slab of dB and dC: few slabs, yet four tasks per
// thread.
int64_t count_slabs(const Sizes& s) {
  const int64_t wanted = 4 * static_cast<int64_t>(torch::stable::get_num_threads());
  return std::min(blocks_per_group(s), ceil_div(wanted, std::max<int64_t>(1, s.b * s.g)));
}

BackwardResult backward_cpu(const Tensor& dy, const OptionalTensor& dlast, const Tensor& states,
                            const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                            const Tensor& C, const OptionalTensor& D, const OptionalTensor& bias,
                            bool softplus, bool reverse) {
  const Inputs in = make_inputs(u, delta, A, B, C, D, bias, softplus, reverse);
  check_gradients(in, dy, dlast, states);
  const auto& s = in.size;
  if (u.numel() == 0) return zero_gradients(in);
  const int64_t blocks = blocks_per_group(s), slabs = count_slabs(s);
  const auto zeros = [&](Shape shape) { return zeros_like_on(u, shape, kFloat); };
  const Shape rows{s.b, s.d, s.l}, sums{s.b, s.g, slabs, s.n, s.l};
  const auto dtype = u.scalar_type();
  const Backward io{dense_rows(dy), torch::stable::contiguous(states),
                    dlast ? OptionalTensor(dense_float(*dlast)) : OptionalTensor(),
                    {empty_like_on(u, rows, dtype), empty_like_on(u, rows, dtype),
                     zeros({s.b, s.d, s.n}), zeros(sums), zeros(sums), zeros({s.b, s.d}),
                     zeros({s.b, s.d})}};
  dispatch_dtype(kOp, dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto task = io.dy.scalar_type() == kFloat ? backward_task<T, float> : backward_task<T, T>;
    torch::stable::parallel_for(0, s.b * s.g * slabs, 1, [&](int64_t begin, int64_t end) {
      const auto buffers = std::make_unique<Buffers>();
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t block = i % slabs; block < blocks; block += slabs) {
          const auto channels = make_task(s, i / slabs / s.g, i / slabs % s.g, block);
          task(in, channels, io, i * s.n * s.l, *buffers);
        }
      }
    });
  });
  return join_gradients(in, io.parts);
}

}  // namespace
}  // namespace scan

STABLE_TORCH_LIBRARY_IMPL(selective_scan, CPU, m) {
  m.impl("selective_scan_fwd", TORCH_BOX(&scan::forward_cpu));
  m.impl("selective_scan_bwd", TORCH_BOX(&scan::backward_cpu));
}
