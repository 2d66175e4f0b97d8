#include "cpu/families.h"
#include "cpu/scan_backward.h"
#include "cpu/scan_forward.h"

namespace fusedseq {
namespace FSQ_ISA {

Status gru_forward(const ScanParams& p) {
  return with_operands(p, [&](auto kind) { return ForwardScan<Cell::gru, decltype(kind)>(p).run(); });
}

Status gru_backward(const ScanGradParams& p) {
  return with_operands(p.fwd, [&](auto kind) { return BackwardScan<Cell::gru, decltype(kind)>(p).run(); });
}

int64_t gru_pack(const ScanParams& p, void* const* into) {
  return with_operands(p, [&](auto kind) { return ForwardScan<Cell::gru, decltype(kind)>(p).pack(into); });
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
