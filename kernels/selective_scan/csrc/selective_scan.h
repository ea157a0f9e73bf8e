// Sizes and checks of the standard selective scan, shared by its CPU and CUDA kernels.
#pragma once

#include "common.h"

namespace scan {

constexpr char kOp[] = "selective_scan";
constexpr int64_t kMaxStates = 256;

// Positions per chunk. The state that enters each chunk is what the forward pass keeps for the
// backward pass.
inline int64_t chunk_length(ScalarType dtype) { return dtype == kFloat ? 128 : 256; }

// u, y: (b, d, l). delta: (b, d / share, l). A: (d, n). B, C: (b, g, n, l). D: (d). delta_bias:
// (d / share). group = d / g neighbouring channels share B and C, `share` of them a row of delta.
struct Sizes {
  int64_t b, d, l, n, g, group, share, chunks;
};

// What the forward pass keeps of the states, per chunk: nothing; the states that enter it, (b, d,
// chunks, n), which the backward pass takes; or (b, d, chunks, 2n), in turn the product of the
// decays from the start of the row and the state, both after the chunk.
enum Keep : int64_t { kNothing = 0, kEntering = 1, kPairs = 2 };

// The inputs of a scan with dense last dimensions, and parameters in float32.
struct Inputs {
  Tensor u, delta, A, B, C;
  OptionalTensor D, bias;
  bool softplus, reverse;
  Sizes size;
};

inline Sizes check_sizes(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                         const Tensor& C, const OptionalTensor& D, const OptionalTensor& bias) {
  SCAN_CHECK(u.dim() == 3 && delta.dim() == 3 && A.dim() == 2 && B.dim() == 4, kOp,
             "expected u (b, d, l), delta (b, d, l), A (d, n) and B (b, g, n, l), got u ",
             shape_text(u), ", delta ", shape_text(delta), ", A ", shape_text(A), ", B ",
             shape_text(B));
  Sizes s{u.size(0), u.size(1), u.size(2), A.size(1), B.size(1), 0, 0, 0};
  const int64_t rows = delta.size(1);  // of delta, per image
  SCAN_CHECK(s.g >= 1 && s.d % s.g == 0, kOp,
             "expected d to be a multiple of the groups of B, got d = ", s.d, " and ", s.g,
             " groups");
  SCAN_CHECK(rows == s.d || (rows >= 1 && s.d % rows == 0), kOp,
             "expected d to be a multiple of the channels of delta, got d = ", s.d, " and ", rows,
             " channels of delta");
  SCAN_CHECK(s.n >= 1 && s.n <= kMaxStates, kOp, "expected 1 to ", kMaxStates, " states, got ",
             s.n);
  SCAN_CHECK(s.l <= INT32_MAX - 256, kOp, "expected a length below 2^31 - 256, got ", s.l);
  s.group = s.d / s.g;
  s.share = std::max<int64_t>(1, s.d / std::max<int64_t>(1, rows));
  s.chunks = ceil_div(s.l, chunk_length(u.scalar_type()));
  check_shape(kOp, "delta", delta, {s.b, rows, s.l});
  check_shape(kOp, "A", A, {s.d, s.n});
  check_shape(kOp, "B", B, {s.b, s.g, s.n, s.l});
  check_shape(kOp, "C", C, {s.b, s.g, s.n, s.l});
  for (const auto& [name, tensor, size] :
       {std::tuple{"D", D, s.d}, std::tuple{"delta_bias", bias, rows}}) {
    if (tensor.has_value()) {
      check_shape(kOp, name, *tensor, {size});
      check_same_device(kOp, name, *tensor, u);
    }
  }
  return s;
}

inline Inputs make_inputs(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                          const Tensor& C, const OptionalTensor& D, const OptionalTensor& bias,
                          bool softplus, bool reverse) {
  const Sizes size = check_sizes(u, delta, A, B, C, D, bias);
  for (const auto& [name, tensor] :
       {std::pair{"delta", &delta}, std::pair{"B", &B}, std::pair{"C", &C}}) {
    check_dtype(kOp, name, *tensor, u.scalar_type());
    check_same_device(kOp, name, *tensor, u);
  }
  check_same_device(kOp, "A", A, u);
  const auto optional_float = [](const OptionalTensor& tensor) {
    return tensor.has_value() ? OptionalTensor(dense_float(*tensor)) : OptionalTensor();
  };
  return {dense_rows(u),     dense_rows(delta), dense_float(A),       dense_rows(B),
          dense_rows(C),     optional_float(D), optional_float(bias), softplus,
          reverse,           size};
}

inline const float* float_pointer(const OptionalTensor& tensor) {
  return tensor.has_value() ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr;
}

// y (b, d, l), the last state (b, d, n), and what is kept of the states, or (0).
using ForwardResult = std::tuple<Tensor, Tensor, Tensor>;
// du, ddelta, dA, dB, dC, dD, ddelta_bias; the last two of size (0) where there is no D or bias.
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

inline Tensor empty_states(const Inputs& in, int64_t keep) {
  const auto& s = in.size;
  SCAN_CHECK(keep == kNothing || keep == kEntering || keep == kPairs, kOp,
             "expected keep_states 0, 1 or 2, got ", keep);
  return keep == kNothing ? empty_like_on(in.u, {0}, kFloat)
                          : empty_like_on(in.u, {s.b, s.d, s.chunks, keep * s.n}, kFloat);
}

inline void check_gradients(const Inputs& in, const Tensor& dy, const OptionalTensor& dlast,
                            const Tensor& states) {
  const auto& s = in.size;
  check_shape(kOp, "the gradient of y", dy, {s.b, s.d, s.l});
  SCAN_CHECK(dy.scalar_type() == in.u.scalar_type() || dy.scalar_type() == kFloat, kOp,
             "expected the gradient of y in float32 or the dtype of u, got ",
             dtype_name(dy.scalar_type()));
  check_same_device(kOp, "the gradient of y", dy, in.u);
  check_shape(kOp, "the saved states", states, {s.b, s.d, s.chunks, s.n});
  check_dtype(kOp, "the saved states", states, kFloat);
  if (dlast.has_value()) {
    check_shape(kOp, "the gradient of the last state", *dlast, {s.b, s.d, s.n});
    check_same_device(kOp, "the gradient of the last state", *dlast, in.u);
  }
}

inline BackwardResult zero_gradients(const Inputs& in) {
  const auto& s = in.size;
  const auto zeros = [&](Shape shape, ScalarType dtype) {
    return zeros_like_on(in.u, shape, dtype);
  };
  const auto dtype = in.u.scalar_type();
  return {zeros({s.b, s.d, s.l}, dtype),
          zeros({s.b, in.delta.size(1), s.l}, dtype),
          zeros({s.d, s.n}, kFloat),
          zeros({s.b, s.g, s.n, s.l}, dtype),
          zeros({s.b, s.g, s.n, s.l}, dtype),
          zeros({in.D ? s.d : 0}, kFloat),
          zeros({in.bias ? in.delta.size(1) : 0}, kFloat)};
}

// (d) or (b, d, l) summed over the channels that share a row of delta.
inline Tensor sum_shared(const Sizes& s, const Tensor& tensor) {
  if (s.share == 1) return tensor;
  const int64_t rows = s.d / s.share, flat[] = {rows, s.share}, whole[] = {s.b, rows, s.share, s.l};
  const bool is_flat = tensor.dim() == 1;
  const torch::headeronly::IntHeaderOnlyArrayRef shape(is_flat ? flat : whole, is_flat ? 2 : 4);
  return sum_dim(torch::stable::view(tensor, shape), is_flat ? 1 : 2);
}

// The gradients from their parts: dA, dD, dbias summed over the images, dB, dC (b, g, slabs, n, l)
// over the slabs, ddelta and dbias over the channels that share a row of delta.
inline BackwardResult join_gradients(const Inputs& in, const BackwardResult& parts) {
  const auto& [du, ddelta, dA, dB, dC, dD, dbias] = parts;
  const auto& s = in.size;
  const auto dtype = in.u.scalar_type();
  const Tensor none = empty_like_on(in.u, {0}, kFloat);
  return {du,
          sum_shared(s, ddelta),
          sum_dim(dA, 0),
          to_dtype(sum_dim(dB, 2), dtype),
          to_dtype(sum_dim(dC, 2), dtype),
          in.D ? sum_dim(dD, 0) : none,
          in.bias ? sum_shared(s, sum_dim(dbias, 0)) : none};
}

}  // namespace scan
