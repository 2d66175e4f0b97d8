// Scans of tier `cluster` whose warps know no barrier of their block within a forward step. The sums of a warp's
// product are the gates of its own cells, so each warp waits for the state of all others, multiplies, finishes its
// cells and sends what comes of them, by itself. Backward, a rank multiplies the gate gradients of its own units by all
// of their weights, and it is the sums that travel, to the ranks whose units they belong to: half as many bytes as the
// gate gradients of four gates. One barrier of the block stands between those and the product.
//
// All weights of a rank lie in registers. Half types, H up to 512; TF32, H up to 256; 4 or 8 rows.
#pragma once
#include "cuda/persistent.cuh"
#include "cuda/warp_channel.cuh"
#include "cuda/warp_tile.cuh"

namespace fusedseq {
namespace FSQ_ISA {

// As give_up, by a warp whose block may be anywhere: no barrier of it can stand here.
FSQ_DEVICE void give_up_warp(const CudaScanParams& p) {
  if (p.fault && threadIdx.x % 32 == 0) {
    *p.fault = 1;
    __threadfence_system();
  }
  __syncwarp();
  __trap();
}

template <Cell C, class E>
struct WarpForwardMemory {
  WarpChannel<uint2> state;  // [rows / 4][blocks][4 rows] of 8 bytes
  int blocks;                // rounded up to groups of tiles; what is beyond stays zero

  template <class Arena>
  FSQ_BOTH static WarpForwardMemory carve(Arena& arena, const CudaPlan& plan) {
    constexpr int kGroup = WarpRows<C, E>::kTogether * 4;
    WarpForwardMemory m;
    const int used = plan.ranks * plan.units / kBlock<E>;
    m.blocks = (used + kGroup - 1) / kGroup * kGroup;
    m.state = WarpChannel<uint2>::carve(arena, m.blocks * plan.rows / 2, used * plan.rows / 2);
    return m;
  }
};

template <Cell C, class E>
FSQ_DEVICE void warp_forward_scan(const CudaScanParams& p, const CudaPlan& plan) {
  typedef WarpTile<C> Tile;
  typedef StatePiece<C, E> Piece;
  typedef Forward<C, Stored<E>> Element;
  constexpr int kElements = Tile::kElements;
  SharedArena arena = dynamic_shared();
  const auto m = WarpForwardMemory<C, E>::carve(arena, plan);
  const Share share(p, plan, int(ptx::cluster_rank()));
  const LaneCells<C> cells(plan.rows);
  const int steps = int(share.steps(p)), publications = steps - 1;
  const auto spot = [&](int n, Moment when) {
    return Spot{share.d, share.b0 + cells.row_of(n), int64_t(share.rank) * plan.units + cells.unit_of(n), when};
  };

  WarpRows<C, E> weights;
  weights.load(WeightRows<E>{p, share, 0});
  // Every rank begins with all of h0, and zeros where there is no unit or row.
  for (int i = int(threadIdx.x); i < m.blocks * plan.rows; i += int(blockDim.x)) {
    const int row = i / (m.blocks * kHalf) * kHalf + i % kHalf, block = i / kHalf % m.blocks;
    E x[kBlock<E>];
    FSQ_UNROLL
    for (int c = 0; c < kBlock<E>; ++c) {
      const Spot s{share.d, share.b0 + row, int64_t(block) * kBlock<E> + c, {0, 0}};
      x[c] = narrow<E>(s.b < p.B && s.u < p.H ? initial<Stored<E>>(p, p.h0, s, p.H) : 0);
    }
    m.state.data.store(m.state.at(-1) + i, pack_block(x));
    m.state.data.store(m.state.at(0) + i, uint2{0, 0});
  }
  Element element[kElements] = {};
  Bias<C, Stored<E>> bias[kElements > 1 ? kElements / 2 : 1] = {};
  float state[kElements];
  E last[kElements];
  int length[kElements];  // 0 of what is no unit or row: it is never live
  Moment when = moment(p, time_of(share.d, 0, steps));
  FSQ_UNROLL
  for (int n = 0; n < kElements; ++n) {
    const Spot s = spot(n, when);
    const bool there = s.u < p.H && s.b < p.B;
    length[n] = there ? int(length_of(p, s.b)) : 0;
    state[n] = there ? initial<Stored<E>>(p, C == Cell::lstm ? p.c0 : p.h0, s, p.H) : 0;
    last[n] = narrow<E>(there ? initial<Stored<E>>(p, p.h0, s, p.H) : 0);
    if (n % 2 == 0 && there) bias[n / 2].load(p, share.d, s.u);
    if (steps > 0) element[n].load(p, s, length[n]);
  }
  const Piece piece(m.blocks, plan.rows, share.rank);
  typename WarpChannel<uint2>::Place to[Piece::kMost];
  FSQ_UNROLL
  for (int c = 0; c < Piece::kMost; ++c) {
    // Counted from this rank, so that not all send to the same ones first.
    to[c] = m.state.place(piece.piece, (piece.first + c * piece.step + share.rank) % plan.ranks);
  }
  const uint32_t from = ptx::opaque(m.state.data.address(first_of_lane(m.blocks, plan.rows)));
  const uint32_t one = ptx::opaque(threadIdx.x == 0), stuck = ptx::opaque(plan.stuck == share.rank);
  const int groups = m.blocks / (WarpRows<C, E>::kTogether * 4);
  m.state.begin(publications);

  for (int i = 0; i < steps; ++i) {
    if (i > 0 && !m.state.wait(i - 1)) give_up_warp(p);
    float sums[4];
    weights.multiply(from + uint32_t(m.state.at(i - 1)) * 8, groups, sums);
    if (one && i > 0) m.state.rearm(i - 1, publications);
    if constexpr (Piece::kGates) {
      float slots[4];
      exchange_slots(sums, slots);
      FSQ_UNROLL
      for (int g = 0; g < 4; ++g) sums[g] = slots[g];
    }
    FSQ_UNROLL
    for (int n = 0; n < kElements; ++n) {
      // Of rows at rest too, for nothing: a branch would cost more.
      float after = state[n];
      const E h = narrow<E>(element[n].finish(p, bias[n / 2], sums + n, after));
      last[n] = element[n].live ? h : last[n];
      state[n] = element[n].live ? after : state[n];
    }
    const uint4 next = Piece::gather(last);
    __syncwarp();  // what any lane has read of the state before may be overwritten
    if (i + 1 < steps && !(stuck && i > 0)) FSQ_UNROLL
    for (int c = 0; c < Piece::kMost; ++c) {
      const int past = (c + 1) * piece.step;
      if (past <= plan.ranks)
        m.state.send(i, to[c], next);
      else if (past - piece.step < plan.ranks)
        m.state.send_if(piece.first + c * piece.step < plan.ranks, i, to[c], next);
    }
    // While the state is on its way: what the step leaves behind, and what the next one needs.
    const Moment after = moment(p, i + 1 < steps ? time_of(share.d, i + 1, steps) : -1);
    FSQ_UNROLL
    for (int n = 0; n < kElements; ++n) {
      if (element[n].live && cells.writes) {
        const Spot s = spot(n, when);
        Element::emit(p, s, element[n].h);
        element[n].save(p, s);
      }
      if (i + 1 < steps) element[n].load(p, spot(n, after), length[n]);
    }
    when = after;
  }
  FSQ_UNROLL
  for (int n = 0; n < kElements; ++n) {
    const Spot s = spot(n, {0, 0});
    if (s.u >= p.H || s.b >= p.B || !cells.writes) continue;
    const int64_t at = state_at(p, s, p.H);
    Element::end(p, s, at);
    if (C == Cell::lstm) write<Stored<E>>(p.c_n, at, state[n]);
  }
  m.state.end();
}

// The part of W_hh that a warp multiplies backward: up to four tiles of 16 units of all ranks, by the gates of its own.
template <Cell C, class E>
struct WarpColumns {
  static constexpr int kOwned = WarpTile<C>::kUnits / kUnitTile;  // tiles of a rank
  static constexpr int kTiles = kMostTerms<E> / kUnitTile / WarpTile<C>::kWarps;
  static constexpr int kBlocks = kFed<C> * WarpTile<C>::kUnits / kBlock<E>;  // of terms
  static constexpr int kTerms = kBlocks / 4;                                 // tiles of them
  uint32_t a[kTiles][kTerms][4];

  // Floats from one rank's sums to the next's, rows that a tile may not have included: then their place is known to the
  // compiler.
  static constexpr int kFromRank = kOwned * kUnitTile * kRowTile;
  static constexpr int kMostRanks = kMostTerms<E> / WarpTile<C>::kUnits;
  typedef Stored<E> Weight;
  typedef std::conditional_t<sizeof(E) == 2, uint32_t, uint2> Pair;

  // The i-th of `count` tiles of a warp. Each rank begins with another, so that not all send to the same ones first.
  FSQ_DEVICE static int tile(int i, int count, int rank) {
    return int(threadIdx.x) / 32 + (i + rank) % count * WarpTile<C>::kWarps;
  }

  // Rows g and g + 8 of a tile are the units 2g and 2g + 1, which lie side by side in W_hh.
  FSQ_DEVICE void load(const CudaScanParams& p, const Owner& owner, int count) {
    if (p.R % 2 == 0 && reinterpret_cast<uintptr_t>(p.w_hh[owner.d]) % sizeof(Pair) == 0)
      load_all<true>(p, owner, count);
    else
      load_all<false>(p, owner, count);
  }
  // Wide: two units of a row at a time.
  template <bool Wide>
  FSQ_DEVICE void load_all(const CudaScanParams& p, const Owner& owner, int count) {
    const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
    const Weight* const w = static_cast<const Weight*>(p.w_hh[owner.d]);
    const int of_gate = owner.units / kBlock<E>;
    FSQ_UNROLL
    for (int i = 0; i < kTiles; ++i) FSQ_UNROLL
    for (int k = 0; k < kTerms; ++k) {
      const int block = 4 * k + t, gate = block / of_gate;
      const int64_t unit = int64_t(owner.rank) * owner.units + block % of_gate * kBlock<E>;
      const int64_t into = i < count ? int64_t(tile(i, count, owner.rank)) * kUnitTile + 2 * g : p.H;
      E x[2][kBlock<E>];
      FSQ_UNROLL
      for (int c = 0; c < kBlock<E>; ++c) {
        const Weight* const at = w + (gate * p.H + unit + c) * p.R + into;
        Weight both[2] = {narrow<Weight>(0), narrow<Weight>(0)};
        if (unit + c < p.H && into < p.H) {
          if constexpr (Wide) {
            const Pair packed = *reinterpret_cast<const Pair*>(at);
            memcpy(both, &packed, sizeof(both));
          } else {
            both[0] = at[0];
            if (into + 1 < p.H) both[1] = at[1];
          }
        }
        x[0][c] = operand<E>(both[0]), x[1][c] = operand<E>(both[1]);
      }
      const uint2 upper = pack_block(x[0]), lower = pack_block(x[1]);
      a[i][k][0] = upper.x, a[i][k][1] = lower.x, a[i][k][2] = upper.y, a[i][k][3] = lower.y;
    }
  }

  // count: tiles of any warp, which may be one more than those of this one.
  FSQ_DEVICE void multiply(const SharedSpan<E>& fed, int from, int count, float (&sums)[kTiles][4]) const {
    FSQ_UNROLL
    for (int i = 0; i < kTiles; ++i) FSQ_UNROLL
    for (int j = 0; j < 4; ++j) sums[i][j] = 0;
    FSQ_UNROLL
    for (int k = 0; k < kTerms; ++k) {
      const uint2 both = fed.template load<uint2>((from + k * kNextTile) * kBlock<E>);
      const uint32_t b[2] = {both.x, both.y};
      FSQ_UNROLL
      for (int i = 0; i < kTiles; ++i)
        if (i < count) multiply_add<E>(sums[i], a[i][k], b);
    }
  }

  // Of one value, what all ranks sent; `at`: what rank 0 did. There are zeros where there is no rank.
  FSQ_DEVICE static float total(const SharedSpan<float>& sent, int at) {
    constexpr int kSide = 4;
    float sums[kSide] = {};
    FSQ_UNROLL
    for (int rank = 0; rank < kMostRanks; ++rank) sums[rank % kSide] += sent[at + rank * kFromRank];
    return sums[0] + sums[1] + (sums[2] + sums[3]);
  }
};

template <Cell C, class E>
struct WarpBackwardMemory {
  typedef WarpColumns<C, E> Columns;
  // [kMostRanks][kFromRank]: [owned tiles][8 lanes' rows][row pairs][4], as accumulators hold them
  WarpChannel<float> sums;
  SharedSpan<E> fed;  // [2][rows / 4][blocks][4 rows][block]: gate gradients of this rank

  template <class Arena>
  FSQ_BOTH static WarpBackwardMemory carve(Arena& arena, const CudaPlan& plan) {
    WarpBackwardMemory m;
    constexpr int kPieces = Columns::kMostRanks * Columns::kFromRank / WarpChannel<float>::kIn;
    m.sums = WarpChannel<float>::carve(arena, kPieces, plan.ranks * Columns::kOwned * 4 * plan.rows);
    m.fed = arena.template take<E>(2 * plan.rows * Columns::kBlocks * kBlock<E>);
    return m;
  }
};

template <Cell C, class E>
FSQ_DEVICE void warp_backward_scan(const CudaScanGradParams& p, const CudaPlan& plan) {
  typedef WarpTile<C> Tile;
  typedef WarpColumns<C, E> Columns;
  constexpr int kElements = Tile::kElements;
  const CudaScanParams& f = p.fwd;
  SharedArena arena = dynamic_shared();
  const auto m = WarpBackwardMemory<C, E>::carve(arena, plan);
  const Share share(f, plan, int(ptx::cluster_rank()));
  const int steps = int(share.steps(f)), rows = plan.rows, tile_size = kUnitTile * rows;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  // The cells of this thread: values of a tile's sums in the order in which they come, every 256th.
  const int cell = int(threadIdx.x), from_lane = cell % tile_size / 4, j = cell % 4;
  const int unit0 = cell / tile_size * kUnitTile + from_lane / (rows / 2) * 2 + j / 2;
  const int row = from_lane % (rows / 2) * 2 + j % 2, unit_step = Tile::kThreads / rows;
  const auto any = [&](int n) {
    return cell + n * Tile::kThreads < Tile::kUnits * rows;
  };  // of a warp's lanes, or none
  const auto spot = [&](int n, Moment when) {
    return Spot{share.d, share.b0 + row, int64_t(share.rank) * plan.units + unit0 + n * unit_step, when};
  };

  const int tiles = plan.ranks * Columns::kOwned, count = (tiles + Tile::kWarps - 1) / Tile::kWarps;
  Columns weights;
  weights.load(f, share, count);
  for (int i = int(threadIdx.x); i < 2 * m.sums.size * m.sums.kIn; i += int(blockDim.x)) m.sums.data.store(i, 0.0f);
  for (int i = int(threadIdx.x); i < 2 * rows * Columns::kBlocks; i += int(blockDim.x))
    m.fed.store(i * kBlock<E>, uint2{0, 0});
  Backward<C, Stored<E>> element[kElements] = {};
  float carry[kElements], dc[kElements];
  int length[kElements];  // 0 of what is no unit or row: it is never live
  Moment when = moment(f, steps > 0 ? time_of(share.d, steps - 1, steps) : -1);
  FSQ_UNROLL
  for (int n = 0; n < kElements; ++n) {
    const Spot s = spot(n, when);
    const bool there = any(n) && s.u < f.H && s.b < f.B;
    length[n] = there ? int(length_of(f, s.b)) : 0;
    carry[n] = there ? initial<Stored<E>>(f, p.dh_n, s, f.H) : 0;
    dc[n] = C == Cell::lstm && there ? initial<Stored<E>>(f, p.dc_n, s, f.H) : 0;
    element[n].load(p, s, length[n]);
  }
  const int piece =
      share.rank * Columns::kFromRank / m.sums.kIn + warp % Columns::kOwned * 4 * rows + g * (rows / 2) + t;
  const int first = first_of_lane(Columns::kBlocks, rows), fed_size = rows * Columns::kBlocks;
  m.sums.begin(steps);
  const uint32_t one = ptx::opaque(threadIdx.x == 0), stuck = ptx::opaque(plan.stuck == share.rank);

  // One turn more than there are steps: the last gathers the gradients of the first states.
  for (int turn = 0; turn <= steps; ++turn) {
    if (turn > 0 && !m.sums.wait(turn - 1)) give_up_warp(f);
    const int into = turn % 2 * fed_size;
    FSQ_UNROLL
    for (int n = 0; n < kElements; ++n) {
      if (!any(n)) continue;
      carry[n] += Columns::total(m.sums.data, m.sums.at(turn - 1) + cell + n * Tile::kThreads);
      // Of rows at rest too, for nothing: a branch would cost more.
      float fed[kGatesOf<C>] = {}, dh = carry[n], dc_before = dc[n];
      element[n].run(p, carry[n] + widen(element[n].dy), fed, dc_before, dh);
      const bool live = element[n].live;
      carry[n] = live ? dh : carry[n];
      dc[n] = live ? dc_before : dc[n];
      const int unit = unit0 + n * unit_step;
      FSQ_UNROLL
      for (int gate = 0; gate < kFed<C>; ++gate) {
        const int block = (gate * Tile::kUnits + unit) / kBlock<E>;
        const int at = into + (row / kHalf * Columns::kBlocks + block) * kHalf + row % kHalf;
        m.fed.store(at * kBlock<E> + unit % kBlock<E>, narrow<E>(live ? fed[gate] : 0));
      }
    }
    if (turn == steps) break;
    if (one && turn > 0) m.sums.rearm(turn - 1, steps);
    __syncthreads();
    float sums[Columns::kTiles][4];
    weights.multiply(m.fed, into + first, count, sums);
    __syncwarp();
    const bool sends = t < rows / 2 && !(stuck && turn > 0);
    FSQ_UNROLL
    for (int i = 0; i < Columns::kTiles; ++i) {
      if (i >= count) continue;
      const int tile = Columns::tile(i, count, share.rank);
      const auto to = m.sums.place(piece, tile < tiles ? tile / Columns::kOwned : 0);
      m.sums.send_if(sends && tile < tiles, turn, to, float4{sums[i][0], sums[i][1], sums[i][2], sums[i][3]});
    }
    // While the sums are on their way: what the step leaves behind, and what the next one needs.
    const Moment after = moment(f, turn + 1 < steps ? time_of(share.d, steps - 2 - turn, steps) : -1);
    FSQ_UNROLL
    for (int n = 0; n < kElements; ++n) {
      if (element[n].live) element[n].save(p, spot(n, when));
      element[n].load(p, spot(n, after), length[n]);
    }
    when = after;
  }
  FSQ_UNROLL
  for (int n = 0; n < kElements; ++n) {
    const Spot s = spot(n, {0, 0});
    if (!any(n) || s.u >= f.H || s.b >= f.B) continue;
    const int64_t at = state_at(f, s, f.H);
    write<Stored<E>>(p.dh0, at, carry[n]);
    if (C == Cell::lstm) write<Stored<E>>(p.dc0, at, dc[n]);
  }
  m.sums.end();
}

template <Cell C, class E>
__global__ void __launch_bounds__(WarpTile<C>::kThreads, 1)
    warp_forward(const __grid_constant__ CudaScanParams p, const __grid_constant__ CudaPlan plan) {
  if constexpr (kHasClusters)
    warp_forward_scan<C, E>(p, plan);
  else
    __trap();
}
template <Cell C, class E>
__global__ void __launch_bounds__(WarpTile<C>::kThreads, 1)
    warp_backward(const __grid_constant__ CudaScanGradParams p, const __grid_constant__ CudaPlan plan) {
  if constexpr (kHasClusters)
    warp_backward_scan<C, E>(p, plan);
  else
    __trap();
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
