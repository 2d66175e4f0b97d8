// What a warp owns in the scans of warp_scan.cuh: 16 rows of W_hh as A of mma.sync, in registers for the whole scan,
// and the cells that its sums are.
//
// The terms of a product come in blocks of 8 bytes: what a lane needs of a row for one mma.sync, its two registers of
// B. Of half types block 4 i + t holds the terms 2t, 2t + 1, 2t + 8, 2t + 9 of tile i, of TF32 the terms t and t + 4.
// Which terms those are is free, as long as weights and state agree. In memory rows come in halves of four,
// [half][block][4 rows], so that addresses do not depend on how many halves there are, and 32 lanes read 128 bytes side
// by side of each.
#pragma once
#include "cuda/element.cuh"
#include "cuda/share.cuh"

namespace fusedseq {
namespace FSQ_ISA {

constexpr int kHalf = 4;
// Terms of a block, and of a tile of mma.sync.
template <class E>
constexpr int kBlock = 8 / int(sizeof(E));
template <class E>
constexpr int kTileTerms = 4 * kBlock<E>;

// Eight warps. A warp's rows are the gates of four units, each in a slot; a GRU leaves one of the four slots empty. An
// RNN has 16 units instead.
template <Cell C>
struct WarpTile {
  static constexpr int kSlots = kGatesOf<C> > 1 ? 4 : 1, kWarps = 8, kThreads = 32 * kWarps;
  static constexpr int kOfWarp = kUnitTile / kSlots, kUnits = kWarps * kOfWarp;  // units
  static constexpr int kElements = kUnits * kRowTile / kThreads;                 // cells of a lane
  static_assert(C != Cell::gru_reset_before, "has a second product in a step");
};
// Terms that a lane has registers for: 128 of them.
template <class E>
constexpr int kMostTerms = 32 * kTileTerms<E>;

template <class E>
FSQ_DEVICE uint2 pack_block(const E (&x)[kBlock<E>]) {
  uint2 packed;
  memcpy(&packed, x, sizeof(packed));
  return packed;
}

// The terms of a row of W_hh from k on, a block of them; zeros beyond H. Wide: rows begin at multiples of a block.
template <bool Wide, class E>
FSQ_DEVICE uint2 block_of_terms(const WeightRows<E>& weights, int g, int u, int k) {
  E x[kBlock<E>];
  if constexpr (Wide) {
    const int64_t unit = int64_t(weights.owner.rank) * weights.owner.units + u;
    if (unit >= weights.p.H || k >= weights.p.H) return {0, 0};
    const uint2 packed = *reinterpret_cast<const uint2*>(weights.row(g, unit) + k);
    if constexpr (std::is_same_v<E, Stored<E>>) return packed;
    Stored<E> stored[kBlock<E>];
    memcpy(stored, &packed, sizeof(packed));
    FSQ_UNROLL
    for (int i = 0; i < kBlock<E>; ++i) x[i] = operand<E>(stored[i]);
  } else {
    FSQ_UNROLL
    for (int i = 0; i < kBlock<E>; ++i) x[i] = weights(g, u, k + i);
  }
  return pack_block(x);
}

// Where a lane's row of B begins among [half][blocks][4 rows] of 8 bytes, and from tile to tile.
FSQ_DEVICE int first_of_lane(int blocks, int rows) {
  const int lane = int(threadIdx.x) % 32, row = lane / 4 % rows;
  return (row / kHalf * blocks + lane % 4) * kHalf + row % kHalf;
}
constexpr int kNextTile = 4 * kHalf;

// The (unit, row) pairs of a lane after the forward product. With g = lane / 4, t = lane % 4: four slots: unit g / 2,
// row 2t + g % 2. One slot: units 2g and 2g + 1, rows 2t and 2t + 1, in the order of an accumulator. With four rows the
// lanes of t > 1 repeat those of t - 2: they compute the same and write nothing.
template <Cell C>
struct LaneCells {
  int unit, row;  // of element 0, within the rank and the tile of rows
  bool writes;

  FSQ_DEVICE explicit LaneCells(int rows) {
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
    const bool slots = WarpTile<C>::kSlots > 1;
    unit = warp * WarpTile<C>::kOfWarp + (slots ? g / 2 : 2 * g);
    row = (2 * t + (slots ? g % 2 : 0)) % rows;
    writes = t < rows / 2;
  }
  FSQ_DEVICE int unit_of(int n) const { return unit + n / 2; }
  FSQ_DEVICE int row_of(int n) const { return row + n % 2; }
};

// The weights of this warp, as A of mma.sync for all tiles of terms.
template <Cell C, class E>
struct WarpRows {
  static constexpr int kTiles = kMostTerms<E> / kTileTerms<E>, kTogether = 4;
  uint32_t a[kTiles][4];

  FSQ_DEVICE void load(const WeightRows<E>& weights) {
    const CudaScanParams& p = weights.p;
    if (p.R % kBlock<E> == 0 && reinterpret_cast<uintptr_t>(p.w_hh[weights.owner.d]) % sizeof(uint2) == 0)
      load_all<true>(weights);
    else
      load_all<false>(weights);
  }
  template <bool Wide>
  FSQ_DEVICE void load_all(const WeightRows<E>& weights) {
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
    constexpr bool kGates = WarpTile<C>::kSlots > 1;
    const int unit = warp * WarpTile<C>::kOfWarp + (kGates ? g / 2 : 2 * g), gate = kGates ? g % 2 * 2 : 0;
    FSQ_UNROLL
    for (int i = 0; i < kTiles; ++i) {
      const int k = (4 * i + t) * kBlock<E>;
      const uint2 upper = block_of_terms<Wide>(weights, gate, unit, k);
      uint2 lower = {0, 0};
      if (!kGates)
        lower = block_of_terms<Wide>(weights, 0, unit + 1, k);
      else if (gate + 1 < kGatesOf<C>)
        lower = block_of_terms<Wide>(weights, gate + 1, unit, k);
      a[i][0] = upper.x, a[i][1] = lower.x, a[i][2] = upper.y, a[i][3] = lower.y;
    }
  }

  // sums: those of a lane. `from`: address of this lane's first values; groups: of kTogether tiles of terms.
  FSQ_DEVICE void multiply(uint32_t from, int groups, float (&sums)[4]) const {
    float acc[kTogether][4] = {};
    uint32_t b[2][kTogether][2];
    const auto load_group = [&](int group) {
      FSQ_UNROLL
      for (int c = 0; c < kTogether; ++c) {
        const uint2 both = ptx::ld_shared_8(from + uint32_t((group * kTogether + c) * kNextTile) * 8);
        b[group % 2][c][0] = both.x, b[group % 2][c][1] = both.y;
      }
    };
    load_group(0);
    FSQ_UNROLL
    for (int group = 0; group < kTiles / kTogether; ++group) {
      if (group >= groups) continue;
      if (group + 1 < groups) load_group(group + 1);
      FSQ_UNROLL
      for (int c = 0; c < kTogether; ++c) multiply_add<E>(acc[c], a[group * kTogether + c], b[group % 2][c]);
    }
    FSQ_UNROLL
    for (int i = 0; i < 4; ++i) sums[i] = acc[0][i] + acc[1][i] + (acc[2][i] + acc[3][i]);
  }
};

// The sums of a lane's cell, by slot, from those of its product: each of two lanes has two slots of two rows.
FSQ_DEVICE void exchange_slots(const float (&mine)[4], float (&slots)[4]) {
  const bool odd = threadIdx.x / 4 % 2;
  const float first = __shfl_xor_sync(0xffffffffu, odd ? mine[0] : mine[1], 4);
  const float second = __shfl_xor_sync(0xffffffffu, odd ? mine[2] : mine[3], 4);
  slots[0] = odd ? first : mine[0];
  slots[1] = odd ? second : mine[2];
  slots[2] = odd ? mine[1] : first;
  slots[3] = odd ? mine[3] : second;
}

// A piece of a warp's new state, a block of two rows, and which copies of it this lane sends.
template <Cell C, class E>
struct StatePiece {
  static constexpr bool kGates = WarpTile<C>::kSlots > 1;
  static constexpr int kSame = kRowTile / (WarpTile<C>::kOfWarp / kBlock<E>);  // lanes that have a piece, of 8 rows
  static constexpr int kMost = kMostTerms<E> / WarpTile<C>::kUnits / kSame;    // copies of a lane
  int piece, first, step;  // within a rank's buffer; of the ranks, counted from this one: first, first + step, ..

  FSQ_DEVICE StatePiece(int blocks, int rows, int rank) {
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
    const int block = (rank * WarpTile<C>::kUnits + warp * WarpTile<C>::kOfWarp) / kBlock<E> + g / kSame;
    const int row = 2 * t % rows;
    piece = ((row / kHalf * blocks + block) * kHalf + row % kHalf) / 2;
    first = g % kSame + 2 * t / rows * kSame;
    step = kSame * (kRowTile / rows);
  }

  // h: of this lane's cells. For row 2t, then row 2t + 1, the units of the block in order.
  FSQ_DEVICE static uint4 gather(const E (&h)[WarpTile<C>::kElements]) {
    const int g = int(threadIdx.x) % 32 / 4;
    const auto bits = [](E x) {
      std::conditional_t<sizeof(E) == 2, uint16_t, uint32_t> b;
      memcpy(&b, &x, sizeof(b));
      return uint32_t(b);
    };
    const auto from = [](uint32_t x, int lanes) { return uint32_t(__shfl_xor_sync(0xffffffffu, x, lanes)); };
    const auto pair = [](uint32_t low, uint32_t high) { return low | high << 16; };
    if constexpr (kGates) {
      // This row's words, and those of the other one.
      uint2 own, far;
      const uint32_t mine = bits(h[0]);
      if constexpr (sizeof(E) == 2) {
        const uint32_t other = from(mine, 8), here = g / 2 % 2 ? pair(other, mine) : pair(mine, other);
        const uint32_t units = from(here, 16), row = from(here, 4), both = from(here, 20);
        own = g < 4 ? uint2{here, units} : uint2{units, here};
        far = g < 4 ? uint2{row, both} : uint2{both, row};
      } else {
        const uint32_t unit = from(mine, 8), row = from(mine, 4), both = from(mine, 12);
        own = g / 2 % 2 ? uint2{unit, mine} : uint2{mine, unit};
        far = g / 2 % 2 ? uint2{both, row} : uint2{row, both};
      }
      return g % 2 ? uint4{far.x, far.y, own.x, own.y} : uint4{own.x, own.y, far.x, far.y};
    } else if constexpr (sizeof(E) == 2) {
      const uint32_t upper = pair(bits(h[0]), bits(h[2])), lower = pair(bits(h[1]), bits(h[3]));
      const uint32_t upper_far = from(upper, 4), lower_far = from(lower, 4);
      return g % 2 ? uint4{upper_far, upper, lower_far, lower} : uint4{upper, upper_far, lower, lower_far};
    } else {
      return uint4{bits(h[0]), bits(h[2]), bits(h[1]), bits(h[3])};
    }
  }
};

}  // namespace FSQ_ISA
}  // namespace fusedseq
