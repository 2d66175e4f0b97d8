#include "cpu/families.h"
#include "cpu/scan_backward.h"
#include "cpu/scan_forward.h"

namespace fusedseq {
namespace FSQ_ISA {

template <class S>
static Status forward(const ScanParams& p) {
  if (p.cell == Cell::rnn_relu) return ForwardScan<Cell::rnn_relu, S>(p).run();
  return ForwardScan<Cell::rnn_tanh, S>(p).run();
}

template <class S>
static Status backward(const ScanGradParams& p) {
  if (p.fwd.cell == Cell::rnn_relu) return BackwardScan<Cell::rnn_relu, S>(p).run();
  return BackwardScan<Cell::rnn_tanh, S>(p).run();
}

Status rnn_forward(const ScanParams& p) { return p.dtype == DType::f64 ? forward<double>(p) : forward<float>(p); }

Status rnn_backward(const ScanGradParams& p) {
  return p.fwd.dtype == DType::f64 ? backward<double>(p) : backward<float>(p);
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
