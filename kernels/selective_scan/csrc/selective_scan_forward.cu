// Forward selective scan on CUDA: one warp walks one row (an image's channel) chunk by chunk.
//
// A lane owns 16 bytes of neighbours of the row. Within a chunk the lanes' maps h -> decay h + sum
// are joined by shuffles, so nothing but the state of the row crosses chunks and no warp waits for
// another.
#include "selective_scan.h"
#include "selective_scan_tile.cuh"

namespace scan {
namespace {

struct ForwardParams {
  const void *u, *delta, *B, *C;
  const float *A, *D, *bias;
  void* y;
  float *last, *states;  // states: what `keep` says, of Keep
  int64_t u_b, u_d, delta_b, delta_d, B_b, B_g, B_n, C_b, C_g, C_n;  // strides in items
  int64_t rows;
  int d, group, share, n, l, chunks, keep;
  bool softplus;
};

template <typename T, typename Y, bool kReverse, Form kForm>
__global__ __launch_bounds__(kForwardWarps* kLanes, 6) void forward_kernel(const ForwardParams p) {
  using Chunk = Tile<T, kReverse, kForm>;
  constexpr int kItems = Chunk::kItems;
  const int n = kForm == Form::kOneState ? 1 : p.n;
  extern __shared__ float all_states[];  // (kForwardWarps, n)
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int64_t row = int64_t{blockIdx.x} * kForwardWarps + warp;
  if (row >= p.rows) return;
  const int64_t image = row / p.d;
  const int channel = static_cast<int>(row % p.d), g = channel / p.group;
  const int delta_row = channel / p.share;
  const T* u = static_cast<const T*>(p.u) + image * p.u_b + channel * p.u_d;
  const T* delta = static_cast<const T*>(p.delta) + image * p.delta_b + delta_row * p.delta_d;
  const T* B = static_cast<const T*>(p.B) + image * p.B_b + g * p.B_g;
  const T* C = static_cast<const T*>(p.C) + image * p.C_b + g * p.C_g;
  Y* y = static_cast<Y*>(p.y) + row * p.l;
  float* state = all_states + warp * n;
  for (int s = lane; s < n; s += kLanes) state[s] = 0.0f;
  __syncwarp();

  const float D = p.D ? p.D[channel] : 0.0f, bias = p.bias ? p.bias[delta_row] : 0.0f;
  const auto first = [&](int step) {
    return (kReverse ? p.chunks - 1 - step : step) * Chunk::kLength;
  };
  const int offset = Chunk::lane_start(lane);
  PackedTile<Chunk, T> u_next, delta_next;
  u_next.template load<true>(u, first(0) + offset, p.l);
  delta_next.template load<true>(delta, first(0) + offset, p.l);
  for (int step = 0; step < p.chunks; ++step) {
    const int start = first(step) + offset;
    float x[kItems], dt[kItems], slope[kItems], out[kItems];
    unpack<Chunk>(u_next, x);
    make_delta<Chunk>(delta_next, bias, p.softplus, start, p.l, dt, slope);
    if (step + 1 < p.chunks) {
      u_next.template load<true>(u, first(step + 1) + offset, p.l);
      delta_next.template load<true>(delta, first(step + 1) + offset, p.l);
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      out[i] = D * x[i];
      x[i] *= dt[i];
    }
    for (int s = 0; s < n; ++s) {
      PackedTile<Chunk, T> packed_B, packed_C;
      packed_B.template load<false>(B + s * p.B_n, start, p.l);
      packed_C.template load<false>(C + s * p.C_n, start, p.l);
      const float rate = Math<T>::rate(p.A[int64_t{channel} * n + s]), enter = state[s];
      float a[kItems], drive[kItems], c[kItems];
      unpack<Chunk>(packed_B, drive);
      unpack<Chunk>(packed_C, c);
      Segment own{1.0f, 0.0f};
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        a[i] = Math<T>::decay(dt[i], rate);
        drive[i] *= x[i];
        own = {own.decay * a[i], fmaf(a[i], own.sum, drive[i])};
      }
      const Segment before = warp_scan<true>(own, lane);
      float h = fmaf(before.decay, enter, before.sum);
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        h = fmaf(a[i], h, drive[i]);
        out[i] = fmaf(c[i], h, out[i]);
      }
      __syncwarp();
      if (lane == kLanes - 1) {
        state[s] = fmaf(own.decay, enter, own.sum);
        const int64_t at = (row * p.chunks + step) * n + s;
        if (p.keep == kEntering) p.states[at] = enter;
        if (p.keep == kPairs) {
          auto* pair = reinterpret_cast<float2*>(p.states) + at;
          *pair = make_float2(step ? pair[-n].x * own.decay : own.decay, state[s]);
        }
      }
      __syncwarp();
    }
    pack<Chunk, Y>(out).store(y, start, p.l);
  }
  for (int s = lane; s < n; s += kLanes) p.last[row * n + s] = state[s];
}

template <typename T, typename Y, bool kReverse>
void launch(const ForwardParams& p, bool aligned, cudaStream_t stream) {
  const int64_t blocks = ceil_div(p.rows, kForwardWarps);
  SCAN_CHECK(blocks <= INT32_MAX, kOp, "expected fewer than 2^33 rows b * d, got ", p.rows);
  const size_t shared = kForwardWarps * p.n * sizeof(float);
  const auto kernel = !aligned   ? forward_kernel<T, Y, kReverse, Form::kAny>
                      : p.n == 1 ? forward_kernel<T, Y, kReverse, Form::kOneState>
                                 : forward_kernel<T, Y, kReverse, Form::kAligned>;
  kernel<<<static_cast<unsigned>(blocks), kForwardWarps * kLanes, shared, stream>>>(p);
  check_launch(kOp);
}

ForwardParams make_params(const Inputs& in, const Tensor& y, const Tensor& last,
                          const Tensor& states, int64_t keep) {
  const auto& s = in.size;
  ForwardParams p{};
  p.u = in.u.const_data_ptr(), p.delta = in.delta.const_data_ptr();
  p.B = in.B.const_data_ptr(), p.C = in.C.const_data_ptr();
  p.A = static_cast<const float*>(in.A.const_data_ptr());
  p.D = float_pointer(in.D), p.bias = float_pointer(in.bias);
  p.y = y.mutable_data_ptr();
  p.last = static_cast<float*>(last.mutable_data_ptr());
  p.states = static_cast<float*>(states.mutable_data_ptr()), p.keep = static_cast<int>(keep);
  p.u_b = in.u.stride(0), p.u_d = in.u.stride(1);
  p.delta_b = in.delta.stride(0), p.delta_d = in.delta.stride(1);
  p.B_b = in.B.stride(0), p.B_g = in.B.stride(1), p.B_n = in.B.stride(2);
  p.C_b = in.C.stride(0), p.C_g = in.C.stride(1), p.C_n = in.C.stride(2);
  p.rows = s.b * s.d;
  p.d = static_cast<int>(s.d), p.group = static_cast<int>(s.group);
  p.share = static_cast<int>(s.share), p.n = static_cast<int>(s.n);
  p.l = static_cast<int>(s.l), p.chunks = static_cast<int>(s.chunks);
  p.softplus = in.softplus;
  return p;
}

ForwardResult forward_cuda(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                           const Tensor& C, const OptionalTensor& D, const OptionalTensor& bias,
                           bool softplus, bool reverse, bool out_float, int64_t keep) {
  const DeviceGuard guard(u.get_device_index());
  const Inputs in = make_inputs(u, delta, A, B, C, D, bias, softplus, reverse);
  const auto& s = in.size;
  const Tensor y = empty_like_on(u, {s.b, s.d, s.l}, out_float ? kFloat : u.scalar_type());
  const Tensor last = zeros_like_on(u, {s.b, s.d, s.n}, kFloat);
  const Tensor states = empty_states(in, keep);
  if (y.numel() == 0) return {y, last, states};
  const ForwardParams p = make_params(in, y, last, states, keep);
  const bool aligned = rows_aligned({&in.u, &in.delta, &in.B, &in.C, &y}, u.scalar_type());
  dispatch_dtype(kOp, u.scalar_type(), [&](auto tag) {
    using T = typename DeviceType<typename decltype(tag)::type>::type;
    const auto run = out_float ? (reverse ? launch<T, float, true> : launch<T, float, false>)
                               : (reverse ? launch<T, T, true> : launch<T, T, false>);
    run(p, aligned, current_stream(u));
  });
  return {y, last, states};
}

}  // namespace
}  // namespace scan

STABLE_TORCH_LIBRARY_IMPL(selective_scan, CUDA, m) {
  m.impl("selective_scan_fwd", TORCH_BOX(&scan::forward_cuda));
}
