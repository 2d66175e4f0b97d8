#include "cpu/families.h"
#include "cpu/scan_backward.h"
#include "cpu/scan_forward.h"

namespace fusedseq {
namespace FSQ_ISA {

Status gru_reset_before_forward(const ScanParams& p) {
  if (p.dtype == DType::f64) return ForwardScan<Cell::gru_reset_before, double>(p).run();
  return ForwardScan<Cell::gru_reset_before, float>(p).run();
}

Status gru_reset_before_backward(const ScanGradParams& p) {
  if (p.fwd.dtype == DType::f64) return BackwardScan<Cell::gru_reset_before, double>(p).run();
  return BackwardScan<Cell::gru_reset_before, float>(p).run();
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
