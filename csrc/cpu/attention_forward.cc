// Attention, forward: online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867) over blocks of keys.
//
// A unit is a few panels of queries of a pair, which read each block of keys while it is in the caches.
#include "cpu/attention_decode.h"
#include "cpu/attention_panel.h"
#include "cpu/families.h"

namespace fusedseq {
namespace FSQ_ISA {

template <class P>
class AttentionForward : AttentionPanels<P> {
  typedef AttentionPanels<P> Panels;
  typedef AttentionView<P> View;
  typedef typename P::Sum S;
  typedef typename Panels::Panel Panel;
  typedef Vec<S> V;
  static constexpr int L = kLanes<S>, kRows = Panels::kRows;
  static constexpr int kUnit = 192 / kRows > 1 ? 192 / kRows : 1;  // panels
  using View::p;

  struct Unit {
    int64_t pair, begin, end;  // rows
  };
  struct Work {
    typename Panels::Scratch scratch;
    Panel* panels;
  };

 public:
  explicit AttentionForward(const AttentionParams& p) : Panels(p) {}

  Status run() {
    Arena arena;
    place(arena);
    if (!arena.allocate()) return Status::out_of_memory;
    place(arena);
    list();
    Jobs jobs;
    parallel(p.threads, [&](int thread, int) {
      for (int64_t j; (j = jobs.take()) < count_;) unit(work[thread], units[j]);
    });
    return Status::ok;
  }

 private:
  Work work[kMaxThreads];
  Unit* units;
  int64_t count_ = 0;

  // Smaller units where there are few: results do not depend on it.
  int64_t unit_rows() const { return count_units(kUnit * kRows) < 6 * p.threads ? kRows : kUnit * kRows; }
  int64_t count_units(int64_t rows) const {
    int64_t n = 0;
    for (int64_t s = 0; s < this->sequences(); ++s) {
      const int64_t length = p.cu_q ? p.cu_q[s + 1] - p.cu_q[s] : p.L;
      n += (length * this->groups() + rows - 1) / rows;
    }
    return n * p.Hkv;
  }

  void place(Arena& arena) {
    count_ = count_units(unit_rows());
    units = arena.take<Unit>(count_);
    for (int t = 0; t < p.threads; ++t) {
      Work& w = work[t];
      this->place_scratch(arena, w.scratch);
      w.panels = arena.take<Panel>(kUnit);
      for (int i = 0; i < kUnit; ++i) {
        Panel unplaced, &panel = w.panels ? w.panels[i] : unplaced;
        this->place_panel(arena, panel);
      }
    }
  }

  void list() {
    int64_t n = 0;
    const int64_t step = unit_rows();
    for (int64_t i = 0; i < this->pairs(); ++i) {
      const int64_t rows = this->pair(i).rows();
      // The last rows first: if causal they have the most to do.
      for (int64_t u = (rows + step - 1) / step - 1; u >= 0; --u)
        units[n++] = {i, u * step, min64(rows, (u + 1) * step)};
    }
  }

  void unit(Work& w, const Unit& u) {
    const Pair a = this->pair(u.pair);
    int count = 0;
    for (int64_t r = u.begin; r < u.end; r += kRows)
      this->load_panel(w.panels[count++], a, r, int(min64(kRows, u.end - r)));
    const Panel& top = w.panels[count - 1];
    const int64_t first = w.panels[0].rows[0].begin, last = top.rows[top.n - 1].end;
    for (int64_t j = first / kKeys * kKeys; j < last; j += kKeys)
      block(w, a, count, {j, int(min64(kKeys, last - j)), nullptr});
    if (this->picks) {
      int64_t from = 0;
      while (const int n = this->pick(a, from, a.S, w.scratch.picked)) {
        block(w, a, count, {0, n, w.scratch.picked});
        from = w.scratch.picked[n - 1] + 1;
      }
    }
    for (int i = 0; i < count; ++i) finish(w, w.panels[i], a, u.begin + i * kRows);
  }

  void block(Work& w, const Pair& a, int count, const KeyBlock<S>& k) {
    const typename Panels::Block b = this->load_block(w.scratch, a, k);
    for (int i = 0; i < count; ++i) this->attend(w.scratch, w.panels[i], a, b);
  }

  // Sums over weights, and back to rows.
  void finish(Work& w, Panel& x, const Pair& a, int64_t r0) const {
    if (!x.started) memset(x.out, 0, sizeof(S) * size_t(p.Ev * kRows));
    for (int v = 0; v < x.vectors; ++v) {
      const int n = int(min64(L, x.n - v * L));
      V sink = splat(S(0));
      for (int i = 0; i < n; ++i) sink[i] = this->sink(x.rows[v * L + i]);
      const Finish<S> f = this->finish_rows(load(x.top + v * L), load(x.sums + v * L), sink);
      int64_t at[L];
      for (int i = 0; i < n; ++i) {
        at[i] = this->row_at(p.out, a, r0 + v * L + i);
        static_cast<S*>(p.lse)[this->per_row(a, x.rows[v * L + i])] = f.lse[i];
      }
      for (int64_t e = 0; e < p.Ev; e += L) {
        V rows[L];
        for (int i = 0; i < L; ++i) rows[i] = e + i < p.Ev ? load(x.out + (e + i) * kRows + v * L) * f.factor : V{};
        transpose<S>(rows);
        for (int i = 0; i < n; ++i) store_as<S>(p.out.data, p.dtype, at[i] + e, rows[i], p.Ev - e);
      }
    }
  }
};

template <class P>
static Status run(const AttentionParams& p) {
  AttentionForward<P> forward(p);
  return forward.run();
}
template <class S>
static Status decode(const AttentionParams& p) {
  AttentionDecode<Whole<S>> decode(p);
  return decode.run();
}

Status attention_forward(const AttentionParams& call) {
  AttentionParams p = call;
  p.threads = threads_for(call);
  if (p.dtype == DType::f64)
    return AttentionDecode<Whole<double>>::takes(p) ? decode<double>(p) : run<Whole<double>>(p);
  if (AttentionDecode<Whole<float>>::takes(p)) return decode<float>(p);
#if FSQ_BF16_PAIRS
  if (p.dtype == DType::bf16) return run<Bf16Pairs>(p);
#endif
  return run<Whole<float>>(p);
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
