// What every op of the library shares on the host: the tensor type, checks, allocation, dispatch
// over dtypes. Only PyTorch's stable ABI is used (torch/csrc/stable, torch/headeronly), so one
// build serves later versions.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

// SCAN_CHECK(condition, op, "expected ...", value, ", got ", value): throws RuntimeError in Python.
#define SCAN_CHECK(condition, op, ...) STD_TORCH_CHECK(condition, op, ": ", __VA_ARGS__)

namespace scan {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Shape = std::initializer_list<int64_t>;

constexpr auto kFloat = ScalarType::Float;

template <typename Scalar>
struct TypeTag {
  using type = Scalar;
};

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Double: return "float64";
    default: return "another dtype";
  }
}

// Calls f(TypeTag<T>{}) with T = float, Half or BFloat16.
template <typename Function>
void dispatch_dtype(const char* op, ScalarType dtype, Function&& f) {
  switch (dtype) {
    case ScalarType::Float: return f(TypeTag<float>{});
    case ScalarType::Half: return f(TypeTag<Half>{});
    case ScalarType::BFloat16: return f(TypeTag<BFloat16>{});
    default:
      SCAN_CHECK(false, op, "expected float32, float16 or bfloat16, got ",
                 dtype_name(dtype));
  }
}

inline Tensor empty_like_on(const Tensor& like, Shape shape, ScalarType dtype) {
  return torch::stable::new_empty(like, {shape.begin(), shape.size()}, dtype);
}

inline Tensor zeros_like_on(const Tensor& like, Shape shape, ScalarType dtype) {
  return torch::stable::new_zeros(like, {shape.begin(), shape.size()}, dtype);
}

inline Tensor to_dtype(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

// Dense float32 copy (or the tensor itself): parameters such as A, D and the bias.
inline Tensor dense_float(const Tensor& tensor) {
  return torch::stable::contiguous(to_dtype(tensor, kFloat));
}

// The tensor itself where its last dimension is dense, else a contiguous copy.
inline Tensor dense_rows(const Tensor& tensor) {
  const auto last = tensor.dim() - 1;
  return tensor.stride(last) == 1 || tensor.size(last) <= 1 ? tensor
                                                           : torch::stable::contiguous(tensor);
}

// Whether every row (last dimension) starts and ends on 16 bytes, counted in items of `dtype`.
inline bool rows_aligned(std::initializer_list<const Tensor*> tensors, ScalarType dtype) {
  const int64_t items = dtype == kFloat ? 4 : 8;
  for (const Tensor* tensor : tensors) {
    const auto last = tensor->dim() - 1;
    if (reinterpret_cast<uintptr_t>(tensor->const_data_ptr()) % 16) return false;
    if (tensor->size(last) % items) return false;
    for (int64_t i = 0; i < last; ++i) {
      if (tensor->size(i) > 1 && tensor->stride(i) % items) return false;
    }
  }
  return true;
}

inline Tensor sum_dim(const Tensor& tensor, int64_t dim) {
  return torch::stable::sum(tensor, torch::headeronly::IntHeaderOnlyArrayRef(&dim, 1));
}

inline std::string shape_text(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text += (i ? ", " : "") + std::to_string(tensor.size(i));
  }
  return text + ")";
}

inline void check_shape(const char* op, const char* name, const Tensor& tensor, Shape shape) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  std::string expected = "(";
  int64_t i = 0;
  for (const int64_t size : shape) {
    same = same && tensor.size(i) == size;
    expected += (i++ ? ", " : "") + std::to_string(size);
  }
  SCAN_CHECK(same, op, "expected ", name, " of shape ", expected, "), got ", shape_text(tensor));
}

inline void check_same_device(const char* op, const char* name, const Tensor& tensor,
                              const Tensor& like) {
  SCAN_CHECK(tensor.device() == like.device(), op, "expected ", name,
             " on the device of the first argument, got another");
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType dtype) {
  SCAN_CHECK(tensor.scalar_type() == dtype, op, "expected ", name, " of dtype ", dtype_name(dtype),
             ", got ", dtype_name(tensor.scalar_type()));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace scan
