// The route scan with a lane for each channel or two: which inputs take it, allocation, how the work is split.
#include "lane.cuh"

#include <algorithm>
#include <array>
#include <cmath>

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

// What a pass costs beside its walk, as parts of it.
struct Costs {
  double probe, row;  // the pass before, where there are segments; a slab's row of dproj, for each column and channel
};
constexpr Costs kForward{0.6, 0.}, kBackward{0.15, 1.1};
constexpr double kTurns = 0.075;  // the same, of warps that take turns
// A multiprocessor with n warps takes as long for a step of them all as n + kIdle warps' steps would take without any
// waiting: measured with 6 and 12 warps, forward and backward.
constexpr double kIdle = 4.25;

// Time of a pass, in steps of a warp without any waiting. at_once: blocks that a multiprocessor holds.
double time_of(const lane::Params& p, const Costs& costs, int64_t at_once, int64_t multiprocessors) {
  const int64_t blocks = ceil_div(int64_t{p.b} * p.segments * p.slabs, multiprocessors), warps = 2 * p.group * p.relay;
  const int64_t rounds = blocks / at_once, rest = blocks % at_once;
  const double of_step = rounds * (kIdle + at_once * warps) + (rest ? kIdle + rest * warps : 0.);
  const double more = (p.relay > 1 ? kTurns : 0.) + (p.segments > 1 ? costs.probe : 0.) + costs.row * p.slabs * p.m / p.d;
  return p.k / 2 * (p.chunks / p.relay) * of_step * (1. + more);
}

void set_segments(lane::Params& p, int64_t count) {
  p.chunks = ceil_div(ceil_div(p.slots, count), p.relay) * p.relay;
  p.segments = ceil_div(p.slots, p.chunks);
}

// Strips of a block, warps that take turns at each, and segments: of all splits whose blocks fit, the one of the least
// time. A table is cut either not at all or as far as all blocks still run at once. bytes: shared memory of a warp.
void set_split(lane::Params& p, const Inputs& in, const Costs& costs, int64_t bytes) {
  constexpr int64_t kWarps = 2 * lane::kMaxGroup * lane::kMaxRelay;  // the registers of a multiprocessor hold so many
  int limit = 0;
  check_cuda(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, in.x.get_device_index()), kOp);
  const int64_t multiprocessors = sm_count(in.x, kOp);
  p.slots = ceil_div(p.l, lane::kRows);
  lane::Params best = p;
  double least = INFINITY;
  for (p.group = std::min(p.strips, lane::kMaxGroup); p.group > 0; --p.group) {
    for (p.relay = 1; p.relay <= lane::kMaxRelay; ++p.relay) {
      const int64_t warps = 2 * p.group * p.relay, at_once = std::min(kWarps / warps, limit / (warps * bytes));
      if (p.strips % p.group || at_once == 0) continue;
      p.slabs = p.strips / p.group;
      const int64_t fitting = at_once * multiprocessors / (int64_t{p.b} * p.slabs);
      for (const int64_t count : {int64_t{1}, std::clamp<int64_t>(fitting, 1, std::max(1, p.slots / lane::kMinSpan))}) {
        set_segments(p, count);
        const double time = time_of(p, costs, at_once, multiprocessors);
        if (time < least) least = time, best = p;
      }
    }
  }
  SCAN_CHECK(least < INFINITY, kOp, "expected a GPU with ", 2 * bytes, " bytes of shared memory a block, got ", limit);
  p = best;
}

// `scratch` keeps the packed weights alive.
lane::Params make_params(const Inputs& in, const Split& split, const Costs& costs, int64_t bytes, Tensor& scratch) {
  const auto& s = in.size;
  SCAN_CHECK(s.l * s.d <= INT32_MAX, kOp, "expected fewer than 2^31 numbers per image on CUDA, got ", s.l,
             " tokens of ", s.d, " channels");
  lane::Params p{};
  const int width = 32 * split.channels, steps = (split.ranks + 1) / 2;
  p.b = s.b, p.l = s.l, p.d = s.d, p.k = s.k, p.r = s.r, p.m = s.m;
  p.strips = ceil_div(s.d, width);
  set_split(p, in, costs, bytes);
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
  lane::Params p = make_params(in, split, kForward, lane::forward_bytes(split.channels, split.ranks), scratch);
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
  lane::Params p = make_params(in, split, kBackward, lane::backward_bytes(split.channels, split.ranks), scratch);
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
