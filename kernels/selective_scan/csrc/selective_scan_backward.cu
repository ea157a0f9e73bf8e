// Backward selective scan on CUDA. One block takes a slab of the channels that share B and C, a row
// per warp at a time, and walks the chunks from the last to the first. Each chunk is scanned
// forward again from its saved state, then the adjoint r_t = a_t (c_t dy_t + r_{t+1}) is scanned
// backward. The gradients of B and C are summed over the warps in shared memory and over the slab
// in global memory that only this block writes: no atomics, so two runs agree bit for bit.
#include "selective_scan.h"
#include "selective_scan_tile.cuh"

namespace scan {
namespace {

struct BackwardParams {
  const void *dy, *u, *delta, *B, *C;
  const float *A, *D, *bias, *states, *dlast;
  void *du, *ddelta;
  float *dA, *dD, *dbias;  // (b, d, n), (b, d), (b, d); ddelta too has a row per channel
  float *dB, *dC;          // (b, g, slabs, n, l)
  int64_t dy_b, dy_d, u_b, u_d, delta_b, delta_d, B_b, B_g, B_n, C_b, C_g, C_n;  // strides in items
  int d, group, share, n, l, chunks, slabs, rows_per_warp;
  bool softplus;
};

// The row of one warp, its state and its sums over the row.
template <typename T, typename Y>
struct Row {
  const T *u, *delta;
  const Y* dy;
  T *du, *ddelta;
  const float* states;
  int64_t index;
  int channel;
  bool active;

  __device__ Row(const BackwardParams& p, int64_t image, int g, int place) {
    active = place < p.group;
    channel = g * p.group + min(place, p.group - 1);
    index = image * p.d + channel;
    u = static_cast<const T*>(p.u) + image * p.u_b + channel * p.u_d;
    delta = static_cast<const T*>(p.delta) + image * p.delta_b + channel / p.share * p.delta_d;
    dy = static_cast<const Y*>(p.dy) + image * p.dy_b + channel * p.dy_d;
    du = static_cast<T*>(p.du) + index * p.l;
    ddelta = static_cast<T*>(p.ddelta) + index * p.l;
    states = p.states + index * p.chunks * p.n;
  }
};

template <typename T, typename Y, typename Chunk>
struct RowChunk {
  PackedTile<Chunk, T> u, delta;
  PackedTile<Chunk, Y> dy;

  __device__ void load(const Row<T, Y>& row, int start, int length) {
    u.template load<true>(row.u, start, length);
    delta.template load<true>(row.delta, start, length);
    dy.template load<true>(row.dy, start, row.active ? length : 0);
  }
};

// What a lane knows of its items, and the gradients it gathers over the states.
template <int kItems>
struct Items {
  float u[kItems], dt[kItems], slope[kItems], dy[kItems], du[kItems], ddt[kItems];
};

// One state over one chunk. Writes the lane's shares of dB and dC to shared memory, moves the
// adjoint on to the previous chunk and returns the lane's share of dA.
template <typename T, typename Chunk>
__device__ __forceinline__ float scan_state(Items<Chunk::kItems>& x,
                                            const PackedTile<Chunk, T>& packed_B,
                                            const PackedTile<Chunk, T>& packed_C, float A,
                                            float enter, float* adjoint, float* sum_B,
                                            float* sum_C, int lane) {
  constexpr int kItems = Chunk::kItems;
  float a[kItems], kept[kItems], share[kItems], B[kItems], C[kItems];
  unpack<Chunk>(packed_B, B);
  unpack<Chunk>(packed_C, C);
  const float rate = Math<T>::rate(A);
  Segment forward{1.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    a[i] = Math<T>::decay(x.dt[i], rate);
    forward = {forward.decay * a[i], fmaf(a[i], forward.sum, x.dt[i] * x.u[i] * B[i])};
  }
  Segment backward{forward.decay, 0.0f};
#pragma unroll
  for (int i = kItems - 1; i >= 0; --i) {
    backward.sum = a[i] * fmaf(C[i], x.dy[i], backward.sum);
  }
  const Segment before = warp_scan<true>(forward, lane);
  float h = fmaf(before.decay, enter, before.sum);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    kept[i] = a[i] * h;
    h = fmaf(x.dt[i] * x.u[i], B[i], kept[i]);
    share[i] = x.dy[i] * h;
  }
  store_shared<Chunk>(share, sum_C);
  const float carry = *adjoint;
  const Segment after = warp_scan<false>(backward, lane);
  float r = fmaf(after.decay, carry, after.sum), dA = 0.0f;
#pragma unroll
  for (int i = kItems - 1; i >= 0; --i) {
    const float gradient = fmaf(C[i], x.dy[i], r);
    r = a[i] * gradient;
    share[i] = gradient * x.dt[i] * x.u[i];
    x.du[i] = fmaf(gradient * B[i], x.dt[i], x.du[i]);
    x.ddt[i] = fmaf(gradient, fmaf(A, kept[i], B[i] * x.u[i]), x.ddt[i]);
    dA = fmaf(gradient * kept[i], x.dt[i], dA);
  }
  store_shared<Chunk>(share, sum_B);
  __syncwarp();
  if (lane == 0) *adjoint = fmaf(backward.decay, carry, backward.sum);
  return dA;
}

// Adds the warps' shares of one chunk and state to the slab's sums in global memory, four positions
// per thread.
template <typename Chunk>
__device__ __forceinline__ void reduce_shares(const float* shares, float* dB, float* dC, int first,
                                              int length, bool add) {
  constexpr int kLength = Chunk::kLength;
  const int item = threadIdx.x * 4, at = item % kLength, place = first + at;
  if (item >= 2 * kLength || place >= length) return;
  const float* column = shares + item / kLength * kWarps * kLength + at;
  float* target = (item < kLength ? dB : dC) + place;
  float4 sum = make_float4(0, 0, 0, 0);
  if (Chunk::kAligned && add) sum = *reinterpret_cast<const float4*>(target);
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    const float4 share = *reinterpret_cast<const float4*>(column + warp * kLength);
    sum.x += share.x, sum.y += share.y, sum.z += share.z, sum.w += share.w;
  }
  if constexpr (Chunk::kAligned) {
    *reinterpret_cast<float4*>(target) = sum;
  } else {
    const float part[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (place + i < length) target[i] = add ? target[i] + part[i] : part[i];
    }
  }
}

template <typename T, typename Y, bool kReverse, Form kForm>
__global__ __launch_bounds__(kWarps* kLanes, 2) void backward_kernel(const BackwardParams p) {
  using Chunk = Tile<T, kReverse, kForm>;
  constexpr int kItems = Chunk::kItems, kLength = Chunk::kLength;
  const int n = kForm == Form::kOneState ? 1 : p.n;
  extern __shared__ __align__(16) float shares[];  // (2 buffers, dB and dC, kWarps, kLength)
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  float* adjoint = shares + 4 * kWarps * kLength + warp * 2 * n;  // (n), then dA (n)
  float* sum_A = adjoint + n;
  const int slab = blockIdx.x % p.slabs, g = blockIdx.x / p.slabs % (p.d / p.group);
  const int64_t image = blockIdx.x / p.slabs / (p.d / p.group);
  const T* B = static_cast<const T*>(p.B) + image * p.B_b + g * p.B_g;
  const T* C = static_cast<const T*>(p.C) + image * p.C_b + g * p.C_g;
  const int64_t sums = int64_t{blockIdx.x} * n * p.l;
  const auto first = [&](int step) {
    return (kReverse ? p.chunks - 1 - step : step) * kLength;
  };
  int buffer = 0;
  for (int turn = 0; turn < p.rows_per_warp; ++turn) {
    const Row<T, Y> row(p, image, g, (slab * p.rows_per_warp + turn) * kWarps + warp);
    const float D = p.D ? p.D[row.channel] : 0.0f;
    const float bias = p.bias ? p.bias[row.channel / p.share] : 0.0f;
    for (int s = lane; s < n; s += kLanes) {
      adjoint[s] = p.dlast && row.active ? p.dlast[row.index * n + s] : 0.0f;
      sum_A[s] = 0.0f;
    }
    __syncwarp();
    float dD = 0.0f, dbias = 0.0f, dA_lane = 0.0f;
    RowChunk<T, Y, Chunk> next;
    next.load(row, first(p.chunks - 1) + Chunk::lane_start(lane), p.l);
    for (int step = p.chunks - 1; step >= 0; --step) {
      const int start = first(step) + Chunk::lane_start(lane);
      Items<kItems> x;
      unpack<Chunk>(next.u, x.u);
      unpack<Chunk>(next.dy, x.dy);
      make_delta<Chunk>(next.delta, bias, p.softplus, start, p.l, x.dt, x.slope);
      if (step) next.load(row, first(step - 1) + Chunk::lane_start(lane), p.l);
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        x.du[i] = D * x.dy[i];
        x.ddt[i] = 0.0f;
        dD = fmaf(x.u[i], x.dy[i], dD);
      }
      for (int s = 0; s < n; ++s) {
        PackedTile<Chunk, T> packed_B, packed_C;
        packed_B.template load<false>(B + s * p.B_n, start, p.l);
        packed_C.template load<false>(C + s * p.C_n, start, p.l);
        float* share_B = shares + buffer * 2 * kWarps * kLength;
        float* own = share_B + warp * kLength + Chunk::lane_start(lane);
        const float dA = scan_state<T, Chunk>(
            x, packed_B, packed_C, p.A[int64_t{row.channel} * n + s],
            row.states[int64_t{step} * n + s], adjoint + s, own, own + kWarps * kLength, lane);
        if (kForm == Form::kOneState) {
          dA_lane += dA;
        } else {
          const float sum = warp_sum(dA);
          if (lane == 0) sum_A[s] += sum;
        }
        __syncthreads();
        reduce_shares<Chunk>(share_B, p.dB + sums + int64_t{s} * p.l,
                               p.dC + sums + int64_t{s} * p.l, first(step), p.l, turn > 0);
        buffer ^= 1;
      }
      float bias_share = 0.0f;
#pragma unroll
      for (int i = 0; i < kItems; ++i) bias_share += x.ddt[i] *= x.slope[i];
      if (start < p.l) dbias += bias_share;
      if (row.active) {
        pack<Chunk, T>(x.du).store(row.du, start, p.l);
        pack<Chunk, T>(x.ddt).store(row.ddelta, start, p.l);
      }
    }
    dD = warp_sum(dD), dbias = warp_sum(dbias);
    if (kForm == Form::kOneState) {
      dA_lane = warp_sum(dA_lane);
      if (lane == 0) sum_A[0] = dA_lane;
    }
    if (row.active && lane == 0) p.dD[row.index] = dD, p.dbias[row.index] = dbias;
    __syncwarp();
    for (int s = lane; row.active && s < n; s += kLanes) p.dA[row.index * n + s] = sum_A[s];
  }
}

// How the rows of a group are cut: as many rows per warp as still leave four blocks' worth per
// multiprocessor slot.
void choose_slabs(BackwardParams& p, const Sizes& s, int multiprocessors) {
  const int64_t turns = ceil_div(s.group, kWarps), blocks = s.b * s.g * turns;
  const int64_t most = std::max<int64_t>(1, blocks / (int64_t{multiprocessors} * 8));
  p.slabs = static_cast<int>(ceil_div(turns, most));
  p.rows_per_warp = static_cast<int>(ceil_div(turns, p.slabs));
}

template <typename T, typename Y, bool kReverse>
void launch(const BackwardParams& p, int64_t blocks, bool aligned, cudaStream_t stream) {
  SCAN_CHECK(blocks <= INT32_MAX, kOp, "expected fewer than 2^31 blocks, got ", blocks);
  const size_t floats = 4 * kWarps * kLanes * (16 / sizeof(T)) + 2 * kWarps * p.n;
  const auto kernel = !aligned   ? backward_kernel<T, Y, kReverse, Form::kAny>
                      : p.n == 1 ? backward_kernel<T, Y, kReverse, Form::kOneState>
                                 : backward_kernel<T, Y, kReverse, Form::kAligned>;
  kernel<<<static_cast<unsigned>(blocks), kWarps * kLanes, floats * sizeof(float), stream>>>(p);
  check_launch(kOp);
}

float* output(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

BackwardParams make_params(const Inputs& in, const Tensor& dy, const Tensor& states,
                           const Tensor& dlast) {
  const auto& s = in.size;
  BackwardParams p{};
  p.dy = dy.const_data_ptr(), p.u = in.u.const_data_ptr(), p.delta = in.delta.const_data_ptr();
  p.B = in.B.const_data_ptr(), p.C = in.C.const_data_ptr();
  p.A = static_cast<const float*>(in.A.const_data_ptr());
  p.D = float_pointer(in.D), p.bias = float_pointer(in.bias);
  p.states = static_cast<const float*>(states.const_data_ptr());
  p.dlast = dlast.numel() ? static_cast<const float*>(dlast.const_data_ptr()) : nullptr;
  p.dy_b = dy.stride(0), p.dy_d = dy.stride(1);
  p.u_b = in.u.stride(0), p.u_d = in.u.stride(1);
  p.delta_b = in.delta.stride(0), p.delta_d = in.delta.stride(1);
  p.B_b = in.B.stride(0), p.B_g = in.B.stride(1), p.B_n = in.B.stride(2);
  p.C_b = in.C.stride(0), p.C_g = in.C.stride(1), p.C_n = in.C.stride(2);
  p.d = static_cast<int>(s.d), p.group = static_cast<int>(s.group);
  p.share = static_cast<int>(s.share), p.n = static_cast<int>(s.n);
  p.l = static_cast<int>(s.l), p.chunks = static_cast<int>(s.chunks);
  p.softplus = in.softplus;
  return p;
}

BackwardResult backward_cuda(const Tensor& dy, const OptionalTensor& dlast, const Tensor& states,
                             const Tensor& u, const Tensor& delta, const Tensor& A,
                             const Tensor& B, const Tensor& C, const OptionalTensor& D,
                             const OptionalTensor& bias, bool softplus, bool reverse) {
  const DeviceGuard guard(u.get_device_index());
  const Inputs in = make_inputs(u, delta, A, B, C, D, bias, softplus, reverse);
  check_gradients(in, dy, dlast, states);
  const auto& s = in.size;
  const Tensor gradient = dense_rows(dy), kept = torch::stable::contiguous(states);
  const Tensor last = dlast ? dense_float(*dlast) : empty_like_on(u, {0}, kFloat);
  if (u.numel() == 0) return zero_gradients(in);
  BackwardParams p = make_params(in, gradient, kept, last);
  choose_slabs(p, s, sm_count(u, kOp));
  const bool aligned = rows_aligned({&in.u, &in.delta, &in.B, &in.C, &gradient}, u.scalar_type());
  const auto part = [&](Shape shape) { return empty_like_on(u, shape, kFloat); };
  const Tensor du = empty_like_on(u, {s.b, s.d, s.l}, u.scalar_type());
  const Tensor ddelta = empty_like_on(u, {s.b, s.d, s.l}, u.scalar_type());
  const Tensor dA = part({s.b, s.d, s.n}), dD = part({s.b, s.d}), dbias = part({s.b, s.d});
  const Tensor dB = part({s.b, s.g, p.slabs, s.n, s.l}), dC = part({s.b, s.g, p.slabs, s.n, s.l});
  p.du = du.mutable_data_ptr(), p.ddelta = ddelta.mutable_data_ptr();
  p.dA = output(dA), p.dD = output(dD), p.dbias = output(dbias);
  p.dB = output(dB), p.dC = output(dC);
  dispatch_dtype(kOp, u.scalar_type(), [&](auto tag) {
    using T = typename DeviceType<typename decltype(tag)::type>::type;
    const auto run = gradient.scalar_type() == kFloat
                         ? (reverse ? launch<T, float, true> : launch<T, float, false>)
                         : (reverse ? launch<T, T, true> : launch<T, T, false>);
    run(p, s.b * s.g * p.slabs, aligned, current_stream(u));
  });
  return join_gradients(in, {du, ddelta, dA, dB, dC, dD, dbias});
}

}  // namespace
}  // namespace scan

STABLE_TORCH_LIBRARY_IMPL(selective_scan, CUDA, m) {
  m.impl("selective_scan_bwd", TORCH_BOX(&scan::backward_cuda));
}
