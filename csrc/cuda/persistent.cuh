// Scans in one launch: the weights stay in shared memory and registers, and only the state (forward) or the gate
// gradients (backward) move between steps. Tiers differ in the channel they move through (exchange.cuh).
//
// A group of `ranks` CTAs owns one direction of one tile of rows; each rank owns `units` hidden units with all their
// gates. The thread of a (row, unit) keeps it for the whole scan: its cell state stays in float32 in a register.
#pragma once
#include "cuda/element.cuh"
#include "cuda/exchange.cuh"
#include "cuda/packed.cuh"
#include "cuda/share.cuh"

namespace fusedseq {
namespace FSQ_ISA {

template <class E>
FSQ_DEVICE void clear(const Slices<E>& s) {
  for (int i = int(threadIdx.x); i < s.buffers * s.ranks * s.slice(); i += int(blockDim.x))
    s.data.store(i, narrow<E>(0));
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

template <Cell C, class E, template <class> class Channel, class Shape>
struct ForwardMemory {
  static constexpr bool kTwo = C == Cell::gru_reset_before;
  Panel<E> w, w_n;
  Channel<E> h, rh;
  Sums sums;

  template <class Arena>
  FSQ_BOTH static ForwardMemory carve(Arena& arena, const CudaPlan& plan) {
    ForwardMemory m;
    const int terms = plan.ranks * plan.units;
    const int held = Shape::kPacked ? terms : kHeldTiles<Shape, kFirst<C>> * parts_of(plan) * kTermTile;
    m.w = Panel<E>::carve(arena, kFirst<C>, plan.units, terms, held);
    if (kTwo) m.w_n = Panel<E>::carve(arena, 1, plan.units, terms, Shape::kPacked ? terms : 0);
    m.h = Channel<E>::carve(arena, plan.ranks, plan.rows, plan.units);
    if (kTwo) m.rh = Channel<E>::carve(arena, plan.ranks, plan.rows, plan.units);
    m.sums = Sums::carve(arena, parts_of(plan), kFirst<C>, plan.rows, plan.units);
    return m;
  }
};

template <Cell C, class E, template <class> class Channel, class Shape>
FSQ_DEVICE void forward_scan(const CudaScanParams& p, const CudaPlan& plan) {
  typedef ForwardMemory<C, E, Channel, Shape> Memory;
  constexpr int kElements = Shape::kElements, kRows = Shape::kRows;
  typedef Forward<C, Stored<E>> Element;
  SharedArena arena = dynamic_shared();
  Memory m = Memory::carve(arena, plan);
  const Share share(p, plan, Channel<E>::rank(plan));
  const int parts = parts_of(plan), width = plan.units;
  const int64_t steps = share.steps(p);
  char* const rest = m.h.bind(static_cast<char*>(p.workspace), share.group, share.groups);
  if constexpr (Memory::kTwo) m.rh.bind(rest, share.group, share.groups);

  const WeightRows<E> weights{p, share, 0};
  weights.load(m.w, kFirst<C>);
  Held<kFirst<C>, kHeldTiles<Shape, kFirst<C>>> held;
  held.load(m.w, parts, weights);
  if constexpr (Memory::kTwo) WeightRows<E>{p, share, 2}.load(m.w_n, 1);
  clear(m.h.slices);
  if constexpr (Memory::kTwo) clear(m.rh.slices);
  __syncthreads();
  // Every rank begins with all of h0.
  if (p.h0)
    for (int r = int(threadIdx.x) / 32; r < plan.ranks * plan.rows; r += plan.warps) {
      const int rank = r / plan.rows, b = r % plan.rows, to = m.h.slices.at(0, rank) + b * m.h.slices.pitch();
      for (int u = int(threadIdx.x) % 32; u < width; u += 32) {
        const Spot s{share.d, share.b0 + b, int64_t(rank) * width + u, {0, 0}};
        if (s.b < p.B && s.u < p.H) m.h.slices.data.store(to + u, narrow<E>(initial<Stored<E>>(p, p.h0, s, p.H)));
      }
    }
  Element element[kElements];
  Bias<C, Stored<E>> bias;
  float state[kElements];
  int length[kElements];
  Moment when = moment(p, time_of(share.d, 0, steps));
  if (share.mine) bias.load(p, share.d, share.spot(0, when).u);
  FSQ_UNROLL
  for (int n = 0; n < kElements; ++n) {
    if (n >= share.mine) continue;
    const Spot s = share.spot(n, when);
    state[n] = initial<Stored<E>>(p, C == Cell::lstm ? p.c0 : p.h0, s, p.H);
    length[n] = int(length_of(p, s.b));
    if (steps > 0) element[n].load(p, s, length[n]);
  }
  m.h.begin(share.rank);
  if constexpr (Memory::kTwo) m.rh.begin(share.rank);

  const Task first(m.w, m.h.slices, parts);
  const PackedPanels<C> panels(plan, false);
  const auto packed = packed_panel<Shape, kFirst<C>>(p, plan, share, 0, panels.first);
  const auto total = [&](int gate, int n) {
    float sum = 0;
    for (int part = 0; part < parts; ++part) sum += m.sums.data[m.sums.at(part, gate, share.row_of(n), share.unit)];
    return sum;
  };
  for (int64_t i = 0; i < steps; ++i) {
    const int now = int(i & 1), turn = int(i);
    bool arrived = i == 0 || m.h.wait(turn - 1);
    if (arrived) multiply<kFirst<C>, kRows>(first, m.w, held, packed, m.h.slices, now, parts, m.sums);
    if (__syncthreads_or(!arrived)) give_up(p);
    if constexpr (Memory::kTwo) {
      FSQ_UNROLL
      for (int n = 0; n < kElements; ++n) {
        if (n >= share.mine) continue;
        float sums[2] = {total(0, n), total(1, n)}, rh = 0;
        if (element[n].live) rh = element[n].gate(bias, sums, state[n]);
        m.rh.slices.put(1 - now, share.rank, share.row_of(n), share.unit, narrow<E>(rh));
      }
      m.rh.publish(share.rank, turn);
      arrived = m.rh.wait(turn);
      if (arrived)
        multiply<1, kRows>(Task(m.w_n, m.rh.slices, parts), m.w_n, Held<1, 0>(),
                           packed_panel<Shape, 1>(p, plan, share, panels.first, panels.second), m.rh.slices, 1 - now,
                           parts, m.sums);
      if (__syncthreads_or(!arrived)) give_up(p);
    }
    FSQ_UNROLL
    for (int n = 0; n < kElements; ++n) {
      if (n >= share.mine) continue;
      const Slices<E>& h = m.h.slices;
      E next;
      if (element[n].live) {
        float sums[kFirst<C>];
        FSQ_UNROLL
        for (int g = 0; g < kFirst<C>; ++g) sums[g] = Memory::kTwo && g > 0 ? 0 : total(g, n);
        next = narrow<E>(element[n].finish(p, bias, sums, state[n]));
      } else {
        next = h.get(now, share.rank, share.row_of(n), share.unit);
      }
      h.put(1 - now, share.rank, share.row_of(n), share.unit, next);
    }
    if (i + 1 < steps) publish(m.h, plan, share.rank, turn);
    // While the state is on its way: what the step leaves behind, and what the next one needs.
    const Moment after = moment(p, i + 1 < steps ? time_of(share.d, i + 1, steps) : -1);
    FSQ_UNROLL
    for (int n = 0; n < kElements; ++n) {
      if (n >= share.mine) continue;
      if (element[n].live) {
        const Spot s = share.spot(n, when);
        Element::emit(p, s, element[n].h);
        element[n].save(p, s);
      }
      if (i + 1 < steps) element[n].load(p, share.spot(n, after), length[n]);
    }
    when = after;
  }
  __syncthreads();
  FSQ_UNROLL
  for (int n = 0; n < kElements; ++n) {
    if (n >= share.mine) continue;
    const Spot s = share.spot(n, {0, 0});
    const int64_t at = state_at(p, s, p.H);
    Element::end(p, s, at);
    if (C == Cell::lstm) write<Stored<E>>(p.c_n, at, state[n]);
  }
  m.h.end();
}

template <Cell C, class E, template <class> class Channel, class Shape>
struct BackwardMemory {
  static constexpr bool kTwo = C == Cell::gru_reset_before;
  Panel<E> w, w_n;
  Channel<E> fed, dn;
  Sums sums;

  template <class Arena>
  FSQ_BOTH static BackwardMemory carve(Arena& arena, const CudaPlan& plan) {
    BackwardMemory m;
    const int terms = plan.ranks * plan.units;
    const int held = Shape::kPacked ? kFed<C> * terms : kHeldTiles<Shape, 1> * parts_of(plan) * kTermTile;
    m.w = Panel<E>::carve(arena, 1, plan.units, kFed<C> * terms, held);
    if (kTwo) m.w_n = Panel<E>::carve(arena, 1, plan.units, terms, Shape::kPacked ? terms : 0);
    m.fed = Channel<E>::carve(arena, plan.ranks, plan.rows, kFed<C> * plan.units);
    if (kTwo) m.dn = Channel<E>::carve(arena, plan.ranks, plan.rows, plan.units);
    m.sums = Sums::carve(arena, parts_of(plan), 1, plan.rows, plan.units);
    return m;
  }
};

template <Cell C, class E, template <class> class Channel, class Shape>
FSQ_DEVICE void backward_scan(const CudaScanGradParams& p, const CudaPlan& plan) {
  typedef BackwardMemory<C, E, Channel, Shape> Memory;
  constexpr int kElements = Shape::kElements, kRows = Shape::kRows;
  typedef Backward<C, Stored<E>> Element;
  const CudaScanParams& f = p.fwd;
  SharedArena arena = dynamic_shared();
  Memory m = Memory::carve(arena, plan);
  const Share share(f, plan, Channel<E>::rank(plan));
  const int parts = parts_of(plan), width = plan.units;
  const int steps = int(share.steps(f));
  char* const rest = m.fed.bind(static_cast<char*>(f.workspace), share.group, share.groups);
  if constexpr (Memory::kTwo) m.dn.bind(rest, share.group, share.groups);

  const WeightColumns<E> weights{f, share, 0, kFed<C>};
  weights.load(m.w);
  Held<1, kHeldTiles<Shape, 1>> held;
  held.load(m.w, parts, weights);
  if constexpr (Memory::kTwo) WeightColumns<E>{f, share, 2, 1}.load(m.w_n);
  clear(m.fed.slices);
  if constexpr (Memory::kTwo) clear(m.dn.slices);
  Element element[kElements];
  float carry[kElements], dc[kElements];
  int length[kElements];
  Moment when = moment(f, steps > 0 ? time_of(share.d, steps - 1, steps) : -1);
  FSQ_UNROLL
  for (int n = 0; n < kElements; ++n) {
    if (n >= share.mine) continue;
    const Spot s = share.spot(n, when);
    carry[n] = initial<Stored<E>>(f, p.dh_n, s, f.H);
    dc[n] = C == Cell::lstm ? initial<Stored<E>>(f, p.dc_n, s, f.H) : 0;
    length[n] = int(length_of(f, s.b));
    element[n].load(p, s, length[n]);
  }
  m.fed.begin(share.rank);
  if constexpr (Memory::kTwo) m.dn.begin(share.rank);

  const Task first(m.w, m.fed.slices, parts);
  const PackedPanels<C> panels(plan, true);
  const auto packed = packed_panel<Shape, 1>(f, plan, share, 0, panels.first);
  const auto total = [&](int n) {
    float sum = 0;
    for (int part = 0; part < parts; ++part) sum += m.sums.data[m.sums.at(part, 0, share.row_of(n), share.unit)];
    return sum;
  };
  // One turn more than there are steps: the last gathers the gradients of the first states.
  for (int turn = 0; turn <= steps; ++turn) {
    const int now = turn & 1;
    bool arrived = turn == 0 || m.fed.wait(turn - 1);
    if (arrived) multiply<1, kRows>(first, m.w, held, packed, m.fed.slices, now, parts, m.sums);
    if (__syncthreads_or(!arrived)) give_up(f);
    FSQ_UNROLL
    for (int n = 0; n < kElements; ++n) {
      if (n >= share.mine) continue;
      float fed[kGatesOf<C>] = {};
      carry[n] += total(n);
      if (element[n].live) element[n].run(p, carry[n] + widen(element[n].dy), fed, dc[n], carry[n]);
      const int row = share.row_of(n);
      if constexpr (Memory::kTwo) {
        m.dn.slices.put(1 - now, share.rank, row, share.unit, narrow<E>(fed[0]));
        m.fed.slices.put(1 - now, share.rank, row, width + share.unit, narrow<E>(fed[1]));
      } else {
        FSQ_UNROLL
        for (int g = 0; g < kFed<C>; ++g)
          m.fed.slices.put(1 - now, share.rank, row, g * width + share.unit, narrow<E>(fed[g]));
      }
    }
    if (turn == steps) break;
    if constexpr (Memory::kTwo) {
      m.dn.publish(share.rank, turn);
      arrived = m.dn.wait(turn);
      if (arrived)
        multiply<1, kRows>(Task(m.w_n, m.dn.slices, parts), m.w_n, Held<1, 0>(),
                           packed_panel<Shape, 1>(f, plan, share, panels.first, panels.second), m.dn.slices, 1 - now,
                           parts, m.sums);
      if (__syncthreads_or(!arrived)) give_up(f);
      FSQ_UNROLL
      for (int n = 0; n < kElements; ++n) {
        if (n >= share.mine) continue;
        const float dr = element[n].live ? element[n].through_reset(total(n), carry[n]) : 0;
        m.fed.slices.put(1 - now, share.rank, share.row_of(n), share.unit, narrow<E>(dr));
      }
    }
    publish(m.fed, plan, share.rank, turn);
    // While the gradients are on their way: what the step leaves behind, and what the next one needs.
    const Moment after = moment(f, turn + 1 < steps ? time_of(share.d, steps - 2 - turn, steps) : -1);
    FSQ_UNROLL
    for (int n = 0; n < kElements; ++n) {
      if (n >= share.mine) continue;
      if (element[n].live) element[n].save(p, share.spot(n, when));
      element[n].load(p, share.spot(n, after), length[n]);
    }
    when = after;
  }
  FSQ_UNROLL
  for (int n = 0; n < kElements; ++n) {
    if (n >= share.mine) continue;
    const int64_t at = state_at(f, share.spot(n, {0, 0}), f.H);
    write<Stored<E>>(p.dh0, at, carry[n]);
    if (C == Cell::lstm) write<Stored<E>>(p.dc0, at, dc[n]);
  }
  m.fed.end();
}

template <Cell C, class E, template <class> class Channel, class Shape>
__global__ void __launch_bounds__(32 * Shape::kWarps)
    persistent_forward(const __grid_constant__ CudaScanParams p, const __grid_constant__ CudaPlan plan) {
  if constexpr (Channel<E>::kCompiled)
    forward_scan<C, E, Channel, Shape>(p, plan);
  else
    __trap();
}
template <Cell C, class E, template <class> class Channel, class Shape>
__global__ void __launch_bounds__(32 * Shape::kWarps)
    persistent_backward(const __grid_constant__ CudaScanGradParams p, const __grid_constant__ CudaPlan plan) {
  if constexpr (Channel<E>::kCompiled)
    backward_scan<C, E, Channel, Shape>(p, plan);
  else
    __trap();
}

// Host side.

template <Cell C, class E, template <class> class Channel, class Shape>
int persistent_bytes(const CudaPlan& plan, bool backward) {
  SharedArena arena;
  if (backward)
    BackwardMemory<C, E, Channel, Shape>::carve(arena, plan);
  else
    ForwardMemory<C, E, Channel, Shape>::carve(arena, plan);
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
// f(c, e, shape): weights in registers are half types alone.
template <class F>
auto for_shape(const CudaScanParams& p, const CudaPlan& plan, F f) {
  return for_persistent(p, [&](auto c, auto e) {
    if constexpr (sizeof(e) == 2)
      if (plan.holding) return f(c, e, Holding());
    return f(c, e, Wide());
  });
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
