#include "cpu/families.h"
#include "cpu/scan_backward.h"
#include "cpu/scan_forward.h"

namespace fusedseq {
namespace FSQ_ISA {

template <Cell C>
static Status forward(const ScanParams& p) {
  return with_operands(p, [&](auto kind) { return ForwardScan<C, decltype(kind)>(p).run(); });
}

template <Cell C>
static Status backward(const ScanGradParams& p) {
  return with_operands(p.fwd, [&](auto kind) { return BackwardScan<C, decltype(kind)>(p).run(); });
}

Status rnn_forward(const ScanParams& p) {
  return p.cell == Cell::rnn_relu ? forward<Cell::rnn_relu>(p) : forward<Cell::rnn_tanh>(p);
}

Status rnn_backward(const ScanGradParams& p) {
  return p.fwd.cell == Cell::rnn_relu ? backward<Cell::rnn_relu>(p) : backward<Cell::rnn_tanh>(p);
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
