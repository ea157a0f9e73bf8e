// The route scan with a lane for each channel or two: which inputs take it, allocation, how the work is split.
#include "lane.cuh"

#include <array>

namespace scan::route {
namespace {

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(const_cast<void*>(tensor.const_data_ptr()));
}

// The tensor itself, or a copy where its rows do not begin on 16 bytes.
Tensor aligned_rows(const Tensor& tensor) {
  const bool fits = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  return fits ? tensor : torch::stable::clone(tensor);
}

struct Split {
  int channels, ranks;  // channels of a lane; tiles of 8 ranks, rounded up to what the kernels are built for
};

Split make_split(const Sizes& s) {
  const int channels = s.d % 64 == 0 ? 2 : 1;
  const auto ranks = static_cast<int>(ceil_div(s.r, 8));
  return {channels, ranks <= 2 ? ranks : ranks <= 4 ? 4 : lane::kMaxTiles};
}

// Strips of a block and warps that take turns at each: at most `most` strips, and no more warps of `bytes` of shared
// memory than a block of this GPU holds. Two take turns where there are few warps for the GPU.
void set_warps(lane::Params& p, const Inputs& in, int most, int64_t bytes) {
  int limit = 0;
  check_cuda(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, in.x.get_device_index()), kOp);
  const int64_t warps = int64_t{2} * p.b * p.strips;
  p.relay = warps <= 8 * sm_count(in.x, kOp) && 2 * lane::kMaxRelay * bytes <= limit ? lane::kMaxRelay : 1;
  p.group = std::min(p.strips, most);
  while (p.group > 1 && (p.strips % p.group || 2 * p.group * p.relay * bytes > limit)) --p.group;
  p.slabs = p.strips / p.group;
}

// Cuts a long table as far as all blocks still run at once. The registers of the largest block fill a multiprocessor.
void set_segments(lane::Params& p, const Inputs& in) {
  p.slots = ceil_div(p.l, lane::kRows);
  const int at_once = std::max(1, lane::kMaxGroup * lane::kMaxRelay / (p.group * p.relay));
  const int64_t fitting = int64_t{at_once} * sm_count(in.x, kOp) / (int64_t{p.b} * p.slabs);
  const int64_t cuts = std::clamp<int64_t>(fitting, 1, std::max(1, p.slots / lane::kMinSpan));
  p.chunks = ceil_div(ceil_div(p.slots, cuts), p.relay) * p.relay;
  p.segments = ceil_div(p.slots, p.chunks);
}

// `scratch` keeps the packed weights alive.
lane::Params make_params(const Inputs& in, const Split& split, int most, int64_t bytes, Tensor& scratch) {
  const auto& s = in.size;
  SCAN_CHECK(s.l * s.d <= INT32_MAX, kOp, "expected fewer than 2^31 numbers per image on CUDA, got ", s.l,
             " tokens of ", s.d, " channels");
  lane::Params p{};
  const int width = 32 * split.channels, steps = (split.ranks + 1) / 2;
  p.b = s.b, p.l = s.l, p.d = s.d, p.k = s.k, p.r = s.r, p.m = s.m;
  p.strips = ceil_div(s.d, width);
  set_warps(p, in, most, bytes);
  set_segments(p, in);
  p.end_pair = p.k / 2;
  const int64_t blocks = s.b * p.segments * p.slabs;
  SCAN_CHECK(blocks <= INT32_MAX, kOp, "expected fewer than 2^31 blocks, got ", blocks, "; split the batch");
  p.select_row = in.select.size(0) == 1 ? 0 : p.k / 2;
  p.x = data<void>(in.x), p.proj = data<void>(in.proj);
  p.A = data<float>(in.A), p.D = data<float>(in.D);
  p.tables = data<int>(in.tables), p.select = data<int>(in.select);

  const int64_t strips = int64_t{p.k} * p.strips;
  const int64_t expands = strips * (width / 8) * steps * kWarp, contracts = strips * (width / 16) * split.ranks * kWarp;
  scratch = empty_like_on(in.x, {4 * expands + 2 * contracts + strips * width}, kFloat);
  p.expand = data<uint4>(scratch);
  p.contract = reinterpret_cast<const uint2*>(p.expand + expands);
  p.bias = reinterpret_cast<const float*>(p.contract + contracts);
  return p;
}

// Tensors that a pass over the segments needs beside `scratch`.
struct Segments {
  Tensor spans, enter;
};

Segments make_segments(lane::Params& p, const Tensor& like) {
  if (p.segments == 1) return {};
  const Segments s{empty_like_on(like, {p.b, p.k, p.segments, p.d, 2}, kFloat),
                   empty_like_on(like, {p.b, p.k, p.segments, p.d}, kFloat)};
  p.spans = data<float2>(s.spans), p.enter = data<float>(s.enter);
  return s;
}

// Gradient of dt_weight (k, d, r) from that of z: for each route the product of dz (b l, d) and dt (b l, r).
Tensor weight_gradient(const Tensor& dz, const Tensor& proj, const Sizes& s) {
  const int64_t rows = s.b * s.l;
  const Tensor left = torch::stable::transpose(torch::stable::view(dz, {rows, s.k, s.d}), 0, 1);
  const Tensor all = torch::stable::view(proj, {rows, s.k, s.m});
  Tensor dt = torch::stable::transpose(all, 0, 1);
  dt = torch::stable::contiguous(torch::stable::narrow(dt, 2, 0, s.r));  // else cuBLAS takes a slow kernel
  std::array<StableIValue, 3> stack{torch::stable::detail::from(torch::stable::transpose(left, 1, 2)),
                                    torch::stable::detail::from(dt), torch::stable::detail::from(kFloat)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::bmm", "dtype", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

template <typename Function>
void dispatch_half(ScalarType dtype, Function&& f) {
  dtype == ScalarType::Half ? f(TypeTag<__half>{}) : f(TypeTag<__nv_bfloat16>{});
}

}  // namespace

bool takes_lanes(const Inputs& in, bool out_float) {
  const auto& s = in.size;
  const ScalarType dtype = in.x.scalar_type();
  const bool half = dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
  return in.both_ways() && half && !out_float && s.n == 1 && s.d % 8 == 0 && s.r <= 8 * lane::kMaxTiles;
}

ForwardResult forward_lanes(const Inputs& given) {
  Inputs in = given;
  const auto& s = in.size;
  in.x = aligned_rows(in.x), in.proj = aligned_rows(in.proj);
  const Tensor y = empty_like_on(in.x, {s.b, s.l, s.d}, in.x.scalar_type());
  const Tensor states = empty_like_on(in.x, {s.b, s.k, ceil_div(s.l, lane::kRows), s.d}, kFloat);
  if (y.numel() == 0) return {y, states};
  const Split split = make_split(s);
  Tensor scratch;
  lane::Params p = make_params(in, split, lane::kMaxGroup, lane::forward_bytes(split.channels, split.ranks), scratch);
  p.y = data<void>(y);
  p.states = data<float>(states);
  const Segments segments = make_segments(p, in.x);
  dispatch_half(in.x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto stream = current_stream(in.x);
    lane::launch_pack<T>(data<float>(in.weight), data<float>(in.bias), p, split.channels, split.ranks, stream);
    if (p.segments > 1) lane::launch_probe<T>(p, split.channels, split.ranks, false, stream);
    lane::launch_forward<T>(p, split.channels, split.ranks, stream);
  });
  return {y, states};
}

BackwardResult backward_lanes(const Inputs& given, const Tensor& dy, const Tensor& states) {
  Inputs in = given;
  const auto& s = in.size;
  in.x = aligned_rows(in.x), in.proj = aligned_rows(in.proj);
  const ScalarType dtype = in.x.scalar_type();
  const Tensor gradient = aligned_rows(torch::stable::contiguous(to_dtype(dy, dtype)));
  const Tensor borders = torch::stable::contiguous(states);
  const Tensor dx = empty_like_on(in.x, {s.b, s.l, s.d}, dtype), dproj = empty_like_on(in.x, {s.b, s.l, s.k, s.m}, dtype);
  Tensor dweight = sum_like_on(in.x, {s.k, s.d, s.r});
  const Tensor dbias = sum_like_on(in.x, {s.k, s.d}), dD = sum_like_on(in.x, {s.k, s.d});
  const Tensor dA = sum_like_on(in.x, {s.k, s.d, 1});
  if (dx.numel() == 0) return {dx, dproj, dweight, dbias, dA, dD};

  const Split split = make_split(s);
  Tensor scratch, parts, dz;
  // With the most ranks, smaller blocks: two of them fit into a multiprocessor's shared memory.
  lane::Params p = make_params(in, split, split.ranks > 4 ? 2 : lane::kMaxGroup,
                               lane::backward_bytes(split.channels, split.ranks), scratch);
  const bool writes_dz = split.ranks > lane::kSumTiles;
  const int64_t ranks = writes_dz ? 0 : s.r;
  p.columns = static_cast<int>(ranks + 3);
  const int64_t groups = int64_t{p.b} * p.segments * p.relay;
  const Tensor dweights = empty_like_on(in.x, {groups, s.k, s.d, p.columns}, kFloat);
  const Segments segments = make_segments(p, in.x);
  p.y = data<void>(dx);
  p.dy = data<void>(gradient);
  p.states = data<float>(borders);
  p.dweights = data<float>(dweights);
  p.dproj = data<void>(dproj);
  if (writes_dz) {
    dz = empty_like_on(in.x, {s.b, s.l, s.k, s.d}, dtype);
    p.dz = data<void>(dz);
  }
  if (p.slabs > 1) {
    parts = empty_like_on(in.x, {p.slabs, s.b, s.l, s.k, s.m}, kFloat);
    p.dproj = data<void>(parts);
  }
  // What sums over slabs and images needs of the other form's parameters.
  Params sizes{};
  sizes.b = p.b, sizes.l = p.l, sizes.d = p.d, sizes.k = p.k, sizes.r = ranks, sizes.m = p.m, sizes.n = 1;
  sizes.slabs = p.slabs, sizes.dproj = p.dproj, sizes.dweights = p.dweights;
  const Gradients to{data<void>(dproj), data<float>(dweight), data<float>(dbias), data<float>(dA), data<float>(dD)};
  dispatch_half(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto stream = current_stream(in.x);
    lane::launch_pack<T>(data<float>(in.weight), data<float>(in.bias), p, split.channels, split.ranks, stream);
    if (p.segments > 1) lane::launch_probe<T>(p, split.channels, split.ranks, true, stream);
    lane::launch_backward<T>(p, split.channels, split.ranks, stream);
    launch_sums<T>(sizes, to, groups, stream);
  });
  if (writes_dz) dweight = weight_gradient(dz, in.proj, s);
  return {dx, dproj, dweight, dbias, dA, dD};
}

}  // namespace scan::route
