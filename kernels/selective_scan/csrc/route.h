// Sizes, checks and work split of the route scan, shared by its CPU and CUDA kernels.
#pragma once

#include "common.h"

namespace scan::route {

constexpr char kOp[] = "route_scan";
constexpr int kMaxRoutes = 32;
constexpr int kChunk = 64;  // positions per chunk; states are kept at the borders

// x, y: (b, l, d). proj: (b, l, k, m) with m = r + 2n. tables: (t, l).
struct Sizes {
  int64_t b, l, d, k, r, n, m, t;
};

// The inputs, dense, parameters in float32 and index tensors in int32.
struct Inputs {
  Tensor x, proj, weight, bias, A, D, tables, select;
  int64_t reverse;  // bit i: route i walks its table backwards
  Sizes size;

  // Routes i and i + k / 2 follow one row of tables, forwards and backwards; select then has k / 2 columns.
  bool both_ways() const { return select.size(1) != size.k; }
};

inline Tensor dense_index(const Tensor& tensor) {
  return torch::stable::contiguous(to_dtype(tensor, ScalarType::Int));
}

inline Sizes check_sizes(const Tensor& x, const Tensor& proj, const Tensor& weight,
                         const Tensor& A, const Tensor& tables) {
  SCAN_CHECK(x.dim() == 3 && weight.dim() == 3 && A.dim() == 3 && tables.dim() == 2, kOp,
             "expected x (b, l, d), dt_weight (k, d, r), A (k, d, n) and tables (t, l), got x ",
             shape_text(x), ", dt_weight ", shape_text(weight), ", A ", shape_text(A),
             ", tables ", shape_text(tables));
  Sizes s{x.size(0), x.size(1),      x.size(2), weight.size(0), weight.size(2),
          A.size(2), proj.size(-1), tables.size(0)};
  SCAN_CHECK(s.k >= 1 && s.k <= kMaxRoutes, kOp, "expected 1 to ", kMaxRoutes, " routes, got ",
             s.k);
  SCAN_CHECK(s.n >= 1 && s.r >= 1, kOp, "expected at least one state and rank 1, got n = ", s.n,
             " and r = ", s.r);
  SCAN_CHECK(s.l <= (int64_t{1} << 30) && s.d <= (int64_t{1} << 30), kOp,
             "expected at most 2^30 tokens and channels, got ", s.l, " and ", s.d);
  check_shape(kOp, "proj", proj, {s.b, s.l, s.k, s.r + 2 * s.n});
  return s;
}

inline Inputs make_inputs(const Tensor& x, const Tensor& proj, const Tensor& weight,
                          const Tensor& bias, const Tensor& A, const Tensor& D,
                          const Tensor& tables, const Tensor& select, int64_t reverse) {
  const Sizes s = check_sizes(x, proj, weight, A, tables);
  check_shape(kOp, "dt_weight", weight, {s.k, s.d, s.r});
  check_shape(kOp, "dt_bias", bias, {s.k, s.d});
  check_shape(kOp, "A", A, {s.k, s.d, s.n});
  check_shape(kOp, "D", D, {s.k, s.d});
  check_shape(kOp, "tables", tables, {s.t, s.l});
  SCAN_CHECK(select.dim() == 2, kOp, "expected select (b, k), got ", shape_text(select));
  const bool both = 2 * select.size(1) == s.k && reverse == ((int64_t{1} << s.k) - (int64_t{1} << s.k / 2));
  check_shape(kOp, "select", select, {select.size(0) == 1 ? 1 : s.b, both ? s.k / 2 : s.k});
  check_dtype(kOp, "proj", proj, x.scalar_type());
  for (const Tensor* tensor : {&proj, &weight, &bias, &A, &D, &tables, &select}) {
    check_same_device(kOp, "every input", *tensor, x);
  }
  return {torch::stable::contiguous(x), torch::stable::contiguous(proj),
          dense_float(weight),          dense_float(bias),
          dense_float(A),               dense_float(D),
          dense_index(tables),          dense_index(select),
          reverse,                      s};
}

// A reversed route is a walk over the table's row from its end: position i takes entry l - 1 - i.
inline bool is_reversed(int64_t reverse, int64_t route) { return (reverse >> route) & 1; }

// y (b, l, d), and the states at the borders of the chunks, kept for the backward pass.
using ForwardResult = std::tuple<Tensor, Tensor>;
// Gradients of x, proj, dt_weight, dt_bias, A, D.
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Room for a sum over the tokens, which the kernels write whole; zero where there is no token.
inline Tensor sum_like_on(const Tensor& x, Shape shape) {
  return x.numel() ? empty_like_on(x, shape, kFloat) : zeros_like_on(x, shape, kFloat);
}

inline void check_gradient(const Inputs& in, const Tensor& dy) {
  const auto& s = in.size;
  check_shape(kOp, "the gradient of y", dy, {s.b, s.l, s.d});
  SCAN_CHECK(dy.scalar_type() == in.x.scalar_type() || dy.scalar_type() == kFloat, kOp,
             "expected the gradient of y in float32 or the dtype of x, got dtype number ",
             static_cast<int>(dy.scalar_type()));
  check_same_device(kOp, "the gradient of y", dy, in.x);
}

}  // namespace scan::route
