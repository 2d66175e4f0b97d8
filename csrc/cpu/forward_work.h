// What a forward scan keeps on one CPU: how it is divided, its scratch, its packed weights.
#pragma once
#include "cpu/gate_panels.h"

namespace fusedseq {
namespace FSQ_ISA {

template <Cell C, class P>
class ForwardWork {
 protected:
  typedef typename P::Sum S;
  typedef typename P::Value Value;
  typedef Vec<S> V;
  typedef Traits<C> Tr;
  typedef typename Tr::A BlockA;
  typedef typename Tr::B BlockB;
  static constexpr int L = kLanes<S>;
  static constexpr int G = BlockA::gates + BlockB::gates;
  static constexpr bool kTwoPhases = BlockB::gates > 0;
  // A GRU blends with its last state, which must not be one rounded for the product.
  static constexpr bool kExact = P::per_word > 1 && (C == Cell::gru || C == Cell::gru_reset_before);

 public:
  explicit ForwardWork(const ScanParams& p) : p(p) {}

  // See CpuTable::pack.
  int64_t pack(void* const* into) {
    Arena measured;
    Work w;
    place_kept(measured, w);
    for (int64_t d = 0; into && d < p.D; ++d) {
      Arena block(into[d]);
      place_kept(block, w);
      parallel(p.threads, [&](int thread, int count) {
        Share s{};  // the panels divided among all threads, each of its whole width
        s.thread = thread;
        s.threads = count;
        s.vectors = {0, vectors()};
        s.team = thread;
        s.teams = count;
        s.slices = 1;
        pack<BlockA>(s, w, d);
        if constexpr (kTwoPhases) pack<BlockB>(s, w, d);
        if (projected()) pack_projection(s, w, d);
      });
    }
    return measured.used();
  }

 protected:
  // Where a finished row of a step is written to.
  struct Out {
    int64_t y, c;  // element offsets
    S* saved;
    bool now, next;  // a reset before this step, before the next one
  };
  struct State {  // before a step, or after it
    Value* h;
    S* exact;  // with kExact: h before it was rounded
  };
  struct Work {  // scratch of one group
    Out* outs;   // B for each slice
    GatePanels<C, P> panels;
    S *w_hr, *gx, *c, *z;
    Value *x, *m;
    State state[2];
  };

  const ScanParams& p;
  Layout lay;
  Arena arena;
  Barrier *barriers = nullptr, *arena_barriers = nullptr;
  Work work[kMaxDirections];
  bool direct = false;
  int group_threads = 1;

  int64_t vectors() const { return (p.H + L - 1) / L; }
  int64_t state_vectors() const { return (p.R + L - 1) / L; }
  int64_t hp() const { return state_pitch<S>(p.R); }  // pitch of h
  int64_t cp() const { return state_pitch<S>(p.H); }  // pitch of c, m, z and the exact h
  int64_t x_words() const { return words<P>(p.I); }
  int64_t h_words() const { return words<P>(p.R); }
  int64_t x_pitch() const { return direct ? lay.pitch(p.x) : x_words() * P::per_word; }
  bool projected() const { return p.w_hr[0] != nullptr; }
  // One step uses every weight once: packing would cost more than it saves. (T alone decides: a row's result must not
  // depend on the batch.)
  bool unpacked() const { return p.T == 1; }

  // With enough rows to reuse them, the step reads W_ih too, and its sums never leave the registers in between. The
  // order of every sum is the same. (torch's GRU needs the two products of n apart.) Weights too large to stay in the
  // last-level cache from step to step had better be read in two parts, W_ih once per chunk.
  bool together(const Share& s) const {
    const int64_t bytes = vectors() * L * G * (x_words() + h_words()) * int64_t(sizeof(S));
    return C != Cell::gru && !unpacked() && s.rows.size() >= 24 && bytes <= 16 * 1024 * 1024;
  }

  Share share(int thread, int count) const {
    Share s = plan(thread, count, p.D, p.B, vectors(), G, x_words() + h_words(), p.T, !p.lengths && !p.batch_sizes,
                   FSQ_VECTOR_BYTES);
    constexpr int units = BlockA::units;
    if (units > 1 && BlockA::gates > 1 && prepacked()) {  // see GatePanels
      const Range panels = split((vectors() + units - 1) / units, s.slice, s.slices);
      s.vectors = {panels.begin * units, min64(vectors(), panels.end * units)};
    }
    return s;
  }

  int64_t chunk_steps() const {
    const int64_t row_bytes = vectors() * G * L * int64_t(sizeof(S));
    const int64_t rows = max64(128, 256 * 1024 * group_threads / max64(row_bytes, 1));
    return max64(1, min64(p.T, rows / max64(p.B, 1)));
  }

  void place(int groups) {
    lay.place(arena, p);
    arena_barriers = arena.take<Barrier>(groups * (p.threads + 1));
    const int64_t n = vectors() * L, rows = chunk_steps() * p.B;
    for (int g = 0; g < groups; ++g) {
      Work& w = work[g];
      w.outs = arena.take<Out>(p.B * min64(p.threads, vectors()));  // groups may differ in threads
      if (!prepacked()) w.panels.place(arena, p, !unpacked());
      w.w_hr = arena.take<S>(projected() && !unpacked() ? state_vectors() * L * words<P>(p.H) : 0);
      w.x = arena.take<Value>(rows * x_words() * P::per_word);
      w.gx = arena.take<S>(unpacked() ? 0 : rows * G * n);
      for (State& state : w.state) {
        state.h = arena.take<Value>(p.B * hp());
        state.exact = arena.take<S>(kExact ? p.B * cp() : 0);
      }
      w.c = arena.take<S>(C == Cell::lstm ? p.B * cp() : 0);
      w.m = arena.take<Value>(projected() || kTwoPhases ? p.B * cp() : 0);
      w.z = arena.take<S>(kTwoPhases ? p.B * cp() : 0);
    }
  }

  bool prepacked() const { return p.packed[0] && !unpacked(); }

  // What `pack` leaves to later calls.
  void place_kept(Arena& block, Work& w) const {
    w.panels.place(block, p, true, true);
    w.w_hr = block.take<S>(projected() ? state_vectors() * L * words<P>(p.H) : 0);
  }

  // Calls f(first vector, count) over vectors in panels of up to `widest`.
  template <class F>
  inline __attribute__((always_inline)) void panels_of(Range r, int widest, F f) const {
    if (prepacked())
      for_grid(r.begin, r.end, widest, f);
    else
      for_panels(r.begin, r.end, widest, f);
  }

  template <class Blk>
  void pack(const Share& s, const Work& w, int64_t d) const {
    int turn = 0;
    for_panels(s.vectors.begin, s.vectors.end, Blk::units, [&](int64_t v, int u) {
      if (turn++ % s.teams == s.team) w.panels.template pack<Blk>(p, d, v, u);
    });
  }

  void pack_projection(const Share& s, const Work& w, int64_t d) const {
    if (unpacked()) return;
    const Range mine = split(state_vectors(), s.slice, s.slices);
    int turn = 0;
    for_panels(mine.begin, mine.end, kMaxPanel, [&](int64_t v, int u) {
      if (turn++ % s.teams != s.team) return;
      pack_gates<P>(w.w_hr + v * L * words<P>(p.H), 1, u, p.w_hr[d], p.dtype, 0, p.R, v * L, p.H);
    });
  }
};

}  // namespace FSQ_ISA
}  // namespace fusedseq
