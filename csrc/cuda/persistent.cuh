// Scans in one launch: the weights stay in shared memory, and only the state (forward) or the gate gradients (backward)
// move between steps. Tiers differ in the channel they move through (exchange.cuh).
//
// A group of `ranks` CTAs owns one direction of one tile of rows; each rank owns `units` hidden units with all their
// gates. The thread of a (row, unit) keeps it for the whole scan: its cell state stays in float32 in shared memory.
#pragma once
#include "cuda/element.cuh"
#include "cuda/exchange.cuh"
#include "cuda/scan.h"

namespace fusedseq {
namespace FSQ_ISA {

constexpr int kMaxWarps = 12;
constexpr int kElements = 8;  // (row, unit) pairs of a thread: 16 rows x 16 units by a warp

FSQ_BOTH int parts_of(const CudaPlan& plan) { return plan.warps / (plan.units / kUnitTile); }

FSQ_BOTH int64_t groups_of(const CudaScanParams& p, const CudaPlan& plan) {
  return (p.B + plan.rows - 1) / plan.rows * p.D;
}

// Which rows and units a CTA and a thread own.
struct Share {
  int rank, units, rows, count;
  int64_t d, b0, group, groups;

  FSQ_DEVICE Share(const CudaScanParams& p, const CudaPlan& plan, int rank) : rank(rank) {
    group = plan.first + blockIdx.x / plan.ranks;
    groups = groups_of(p, plan);
    units = plan.units;
    rows = plan.rows;
    count = units * rows;
    d = group % p.D;
    b0 = group / p.D * rows;
  }
  // The n-th element of this thread, neighbouring threads taking neighbouring units.
  FSQ_DEVICE int element(int n) const { return int(threadIdx.x) + n * int(blockDim.x); }
  FSQ_DEVICE Spot spot(int e, int64_t t) const { return {d, t, b0 + e / units, int64_t(rank) * units + e % units}; }
  FSQ_DEVICE bool owns(const CudaScanParams& p, int e) const {
    return e < count && b0 + e / units < p.B && int64_t(rank) * units + e % units < p.H;
  }
  // Steps that any row of the tile takes.
  FSQ_DEVICE int64_t steps(const CudaScanParams& p) const {
    if (!p.lengths) return p.T;
    int64_t longest = 0;
    for (int64_t b = b0; b < b0 + rows && b < p.B; ++b) longest = p.lengths[b] > longest ? p.lengths[b] : longest;
    return longest;
  }
};

template <class E>
FSQ_DEVICE void clear(const Slices<E>& s) {
  for (int i = int(threadIdx.x); i < 2 * s.ranks * s.slice(); i += int(blockDim.x)) s.data.store(i, narrow<E>(0));
}

template <class Channel>
FSQ_DEVICE void publish(Channel& channel, const CudaPlan& plan, int rank, int n) {
  if (plan.stuck == rank && n > 0)
    __syncthreads();
  else
    channel.publish(rank, n);
}

// A rank did not answer: tell the caller which kernel it was, and end the launch in an error. There is no orderly way
// out, as copies of those who did answer may still be on their way into this CTA.
FSQ_DEVICE void give_up(const CudaScanParams& p) {
  if (p.fault && threadIdx.x == 0) {
    *p.fault = 1;
    __threadfence_system();
  }
  __syncthreads();
  __trap();
}

template <Cell C, class E, template <class> class Channel>
struct ForwardMemory {
  static constexpr bool kTwo = C == Cell::gru_reset_before;
  Panel<E> w, w_n;
  Channel<E> h, rh;
  Sums sums;
  SharedSpan<float> state;

  template <class Arena>
  FSQ_BOTH static ForwardMemory carve(Arena& arena, const CudaPlan& plan) {
    ForwardMemory m;
    const int terms = plan.ranks * plan.units;
    m.w = Panel<E>::carve(arena, kFirst<C>, plan.units, terms);
    if (kTwo) m.w_n = Panel<E>::carve(arena, 1, plan.units, terms);
    m.h = Channel<E>::carve(arena, plan.ranks, plan.rows, plan.units);
    if (kTwo) m.rh = Channel<E>::carve(arena, plan.ranks, plan.rows, plan.units);
    m.sums = Sums::carve(arena, parts_of(plan), kFirst<C>, plan.rows, plan.units);
    m.state = arena.template take<float>(plan.rows * plan.units);
    return m;
  }
};

// Rows of W_hh of this rank's units, gates from `first` on; zeros beyond H.
template <class E>
FSQ_DEVICE void load_rows(const CudaScanParams& p, const Share& share, const Panel<E>& panel, int first, int gates) {
  const Stored<E>* const w = static_cast<const Stored<E>*>(p.w_hh[share.d]);
  for (int i = int(threadIdx.x); i < gates * panel.units * panel.terms; i += int(blockDim.x)) {
    const int row = i / panel.terms, k = i % panel.terms;
    const int64_t unit = int64_t(share.rank) * panel.units + row % panel.units, gate = first + row / panel.units;
    const bool there = unit < p.H && k < p.H;
    panel.data.store(row * panel.pitch() + k, there ? operand<E>(w[(gate * p.H + unit) * p.R + k]) : narrow<E>(0));
  }
}

template <Cell C, class E, template <class> class Channel>
FSQ_DEVICE void forward_scan(const CudaScanParams& p, const CudaPlan& plan) {
  typedef ForwardMemory<C, E, Channel> Memory;
  typedef Forward<C, Stored<E>> Element;
  SharedArena arena = dynamic_shared();
  Memory m = Memory::carve(arena, plan);
  const Share share(p, plan, Channel<E>::rank(plan));
  const int parts = parts_of(plan), width = plan.units;
  const int64_t steps = share.steps(p);
  char* const rest = m.h.bind(static_cast<char*>(p.workspace), share.group, share.groups);
  if constexpr (Memory::kTwo) m.rh.bind(rest, share.group, share.groups);

  load_rows(p, share, m.w, 0, kFirst<C>);
  if constexpr (Memory::kTwo) load_rows(p, share, m.w_n, 2, 1);
  clear(m.h.slices);
  if constexpr (Memory::kTwo) clear(m.rh.slices);
  __syncthreads();
  // Every rank begins with all of h0.
  if (p.h0)
    for (int i = int(threadIdx.x); i < plan.ranks * plan.rows * width; i += int(blockDim.x)) {
      const int rank = i / (plan.rows * width), b = i / width % plan.rows;
      const Spot s{share.d, 0, share.b0 + b, int64_t(rank) * width + i % width};
      if (s.b < p.B && s.u < p.H)
        m.h.slices.data.store(m.h.slices.at(0, rank) + b * m.h.slices.pitch() + i % width,
                              narrow<E>(initial<Stored<E>>(p, p.h0, s, p.H)));
    }
  for (int n = 0; n < kElements; ++n) {
    const int e = share.element(n);
    if (share.owns(p, e)) m.state.store(e, initial<Stored<E>>(p, C == Cell::lstm ? p.c0 : p.h0, share.spot(e, 0), p.H));
  }
  m.h.begin(share.rank);
  if constexpr (Memory::kTwo) m.rh.begin(share.rank);

  const auto total = [&](int gate, int e) {
    float sum = 0;
    for (int part = 0; part < parts; ++part) sum += m.sums.data[m.sums.at(part, gate, e / width, e % width)];
    return sum;
  };
  for (int64_t i = 0; i < steps; ++i) {
    const int now = int(i & 1), turn = int(i);
    Element element[kElements];
    FSQ_UNROLL
    for (int n = 0; n < kElements; ++n) {
      const int e = share.element(n);
      if (share.owns(p, e)) element[n].load(p, share.spot(e, time_of(share.d, i, steps)));
    }
    bool arrived = i == 0 || m.h.wait(turn - 1);
    if (arrived) multiply<kFirst<C>>(m.w, m.h.slices, now, parts, m.sums);
    if (__syncthreads_or(!arrived)) give_up(p);
    if constexpr (Memory::kTwo) {
      FSQ_UNROLL
      for (int n = 0; n < kElements; ++n) {
        const int e = share.element(n);
        if (!share.owns(p, e)) continue;
        float sums[2] = {total(0, e), total(1, e)}, rh = 0;
        if (element[n].live) rh = element[n].gate(sums, m.state[e]);
        const Slices<E>& to = m.rh.slices;
        to.data.store(to.at(1 - now, share.rank) + e / width * to.pitch() + e % width, narrow<E>(rh));
      }
      m.rh.publish(share.rank, turn);
      arrived = m.rh.wait(turn);
      if (arrived) multiply<1>(m.w_n, m.rh.slices, 1 - now, parts, m.sums);
      if (__syncthreads_or(!arrived)) give_up(p);
    }
    FSQ_UNROLL
    for (int n = 0; n < kElements; ++n) {
      const int e = share.element(n);
      if (!share.owns(p, e)) continue;
      const Spot s = share.spot(e, time_of(share.d, i, steps));
      const Slices<E>& h = m.h.slices;
      const int at = e / width * h.pitch() + e % width;
      E next;
      if (element[n].live) {
        float sums[kFirst<C>], state = m.state[e];
        FSQ_UNROLL
        for (int g = 0; g < kFirst<C>; ++g) sums[g] = Memory::kTwo && g > 0 ? 0 : total(g, e);
        const float out = element[n].finish(p, s, sums, state);
        m.state.store(e, state);
        next = narrow<E>(out);
        Element::emit(p, s, out);
      } else {
        next = h.data[h.at(now, share.rank) + at];
      }
      h.data.store(h.at(1 - now, share.rank) + at, next);
    }
    if (i + 1 < steps) publish(m.h, plan, share.rank, turn);
  }
  __syncthreads();
  for (int n = 0; n < kElements; ++n) {
    const int e = share.element(n);
    if (!share.owns(p, e)) continue;
    const Spot s = share.spot(e, 0);
    const int64_t at = state_at(p, s, p.H);
    Element::end(p, s, at);
    if (C == Cell::lstm) write<Stored<E>>(p.c_n, at, m.state[e]);
  }
  m.h.end();
}

template <Cell C, class E, template <class> class Channel>
struct BackwardMemory {
  static constexpr bool kTwo = C == Cell::gru_reset_before;
  Panel<E> w, w_n;
  Channel<E> fed, dn;
  Sums sums;
  SharedSpan<float> carry, dc;

  template <class Arena>
  FSQ_BOTH static BackwardMemory carve(Arena& arena, const CudaPlan& plan) {
    BackwardMemory m;
    m.w = Panel<E>::carve(arena, 1, plan.units, plan.ranks * kFed<C> * plan.units);
    if (kTwo) m.w_n = Panel<E>::carve(arena, 1, plan.units, plan.ranks * plan.units);
    m.fed = Channel<E>::carve(arena, plan.ranks, plan.rows, kFed<C> * plan.units);
    if (kTwo) m.dn = Channel<E>::carve(arena, plan.ranks, plan.rows, plan.units);
    m.sums = Sums::carve(arena, parts_of(plan), 1, plan.rows, plan.units);
    m.carry = arena.template take<float>(plan.rows * plan.units);
    if (C == Cell::lstm) m.dc = arena.template take<float>(plan.rows * plan.units);
    return m;
  }
};

// Columns of W_hh of this rank's units, as rows; terms run over the slices of all ranks, `gates` blocks in each.
template <class E>
FSQ_DEVICE void load_columns(const CudaScanParams& p, const Share& share, const Panel<E>& panel, int first, int gates) {
  const Stored<E>* const w = static_cast<const Stored<E>*>(p.w_hh[share.d]);
  const int units = panel.units, width = gates * units;
  for (int i = int(threadIdx.x); i < units * panel.terms; i += int(blockDim.x)) {
    const int k = i / units, u = i % units;  // neighbouring threads read neighbouring addresses
    const int64_t gate = first + k % width / units, row = int64_t(k / width) * units + k % units;
    const int64_t unit = int64_t(share.rank) * units + u;
    const bool there = unit < p.H && row < p.H;
    panel.data.store(u * panel.pitch() + k, there ? operand<E>(w[(gate * p.H + row) * p.R + unit]) : narrow<E>(0));
  }
}

template <Cell C, class E, template <class> class Channel>
FSQ_DEVICE void backward_scan(const CudaScanGradParams& p, const CudaPlan& plan) {
  typedef BackwardMemory<C, E, Channel> Memory;
  typedef Backward<C, Stored<E>> Element;
  const CudaScanParams& f = p.fwd;
  SharedArena arena = dynamic_shared();
  Memory m = Memory::carve(arena, plan);
  const Share share(f, plan, Channel<E>::rank(plan));
  const int parts = parts_of(plan), width = plan.units;
  const int64_t steps = share.steps(f);
  char* const rest = m.fed.bind(static_cast<char*>(f.workspace), share.group, share.groups);
  if constexpr (Memory::kTwo) m.dn.bind(rest, share.group, share.groups);

  load_columns(f, share, m.w, 0, kFed<C>);
  if constexpr (Memory::kTwo) load_columns(f, share, m.w_n, 2, 1);
  clear(m.fed.slices);
  if constexpr (Memory::kTwo) clear(m.dn.slices);
  for (int n = 0; n < kElements; ++n) {
    const int e = share.element(n);
    if (!share.owns(f, e)) continue;
    m.carry.store(e, initial<Stored<E>>(f, p.dh_n, share.spot(e, 0), f.H));
    if (C == Cell::lstm) m.dc.store(e, initial<Stored<E>>(f, p.dc_n, share.spot(e, 0), f.H));
  }
  m.fed.begin(share.rank);
  if constexpr (Memory::kTwo) m.dn.begin(share.rank);

  const auto total = [&](int e) {
    float sum = 0;
    for (int part = 0; part < parts; ++part) sum += m.sums.data[m.sums.at(part, 0, e / width, e % width)];
    return sum;
  };
  // One turn more than there are steps: the last gathers the gradients of the first states.
  for (int64_t turn = 0; turn <= steps; ++turn) {
    const int now = int(turn & 1), n_turn = int(turn);
    const bool last = turn == steps;
    const int64_t t = last ? -1 : time_of(share.d, steps - 1 - turn, steps);
    Element element[kElements];
    float upstream[kElements];
    FSQ_UNROLL
    for (int n = 0; n < kElements; ++n) {
      const int e = share.element(n);
      if (!share.owns(f, e)) continue;
      element[n].load(p, share.spot(e, t));
      upstream[n] = element[n].live ? Element::upstream(p, share.spot(e, t)) : 0;
    }
    bool arrived = turn == 0 || m.fed.wait(n_turn - 1);
    if (arrived) multiply<1>(m.w, m.fed.slices, now, parts, m.sums);
    if (__syncthreads_or(!arrived)) give_up(f);
    FSQ_UNROLL
    for (int n = 0; n < kElements; ++n) {
      const int e = share.element(n);
      if (!share.owns(f, e)) continue;
      const Spot s = share.spot(e, t);
      float carry = m.carry[e] + total(e), fed[kGatesOf<C>] = {}, dc = C == Cell::lstm ? m.dc[e] : 0;
      if (element[n].live) {
        const float dh = carry + upstream[n];
        element[n].run(p, s, dh, fed, dc, carry);
        if (C == Cell::lstm) m.dc.store(e, dc);
      }
      m.carry.store(e, carry);
      const Slices<E>& to = m.fed.slices;
      const int at = to.at(1 - now, share.rank) + e / width * to.pitch() + e % width;
      if constexpr (Memory::kTwo) {
        const Slices<E>& dn = m.dn.slices;
        dn.data.store(dn.at(1 - now, share.rank) + e / width * dn.pitch() + e % width, narrow<E>(fed[0]));
        to.data.store(at + width, narrow<E>(fed[1]));
      } else {
        FSQ_UNROLL
        for (int g = 0; g < kFed<C>; ++g) to.data.store(at + g * width, narrow<E>(fed[g]));
      }
    }
    if (last) break;
    if constexpr (Memory::kTwo) {
      m.dn.publish(share.rank, n_turn);
      arrived = m.dn.wait(n_turn);
      if (arrived) multiply<1>(m.w_n, m.dn.slices, 1 - now, parts, m.sums);
      if (__syncthreads_or(!arrived)) give_up(f);
      FSQ_UNROLL
      for (int n = 0; n < kElements; ++n) {
        const int e = share.element(n);
        if (!share.owns(f, e)) continue;
        float dr = 0, carry = m.carry[e];
        if (element[n].live) dr = element[n].through_reset(p, share.spot(e, t), total(e), carry);
        m.carry.store(e, carry);
        const Slices<E>& to = m.fed.slices;
        to.data.store(to.at(1 - now, share.rank) + e / width * to.pitch() + e % width, narrow<E>(dr));
      }
    }
    publish(m.fed, plan, share.rank, n_turn);
  }
  for (int n = 0; n < kElements; ++n) {
    const int e = share.element(n);
    if (!share.owns(f, e)) continue;
    const int64_t at = state_at(f, share.spot(e, 0), f.H);
    write<Stored<E>>(p.dh0, at, m.carry[e]);
    if (C == Cell::lstm) write<Stored<E>>(p.dc0, at, m.dc[e]);
  }
  m.fed.end();
}

template <Cell C, class E, template <class> class Channel>
__global__ void __launch_bounds__(32 * kMaxWarps)
    persistent_forward(const __grid_constant__ CudaScanParams p, const __grid_constant__ CudaPlan plan) {
  if constexpr (Channel<E>::kCompiled)
    forward_scan<C, E, Channel>(p, plan);
  else
    __trap();
}
template <Cell C, class E, template <class> class Channel>
__global__ void __launch_bounds__(32 * kMaxWarps)
    persistent_backward(const __grid_constant__ CudaScanGradParams p, const __grid_constant__ CudaPlan plan) {
  if constexpr (Channel<E>::kCompiled)
    backward_scan<C, E, Channel>(p, plan);
  else
    __trap();
}

// Host side.

template <Cell C, class E, template <class> class Channel>
int persistent_bytes(const CudaPlan& plan, bool backward) {
  SharedArena arena;
  if (backward)
    BackwardMemory<C, E, Channel>::carve(arena, plan);
  else
    ForwardMemory<C, E, Channel>::carve(arena, plan);
  return arena.bytes();
}

// groups: how many of them the launch has, all by default.
inline Launch persistent_launch(const char* name, const CudaScanParams& p, const CudaPlan& plan, int64_t groups = 0) {
  if (!groups) groups = groups_of(p, plan);
  Launch launch(name, describe(p), dim3(unsigned(groups * plan.ranks)), dim3(unsigned(32 * plan.warps)));
  launch.shared = plan.shared;
  launch.cluster = plan.tier == CudaTier::cluster ? plan.ranks : 1;
  launch.cooperative = plan.tier == CudaTier::grid;
  launch.stream = static_cast<cudaStream_t>(p.stream);
  return launch;
}

// f(c, e) for the cells and operand types of the persistent tiers.
template <class F>
auto for_persistent(const CudaScanParams& p, F f) {
  return for_cell(p.cell, [&](auto c) {
    switch (p.dtype) {
      case DType::bf16:
        return f(c, __nv_bfloat16());
      case DType::f16:
        return f(c, __half());
      default:
        return p.tf32 ? f(c, Tf32()) : f(c, float());
    }
  });
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
