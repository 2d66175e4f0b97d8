// What a scan needs to know of a cell beyond its math: how gates are grouped into panels.
#pragma once
#include "cpu/layout.h"  // the value types, before the cell math that is written in them
//
#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"
#include "cpu/convert.h"

namespace fusedseq {
namespace FSQ_ISA {

// A block of NG gates from gate0 on, held together in one tile over up to UMAX unit vectors. With two blocks (a GRU
// that resets before the product) a step has two phases.
template <int GATE0, int NG, int UMAX>
struct Block {
  static constexpr int gate0 = GATE0, gates = NG, units = UMAX;
};
struct NoBlock {
  static constexpr int gate0 = 0, gates = 0, units = 1;
};

template <Cell C>
struct Traits;
template <>
struct Traits<Cell::lstm> {
  typedef Block<0, 4, 1> A;
  typedef NoBlock B;
};
template <>
struct Traits<Cell::gru> {
  typedef Block<0, 3, 1> A;
  typedef NoBlock B;
};
template <>
struct Traits<Cell::gru_reset_before> {
  typedef Block<0, 2, 2> A;
  typedef Block<2, 1, 4> B;
};
template <>
struct Traits<Cell::rnn_tanh> {
  typedef Block<0, 1, 4> A;
  typedef NoBlock B;
};
template <>
struct Traits<Cell::rnn_relu> : Traits<Cell::rnn_tanh> {};

// Bias of one gate over a unit vector: the sum of what is given.
template <class S>
FSQ_INLINE Vec<S> load_bias(const void* a, const void* b, DType dtype, int gate, int64_t H, int64_t unit) {
  Vec<S> v{};
  if (unit >= H) return v;
  if (a) v = load_as<S>(a, dtype, gate * H + unit, H - unit);
  if (b) v = v + load_as<S>(b, dtype, gate * H + unit, H - unit);
  return v;
}

// Columns v*L... of a weight [K, N] as right operand of `multiply`, u vectors wide. One step uses every weight once, so
// there they are read as they lie where whole vectors of the compute type do; else from panels.
template <class S>
struct Columns {
  const S* b;
  int64_t pitch;
};
template <class S>
FSQ_INLINE bool read_in_place(const ScanParams& p, int64_t N, int64_t v, int u) {
  return p.T == 1 && sizeof(S) == size_t(dtype_size(p.dtype)) && (v + u) * kLanes<S> <= N;
}
template <class P, class S>
FSQ_INLINE Columns<S> columns(const ScanParams& p, const S* panels, const void* w, int64_t K, int64_t N, int64_t v,
                              int u) {
  if (read_in_place<S>(p, N, v, u)) return {static_cast<const S*>(w) + v * kLanes<S>, N};
  return {panels + v * kLanes<S> * words<P>(K), u * kLanes<S>};
}
// Room for panels of all columns.
template <class P>
FSQ_INLINE int64_t column_space(const ScanParams& p, int64_t K, int64_t N) {
  typedef typename P::Sum S;
  const int64_t vectors = (N + kLanes<S> - 1) / kLanes<S>;
  return read_in_place<S>(p, N, 0, int(vectors)) ? 0 : words<P>(K) * vectors * kLanes<S>;
}
template <class P, class S>
FSQ_INLINE void prepare_columns(const ScanParams& p, S* panels, const void* w, int64_t K, int64_t N, int64_t v, int u) {
  if (!read_in_place<S>(p, N, v, u))
    pack_columns<P>(panels + v * kLanes<S> * words<P>(K), u, w, p.dtype, N, v * kLanes<S>, 0, K);
}

// Leading dimension of a state buffer: whole vectors, and one more so that rows of a tile do not share cache sets.
template <class S>
FSQ_INLINE int64_t state_pitch(int64_t n) {
  return round_up(n, kLanes<S>) + kLanes<S>;
}

// The state before a row's first step, in the compute type (zero if none was given or a reset comes first).
template <class S>
FSQ_INLINE void initial_state(S* dst, const void* src, const ScanParams& p, const Layout& lay, int64_t d, int64_t j,
                              int64_t width, bool reverse) {
  const int64_t first = reverse ? lay.length(j) - 1 : 0;
  if (src && !lay.flag(p.resets, first, j))
    load_row<S>(dst, src, p.dtype, (d * p.B + lay.user_row(j)) * width, width);
  else
    memset(dst, 0, sizeof(S) * size_t(width));
}
// The same as a left operand.
template <class P>
FSQ_INLINE void initial_operand(typename P::Value* dst, const void* src, const ScanParams& p, const Layout& lay,
                                int64_t d, int64_t j, int64_t width, bool reverse) {
  const int64_t first = reverse ? lay.length(j) - 1 : 0;
  if (src && !lay.flag(p.resets, first, j))
    load_operand<P>(dst, src, p.dtype, (d * p.B + lay.user_row(j)) * width, width);
  else
    memset(dst, 0, sizeof(typename P::Value) * size_t(words<P>(width) * P::per_word));
}

// Picks what the operands of a scan's products are made of. One step does not pay for packing, so it has no use for
// pairs. Nor has a ReLU: pairs round the state before the product, and its gradient jumps wherever that moves a sum
// across 0.
template <class F>
FSQ_INLINE auto with_operands(const ScanParams& p, F run) {
  if (p.dtype == DType::f64) return run(Whole<double>());
#if FSQ_BF16_PAIRS
  if (p.dtype == DType::bf16 && p.T > 1 && p.cell != Cell::rnn_relu) return run(Bf16Pairs());
#endif
  return run(Whole<float>());
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
