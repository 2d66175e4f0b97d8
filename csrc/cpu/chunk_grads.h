// The large products of the backward pass, one time chunk at a time: weight gradients, bias gradients, dx.
//
// Each element of a weight gradient sums its rows in an order that depends on the shapes alone, never on the threads.
#pragma once
#include "cpu/recompute.h"

namespace fusedseq {
namespace FSQ_ISA {

template <Cell C, class P>
class ChunkGrads {
  typedef typename P::Sum S;
  typedef typename P::Value Value;
  typedef Vec<S> V;
  static constexpr int L = kLanes<S>;
  static constexpr int G = gate_count(C);
  static constexpr int kColumns = C == Cell::gru ? 4 : G;  // of the gate gradients; GRU: r, z, n, W_hn h + b_hn
  static constexpr int kGroup = 48;  // columns of a left operand that lie together: whole cache lines, whole tiles

 public:
  ChunkGrads(const ScanGradParams& p, const Layout& lay, const Kept<C, P>& kept)
      : p(p), f(p.fwd), lay(lay), kept(kept) {}

  int64_t gate_columns() const { return kColumns * f.H; }
  int64_t gate_pitch() const { return round_up(gate_columns(), L) + L; }
  int64_t state_row_pitch() const { return state_pitch<S>(f.R); }
  // About 512 rows: enough that adding to the weight gradients costs little, few enough to stay in cache.
  int64_t chunk_steps() const { return max64(1, min64(f.T, 512 / max64(f.B, 1))); }
  int64_t chunk_rows() const { return chunk_steps() * f.B; }

  void place(Arena& arena, int g) {
    const int64_t rows = words<P>(chunk_rows());
    Work& w = work[g];
    w.w_ih = arena.take<S>(p.dx.data ? column_space<P>(f, G * f.H, f.I) : 0);
    w.dx = arena.take<S>(p.dx.data ? chunk_rows() * padded(f.I) : 0);
    w.left = arena.take<S>(wanted() ? rows * (kColumns * f.H + 2 * kGroup * f.threads) : 0);
    w.left_hr = arena.take<S>(wanted() && projected() ? rows * (f.R + 2 * kGroup * f.threads) : 0);
    w.x = arena.take<S>(wanted() ? rows * padded(f.I) : 0);
    w.h = arena.take<S>(wanted() ? rows * padded(C == Cell::gru_reset_before ? 2 * round_up(f.R, L) : f.R) : 0);
    w.m = arena.take<S>(wanted() && projected() ? rows * padded(f.H) : 0);
    w.db = arena.take<S>(wanted() ? gate_pitch() : 0);
  }
  void place_dx(Arena& arena) {
    for (int64_t d = 0; d < f.D; ++d) dx_rows[d] = arena.take<S>(f.D > 1 && p.dx.data ? all_rows() * f.I : 0);
  }

  void begin(const Share& s, int64_t d) {
    if (!p.dx.data) return;
    const Range mine = split((padded(f.I) / L + kMaxPanel - 1) / kMaxPanel, s.thread, s.threads);
    for (int64_t k = mine.begin; k < mine.end; ++k) {
      const int64_t v = k * kMaxPanel, vectors = padded(f.I) / L;
      const int u = int(min64(kMaxPanel, vectors - v));
      prepare_columns<P>(f, work[s.group].w_ih, f.w_ih[d], G * f.H, f.I, v, u);
    }
  }

  // Called by all threads of a group with the gate gradients dg (and for a projection dh) of steps [t0, t1) complete.
  void chunk(const Share& s, Barrier& group, int64_t d, int64_t t0, int64_t t1, bool first, const Value* dg,
             const Value* dh) {
    const Work& w = work[s.group];
    const int64_t rows = lay.offset(t1) - lay.offset(t0);
    if (wanted()) {
      pack_right(s, w, d, t0, t1, rows);
      group.wait(s.threads);
      weight_grads(s, w, d, rows, first, dg, dh);
    }
    if (p.dx.data) input_grads(s, w, d, t0, t1, rows, dg);
  }

  void finish(const Share& s, int64_t d) {
    if (!wanted()) return;
    if (f.T == 0) {
      if (s.thread == 0) clear(d);
      return;
    }
    if (s.thread > 0 || !p.db_ih[d]) return;
    const S* db = work[s.group].db;
    memcpy(p.db_ih[d], db, sizeof(S) * size_t(G * f.H));
    memcpy(p.db_hh[d], db, sizeof(S) * size_t(G * f.H));
    if (C == Cell::gru) memcpy(static_cast<S*>(p.db_hh[d]) + 2 * f.H, db + 3 * f.H, sizeof(S) * size_t(f.H));
  }

  // Both directions' shares of dx into the user's tensor.
  void combine_dx(int thread, int count) {
    lay.for_rows(0, f.T, split(lay.total(), thread, count), [&](int64_t t, int64_t j, int64_t k) {
      const S *a = dx_rows[0] + k * f.I, *b = dx_rows[1] + k * f.I;
      const int64_t at = lay.at(p.dx, t, j);
      for (int64_t i = 0; i < f.I; i += L)
        store_as<S>(p.dx.data, f.dtype, at + i, load_n(a + i, f.I - i) + load_n(b + i, f.I - i), f.I - i);
    });
  }

 private:
  struct Work {
    S *w_ih, *dx, *left, *left_hr, *x, *h, *m, *db;
  };

  const ScanGradParams& p;
  const ScanParams& f;
  const Layout& lay;
  const Kept<C, P>& kept;
  Work work[kMaxDirections];
  S* dx_rows[kMaxDirections];

  static int64_t padded(int64_t n) { return round_up(n, L); }
  bool wanted() const { return p.dw_hh[0] != nullptr; }  // dw_ih is empty, and may be null, at I = 0
  bool projected() const { return f.w_hr[0] != nullptr; }
  // Before the layout is filled.
  int64_t all_rows() const {
    int64_t n = 0;
    for (int64_t t = 0; t < f.T; ++t) n += f.batch_sizes ? f.batch_sizes[t] : f.B;
    return n;
  }

  void clear(int64_t d) {
    if (p.dw_ih[d]) memset(p.dw_ih[d], 0, sizeof(S) * size_t(G * f.H * f.I));
    memset(p.dw_hh[d], 0, sizeof(S) * size_t(G * f.H * f.R));
    if (p.db_ih[d]) memset(p.db_ih[d], 0, sizeof(S) * size_t(G * f.H));
    if (p.db_hh[d]) memset(p.db_hh[d], 0, sizeof(S) * size_t(G * f.H));
    if (p.dw_hr[d]) memset(p.dw_hr[d], 0, sizeof(S) * size_t(f.R * f.H));
  }

  // A vector of row k into the panels of an operand `width` wide and `rows` words long: panel of vector v at v * L *
  // rows.
  static void put_right(S* base, int64_t rows, int64_t width, int64_t k, int64_t v, V value) {
    const int64_t vectors = padded(width) / L, first = v / kMaxPanel * kMaxPanel;
    const int64_t word = k / P::per_word * min64(kMaxPanel, vectors - first) + v - first;
    put_row<P>(base + first * L * rows + word * L, k, value);
  }

  // Right operands of the weight gradients, in panels: x, the states before each step, and o tanh(c) for a projection.
  void pack_right(const Share& s, const Work& w, int64_t d, int64_t t0, int64_t t1, int64_t rows) const {
    const int64_t n = words<P>(rows);
    Range mine = split(n, s.thread, s.threads);  // whole words
    mine = {mine.begin * P::per_word, min64(mine.end * P::per_word, rows)};
    lay.for_rows(t0, t1, mine, [&](int64_t t, int64_t j, int64_t k) {
      for (int64_t v = 0; v * L < f.I; ++v)
        put_right(w.x, n, f.I, k, v, load_as<S>(f.x.data, f.dtype, lay.at(f.x, t, j) + v * L, f.I - v * L));
      const Stored h = kept.state_before(d, t, j);
      for (int64_t v = 0; v * L < f.R; ++v) {
        const V before = h.data ? load_as<S>(h.data, f.dtype, h.at + v * L, f.R - v * L) : V{};
        put_right(w.h, n, f.R, k, v, before);
        if constexpr (C == Cell::gru_reset_before)  // W_hn was multiplied with r h
          put_right(w.h + n * padded(f.R), n, f.R, k, v,
                    before * load_n(kept.gates(s.group, d, t, j) + v * L, f.H - v * L));
      }
      if constexpr (C == Cell::lstm) {
        if (!projected()) return;
        const S* row = kept.gates(s.group, d, t, j);
        for (int64_t v = 0; v * L < f.H; ++v) {
          const V o = load_n(row + 3 * f.H + v * L, f.H - v * L), c = load_n(row + 4 * f.H + v * L, f.H - v * L);
          put_right(w.m, n, f.H, k, v, o * Activations().state(c));
        }
      }
    });
  }

  // A right operand in panels and the rows of the weight gradient it gives.
  struct Right {
    const S* panels;
    int64_t width;
    S* dw;
  };

  // dw[i][.] (+)= sum over rows k of left[k][begin + i] * right[k][.], for every right operand. `scratch` takes the
  // left operand, kGroup columns after the other.
  void outer(const Value* left, int64_t pitch, Range columns, int64_t rows, const Right* rights, int count, bool first,
             S* scratch) const {
    const int64_t n = words<P>(rows), groups = (columns.size() + kGroup - 1) / kGroup;
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t k = 0; k < n; ++k)
        for (int64_t i = 0; i < kGroup; i += L) {
          const int64_t column = g * kGroup + i;
          store(scratch + (g * n + k) * kGroup + i,
                word_of_rows(left + columns.begin + column, pitch, k, rows, max64(0, columns.size() - column)));
        }
    for (const Right* right = rights; right != rights + count; ++right)
      for_panels(0, padded(right->width) / L, kMaxPanel, [&](int64_t v, int u) {
        for (int64_t g = 0; g < groups; ++g)
          for_row_tiles(min64(kGroup, columns.size() - g * kGroup), u, [&](int64_t r, int m) {
            const S* words = scratch + g * n * kGroup + r;
            outer_tile(*right, g * kGroup + r, m, reinterpret_cast<const Value*>(words), n, v, u, first);
          });
      });
  }
  // Word k along the rows of a left operand, for m columns.
  static V word_of_rows(const Value* from, int64_t pitch, int64_t k, int64_t rows, int64_t m) {
    if constexpr (P::per_word == 1) return load_n(from + k * pitch, m);
#if FSQ_BF16_PAIRS
    else {
      const __mmask16 mask = m >= 16 ? __mmask16(~0) : __mmask16((1u << m) - 1);
      const Value* const a = from + 2 * k * pitch;
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, a));
      if (2 * k + 1 == rows) return (V)low;
      const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, a + pitch));
      return (V)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    }
#endif
  }

  // First column of this thread's part of the scratch for a left operand: whole groups for each thread.
  static int64_t part_of_left(const Share& s, int64_t columns) {
    return s.thread * round_up((columns + s.threads - 1) / s.threads, kGroup);
  }

  // Rows [row, row + m) of a weight gradient, u vectors from v on; n words along the rows of the operands.
  void outer_tile(const Right& right, int64_t row, int m, const Value* left, int64_t n, int64_t v, int u,
                  bool first) const {
    alignas(64) S sums[kMaxTile * kMaxPanel * L];
    alignas(64) static const S zero[kMaxPanel * L] = {};
    multiply(Tile<P>{m, u, left, P::per_word, kGroup * P::per_word, right.panels + v * L * n, u * L, n, zero, 0, sums,
                     u * L});
    for (int i = 0; i < m; ++i)
      for (int k = 0; k < u; ++k) {
        const int64_t c = (v + k) * L;
        S* const to = right.dw + (row + i) * right.width + c;
        const V sum = load(sums + (i * u + k) * L);
        store_n(to, first ? sum : load_n(to, right.width - c) + sum, right.width - c);
      }
  }

  void weight_grads(const Share& s, const Work& w, int64_t d, int64_t rows, bool first, const Value* dg,
                    const Value* dh) const {
    const int64_t H = f.H, n_words = words<P>(rows);
    // Columns [begin, end) of the gate gradients with the rows of dw_ih and dw_hh they belong to, -1 for none. Each is
    // divided among the threads on its own, since they differ in work.
    const auto segment = [&](int64_t begin, int64_t end, int64_t row_ih, int64_t row_hh, const S* state) {
      const Range mine = split(end - begin, s.thread, s.threads), c = {begin + mine.begin, begin + mine.end};
      if (c.size() <= 0) return;
      Right rights[2];
      int n = 0;
      const int64_t at = mine.begin;
      if (row_ih >= 0) rights[n++] = {w.x, f.I, static_cast<S*>(p.dw_ih[d]) + (row_ih + at) * f.I};
      if (row_hh >= 0) rights[n++] = {state, f.R, static_cast<S*>(p.dw_hh[d]) + (row_hh + at) * f.R};
      outer(dg, gate_pitch(), c, rows, rights, n, first, w.left + part_of_left(s, kColumns * H) * n_words);
    };
    if constexpr (C == Cell::gru) {
      segment(0, 2 * H, 0, 0, w.h);
      segment(2 * H, 3 * H, 2 * H, -1, nullptr);
      segment(3 * H, 4 * H, -1, 2 * H, w.h);
    } else if constexpr (C == Cell::gru_reset_before) {
      segment(0, 2 * H, 0, 0, w.h);
      segment(2 * H, 3 * H, 2 * H, 2 * H, w.h + n_words * padded(f.R));
    } else {
      segment(0, G * H, 0, 0, w.h);
    }
    if (projected()) {
      const Range part = split(f.R, s.thread, s.threads);
      const Right right = {w.m, H, static_cast<S*>(p.dw_hr[d]) + part.begin * H};
      outer(dh, state_row_pitch(), part, rows, &right, 1, first, w.left_hr + part_of_left(s, f.R) * n_words);
    }
    if (p.db_ih[d]) bias_grads(s, w, rows, first, dg);
  }

  void bias_grads(const Share& s, const Work& w, int64_t rows, bool first, const Value* dg) const {
    const Range mine = split((kColumns * f.H + L - 1) / L, s.thread, s.threads);
    for (int64_t v = mine.begin; v < mine.end; ++v) {
      // Four chains, and each chunk summed on its own: faster, and closer to the truth over long sequences.
      V sum[4] = {};
      const Value* column = dg + v * L;
      int64_t k = 0;
      for (; k + 4 <= rows; k += 4)
        for (int i = 0; i < 4; ++i) sum[i] = sum[i] + load_values<P>(column + (k + i) * gate_pitch(), L);
      for (; k < rows; ++k) sum[0] = sum[0] + load_values<P>(column + k * gate_pitch(), L);
      const V chunk = (sum[0] + sum[1]) + (sum[2] + sum[3]);
      store(w.db + v * L, first ? chunk : load(w.db + v * L) + chunk);
    }
  }

  void input_grads(const Share& s, const Work& w, int64_t d, int64_t t0, int64_t t1, int64_t rows,
                   const Value* dg) const {
    const int64_t pitch = padded(f.I);
    const Range mine = split(rows, s.thread, s.threads);
    alignas(64) static const S zero[kMaxPanel * L] = {};
    for_panels(0, pitch / L, kMaxPanel, [&](int64_t v, int u) {
      const Columns<S> b = columns<P>(f, w.w_ih, f.w_ih[d], G * f.H, f.I, v, u);
      multiply_panel<P>(dg + mine.begin * gate_pitch(), gate_pitch(), mine.size(), words<P>(G * f.H), b.b, b.pitch, u,
                        zero, 0, w.dx + mine.begin * pitch + v * L, pitch);
    });
    lay.for_rows(t0, t1, mine, [&](int64_t t, int64_t j, int64_t k) {
      if (f.D > 1)
        memcpy(dx_rows[d] + (lay.offset(t0) + k) * f.I, w.dx + k * pitch, sizeof(S) * size_t(f.I));
      else
        store_row<S>(p.dx.data, f.dtype, lay.at(p.dx, t, j), w.dx + k * pitch, f.I);
    });
  }
};

}  // namespace FSQ_ISA
}  // namespace fusedseq
