// bmm with a float32 result, which PyTorch has for GPUs alone.
#pragma once

#include "common.h"

namespace emulator {

inline AOTITorchError product(StableIValue* stack) {
  using torch::stable::detail::from;
  const auto wide = [](StableIValue value) {
    return from(torch::stable::to(torch::stable::detail::to<torch::stable::Tensor>(value), scan::kFloat));
  };
  stack[0] = wide(stack[0]), stack[1] = wide(stack[1]);
  return torch_call_dispatcher("aten::bmm", "", stack, TORCH_ABI_VERSION);
}

}  // namespace emulator
