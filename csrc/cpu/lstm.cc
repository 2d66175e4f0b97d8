#include "cpu/families.h"
#include "cpu/scan_backward.h"
#include "cpu/scan_forward.h"

namespace fusedseq {
namespace FSQ_ISA {

Status lstm_forward(const ScanParams& p) {
  if (p.dtype == DType::f64) return ForwardScan<Cell::lstm, double>(p).run();
  return ForwardScan<Cell::lstm, float>(p).run();
}

Status lstm_backward(const ScanGradParams& p) {
  if (p.fwd.dtype == DType::f64) return BackwardScan<Cell::lstm, double>(p).run();
  return BackwardScan<Cell::lstm, float>(p).run();
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
