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

template <Cell C>
static int64_t pack(const ScanParams& p, void* const* into) {
  return with_operands(p, [&](auto kind) { return ForwardScan<C, decltype(kind)>(p).pack(into); });
}

Status rnn_forward(const ScanParams& p) {
  return p.cell == Cell::rnn_relu ? forward<Cell::rnn_relu>(p) : forward<Cell::rnn_tanh>(p);
}

Status rnn_backward(const ScanGradParams& p) {
  return p.fwd.cell == Cell::rnn_relu ? backward<Cell::rnn_relu>(p) : backward<Cell::rnn_tanh>(p);
}

int64_t rnn_pack(const ScanParams& p, void* const* into) {
  return p.cell == Cell::rnn_relu ? pack<Cell::rnn_relu>(p, into) : pack<Cell::rnn_tanh>(p, into);
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
