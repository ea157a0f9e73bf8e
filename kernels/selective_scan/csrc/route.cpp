// The schemas of the route scan; their kernels are in route_cpu.cpp and route_cuda.cu.
#include "common.h"

STABLE_TORCH_LIBRARY_FRAGMENT(selective_scan, m) {
  m.def(
      "route_scan_fwd(Tensor x, Tensor proj, Tensor dt_weight, Tensor dt_bias, Tensor A, Tensor D, Tensor tables, "
      "Tensor select, int reverse, bool out_float) -> (Tensor, Tensor)");
  m.def(
      "route_scan_bwd(Tensor dy, Tensor x, Tensor proj, Tensor dt_weight, Tensor dt_bias, Tensor A, Tensor D, "
      "Tensor tables, Tensor select, Tensor states, int reverse) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
