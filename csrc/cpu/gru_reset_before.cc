#include "cpu/families.h"
#include "cpu/scan_backward.h"
#include "cpu/scan_forward.h"

namespace fusedseq {
namespace FSQ_ISA {

Status gru_reset_before_forward(const ScanParams& p) {
  return with_operands(p, [&](auto kind) { return ForwardScan<Cell::gru_reset_before, decltype(kind)>(p).run(); });
}

Status gru_reset_before_backward(const ScanGradParams& p) {
  return with_operands(p.fwd, [&](auto kind) { return BackwardScan<Cell::gru_reset_before, decltype(kind)>(p).run(); });
}

int64_t gru_reset_before_pack(const ScanParams& p, void* const* into) {
  return with_operands(p, [&](auto kind) { return ForwardScan<Cell::gru_reset_before, decltype(kind)>(p).pack(into); });
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
