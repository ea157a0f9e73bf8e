// The route scan's ops on CUDA tensors: allocation, how the work is split, launches.
#include "route_tile.cuh"

namespace scan::route {
namespace {

constexpr int64_t kMaxRow = 256;                       // numbers in a row of proj; bounds the shared memory
constexpr int64_t kMaxRank = 128;
constexpr int64_t kPairRank = 48;                      // of the fast backward kernels

bool aligned(const Tensor& tensor) {
  const auto bytes = tensor.scalar_type() == kFloat ? 8 : 4;
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % bytes == 0;
}

// Whether adjacent channels, and adjacent numbers of a row of proj, can be loaded as pairs; one state only.
bool takes_pairs(const Inputs& in, std::initializer_list<const Tensor*> features) {
  bool pair = in.size.n == 1 && in.size.d % 2 == 0 && in.size.r % 2 == 0;
  for (const Tensor* tensor : features) pair = pair && aligned(*tensor);
  return pair && aligned(in.A);
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(const_cast<void*>(tensor.const_data_ptr()));
}

// Warps of a block: enough for the channels, at most `most`, as many as the shared memory allows; a multiple of `step`.
template <typename Bytes>
int block_warps(const Inputs& in, int most, int step, Bytes&& bytes) {
  int limit = 0;
  check_cuda(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, in.x.get_device_index()), kOp);
  const auto strips = static_cast<int>(std::min<int64_t>(ceil_div(in.size.d, kStrip), most));
  int warps = (strips + step - 1) / step * step;
  while (warps > step && bytes(warps) > limit) warps -= step;
  SCAN_CHECK(bytes(warps) <= limit, kOp, "expected r + 2n small enough for the ", limit,
             " bytes of shared memory of this GPU, got r = ", in.size.r, ", n = ", in.size.n);
  return warps;
}

int64_t number_bytes(const Tensor& tensor) { return tensor.scalar_type() == kFloat ? 4 : 2; }

// What both directions need. `scratch` keeps the packed weights alive.
Params make_params(const Inputs& in, int warps, Tensor& scratch) {
  const auto& s = in.size;
  SCAN_CHECK(s.m <= kMaxRow && s.r <= kMaxRank, kOp, "expected r <= ", kMaxRank, " and r + 2n <= ", kMaxRow,
             " on CUDA, got r = ", s.r, ", n = ", s.n);
  SCAN_CHECK(s.l * s.d <= INT32_MAX, kOp, "expected fewer than 2^31 numbers per image on CUDA, got ", s.l, " tokens of ",
             s.d, " channels");
  Params p{};
  p.b = s.b, p.l = s.l, p.d = s.d, p.k = s.k, p.r = s.r, p.n = s.n, p.m = s.m;
  p.chunks = ceil_div(s.l, kChunk);
  p.slabs = ceil_div(s.d, warps * kStrip);
  p.strips = p.slabs * warps;
  p.kt = ceil_div(s.r, 8);
  p.rows = row_floats(p.kt, p.n);
  p.columns = in.select.size(1);
  p.select_row = in.select.size(0) == 1 ? 0 : p.columns;
  p.x = data<void>(in.x), p.proj = data<void>(in.proj);
  p.A = data<float>(in.A);
  p.tables = data<int>(in.tables), p.select = data<int>(in.select);
  p.reverse = static_cast<unsigned>(in.reverse);

  const int64_t fragments = int64_t{p.k} * p.strips * p.kt * kWarp;
  const int64_t channels = int64_t{p.strips} * kStrip;
  scratch = empty_like_on(in.x, {8 * fragments + (p.k + 1) * channels}, kFloat);
  p.expand = data<float4>(scratch);
  p.contract = p.expand + fragments;
  p.bias = data<float>(scratch) + 8 * fragments;
  p.D = p.bias + p.k * channels;
  launch_pack(data<float>(in.weight), data<float>(in.bias), data<float>(in.D), p, current_stream(in.x));
  return p;
}

void set_pairs(Params& p, bool pair) {
  const unsigned loads = pair ? p.m / 2 : p.m;
  p.magic = static_cast<unsigned>(((uint64_t{1} << 32) + loads - 1) / loads);
}

void check_blocks(int64_t blocks) {
  SCAN_CHECK(blocks <= INT32_MAX, kOp, "expected fewer than 2^31 blocks, got ", blocks, "; split the batch");
}

Tensor empty_states(const Inputs& in) {
  const auto& s = in.size;
  return empty_like_on(in.x, {s.b, s.k, std::max<int64_t>(ceil_div(s.l, kChunk) - 1, 0), s.n, s.d}, kFloat);
}

ForwardResult forward_cuda(const Tensor& x, const Tensor& proj, const Tensor& weight, const Tensor& bias,
                           const Tensor& A, const Tensor& D, const Tensor& tables, const Tensor& select,
                           int64_t reverse, bool out_float) {
  const DeviceGuard guard(x.get_device_index());
  const Inputs in = make_inputs(x, proj, weight, bias, A, D, tables, select, reverse);
  if (takes_lanes(in, out_float)) return forward_lanes(in);
  const auto& s = in.size;
  const ScalarType dtype = out_float ? kFloat : x.scalar_type();
  const Tensor y = empty_like_on(x, {s.b, s.l, s.d}, dtype), states = empty_states(in);
  if (y.numel() == 0) return {y, states};

  const bool pair = takes_pairs(in, {&in.x, &in.proj});
  const int64_t floats = row_floats(ceil_div(s.r, 8), s.n);
  const int warps = block_warps(in, kForwardWarps, 1, [&](int count) {
    return forward_bytes(floats, s.m, count, pair, number_bytes(x), number_bytes(y));
  });
  Tensor scratch;
  Params p = make_params(in, warps, scratch);
  set_pairs(p, pair);
  p.y = data<void>(y);
  p.states = data<float>(states);
  check_blocks(s.b * p.slabs);
  dispatch_dtype(kOp, x.scalar_type(), [&](auto tag) {
    using T = typename DeviceType<typename decltype(tag)::type>::type;
    const auto stream = current_stream(x);
    out_float ? launch_forward<T, float>(p, warps, pair, stream) : launch_forward<T, T>(p, warps, pair, stream);
  });
  return {y, states};
}

BackwardResult backward_cuda(const Tensor& dy, const Tensor& x, const Tensor& proj, const Tensor& weight,
                             const Tensor& bias, const Tensor& A, const Tensor& D, const Tensor& tables,
                             const Tensor& select, const Tensor& states, int64_t reverse) {
  const DeviceGuard guard(x.get_device_index());
  const Inputs in = make_inputs(x, proj, weight, bias, A, D, tables, select, reverse);
  check_gradient(in, dy);
  if (states.dim() == 4) return backward_lanes(in, dy, states);
  const auto& s = in.size;
  const Tensor gradient = torch::stable::contiguous(dy), borders = torch::stable::contiguous(states);
  const Tensor dx = empty_like_on(x, {s.b, s.l, s.d}, x.scalar_type());
  const Tensor dproj = empty_like_on(x, {s.b, s.l, s.k, s.m}, x.scalar_type());
  const Tensor dweight = sum_like_on(x, {s.k, s.d, s.r}), dbias = sum_like_on(x, {s.k, s.d});
  const Tensor dA = sum_like_on(x, {s.k, s.d, s.n}), dD = sum_like_on(x, {s.k, s.d});
  if (dx.numel() == 0) return {dx, dproj, dweight, dbias, dA, dD};

  const int64_t floats = row_floats(ceil_div(s.r, 8), s.n);
  const int warps = block_warps(in, kBackwardWarps, 2, [&](int count) {
    return backward_bytes(floats, s.m, count, number_bytes(x));
  });
  const bool pair = takes_pairs(in, {&in.x, &in.proj, &gradient}) && s.r <= kPairRank;
  Tensor scratch, parts;
  Params p = make_params(in, warps, scratch);
  set_pairs(p, pair);
  // Two blocks per multiprocessor in all: each sums its share of the images' gradients of the weights by itself.
  p.group = ceil_div(s.b * p.slabs, 2 * sm_count(x, kOp));
  const int groups = ceil_div(s.b, p.group);
  const Tensor dweights = zeros_like_on(x, {groups, s.k, s.d, s.r + 2 + s.n}, kFloat),
               adjoints = empty_like_on(x, {s.b, s.k, s.n, s.d}, kFloat);
  p.y = data<void>(dx);
  p.dy = data<void>(gradient);
  p.states = data<float>(borders);
  p.adjoints = data<float>(adjoints);
  p.dweights = data<float>(dweights);
  p.dproj = data<void>(dproj);
  if (p.slabs > 1) {
    parts = empty_like_on(x, {p.slabs, s.b, s.l, s.k, s.m}, kFloat);
    p.dproj = data<void>(parts);
  }
  check_blocks(int64_t{groups} * p.slabs);
  const Gradients to{data<void>(dproj), data<float>(dweight), data<float>(dbias), data<float>(dA), data<float>(dD)};
  dispatch_dtype(kOp, x.scalar_type(), [&](auto tag) {
    using T = typename DeviceType<typename decltype(tag)::type>::type;
    const auto stream = current_stream(x);
    gradient.scalar_type() == kFloat ? launch_backward<T, float>(p, warps, pair, stream)
                                     : launch_backward<T, T>(p, warps, pair, stream);
    launch_sums<T>(p, to, groups, stream);
  });
  return {dx, dproj, dweight, dbias, dA, dD};
}

}  // namespace
}  // namespace scan::route

STABLE_TORCH_LIBRARY_IMPL(selective_scan, CUDA, m) {
  m.impl("route_scan_fwd", TORCH_BOX(&scan::route::forward_cuda));
  m.impl("route_scan_bwd", TORCH_BOX(&scan::route::backward_cuda));
}
