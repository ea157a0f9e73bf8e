// The schemas of the standard selective scan (forward, and backward as a second op), and how the
// library was built.
#include "common.h"

extern "C" __attribute__((visibility("default"))) const char* selective_scan_build() {
  return SCAN_BUILD;
}

STABLE_TORCH_LIBRARY_FRAGMENT(selective_scan, m) {
  m.def(
      "selective_scan_fwd(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, "
      "Tensor? delta_bias, bool delta_softplus, bool reverse, bool out_float, int keep_states) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "selective_scan_bwd(Tensor dy, Tensor? dlast, Tensor states, Tensor u, Tensor delta, "
      "Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, bool delta_softplus, "
      "bool reverse) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
