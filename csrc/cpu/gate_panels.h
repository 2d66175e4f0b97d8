// The weights of one direction in panels of gates, as forward products read them.
#pragma once
#include "cpu/traits.h"

namespace fusedseq {
namespace FSQ_ISA {

// Calls f(first vector, count) over vectors [begin, end) in panels that begin at multiples of `widest`, or at `begin`.
template <class F>
FSQ_INLINE void for_grid(int64_t begin, int64_t end, int widest, F f) {
  for (int64_t v = begin, next; v < end; v = next) {
    next = min64(end, (v / widest + 1) * widest);
    f(v, int(next - v));
  }
}

// Columns from vector v on, up to the next multiple of `widest`, in panels that begin at such multiples, K words long.
template <class S>
FSQ_INLINE Columns<S> grid_columns(const S* panels, int64_t K, int64_t vectors, int64_t v, int widest) {
  constexpr int L = kLanes<S>;
  const int64_t first = v / widest * widest;
  return {panels + first * L * K + (v - first) * L, min64(widest, vectors - first) * L};
}

// Panels of a block start at the block's base; the panel of unit vector v begins v vectors further, however wide it is.
//
// Panels that are kept from call to call lie on a grid of Blk::units vectors, since nobody knows how later calls will
// divide the units among threads. A thread whose slice begins inside a panel of one gate reads some of its columns; in
// panels of several gates columns are not next to each other, so there slices must begin on the grid.
template <Cell C, class P>
class GatePanels {
  typedef typename P::Sum S;
  static constexpr int L = kLanes<S>;
  static constexpr int G = gate_count(C);

 public:
  // Without `weights` there are only biases.
  void place(Arena& arena, const ScanParams& p, bool weights, bool grid = false) {
    grid_ = grid;
    units_ = (p.H + L - 1) / L * L;
    x_words_ = words<P>(p.I);
    h_words_ = words<P>(p.R);
    w_ih_ = arena.take<S>(weights ? G * units_ * x_words_ : 0);
    w_hh_ = arena.take<S>(weights ? G * units_ * h_words_ : 0);
    bias_x_ = arena.take<S>(G * units_);
    bias_h_ = arena.take<S>(units_);
    weights_ = weights;
  }

  // u unit vectors from v on.
  template <class Blk>
  void pack(const ScanParams& p, int64_t d, int64_t v, int u) const {
    constexpr int ng = Blk::gates;
    if (weights_) {  // whole panels, also on a grid
      pack_gates<P>(at<Blk>(w_ih_, x_words_, v), ng, u, p.w_ih[d], p.dtype, Blk::gate0, p.H, v * L, p.I);
      pack_gates<P>(at<Blk>(w_hh_, h_words_, v), ng, u, p.w_hh[d], p.dtype, Blk::gate0, p.H, v * L, p.R);
    }
    for (int g = 0; g < ng; ++g)
      for (int i = 0; i < u; ++i) {
        // torch's GRU keeps b_hn apart: it is multiplied by the reset gate.
        const bool apart = C == Cell::gru && g == 2;
        const int64_t unit = (v + i) * L;
        store(at<Blk>(bias_x_, 1, v) + (g * u + i) * L,
              load_bias<S>(p.b_ih[d], apart ? nullptr : p.b_hh[d], p.dtype, Blk::gate0 + g, p.H, unit));
        if (apart) store(bias_h_ + unit, load_bias<S>(p.b_hh[d], nullptr, p.dtype, 2, p.H, unit));
      }
  }

  template <class Blk>
  Columns<S> w_ih(int64_t v, int u) const {
    return columns_of<Blk>(w_ih_, x_words_, v, u);
  }
  template <class Blk>
  Columns<S> w_hh(int64_t v, int u) const {
    return columns_of<Blk>(w_hh_, h_words_, v, u);
  }
  template <class Blk>
  const S* bias_x(int64_t v) const {
    return at<Blk>(bias_x_, 1, v);
  }
  const S* bias_h(int64_t v) const { return bias_h_ + v * L; }
  // Where the panel of unit vector v lies in an array that is laid out like these, `rows` long.
  template <class Blk>
  S* at(S* base, int64_t rows, int64_t v) const {
    return base + (Blk::gate0 * units_ + v * Blk::gates * L) * rows;
  }

 private:
  template <class Blk>
  Columns<S> columns_of(S* base, int64_t K, int64_t v, int u) const {
    if (grid_ && Blk::gates == 1) return grid_columns<S>(at<Blk>(base, K, 0), K, units_ / L, v, Blk::units);
    return {at<Blk>(base, K, v), Blk::gates * u * L};
  }

  S *w_ih_, *w_hh_, *bias_x_, *bias_h_;
  int64_t units_, x_words_, h_words_;
  bool weights_, grid_;
};

}  // namespace FSQ_ISA
}  // namespace fusedseq
