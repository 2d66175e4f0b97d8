// What one CTA of a persistent scan owns: a tile of rows, hidden units with all their gates, and the weights that
// belong to them, as they come into its shared memory and registers.
#pragma once
#include "cuda/element.cuh"
#include "cuda/product.cuh"
#include "cuda/scan.h"

namespace fusedseq {
namespace FSQ_ISA {

FSQ_BOTH int64_t groups_of(const CudaScanParams& p, const CudaPlan& plan) {
  return (p.B + plan.rows - 1) / plan.rows * p.D;
}

// Whose weights: those of a rank's units, in one direction.
struct Owner {
  int64_t d;
  int rank, units;
};

// Which rows and units a CTA and a thread own. A block has a whole number of threads for each unit, so that a thread
// stays with one unit: its n-th element is `step` rows below the one before.
struct Share : Owner {
  int rows;
  int unit, row, step;  // of this thread: its unit within the rank, the first of its rows within the tile
  int mine;             // elements of this thread
  int64_t b0, group, groups;

  FSQ_DEVICE Share(const CudaScanParams& p, const CudaPlan& plan, int own) : Owner{0, own, plan.units} {
    group = plan.first + blockIdx.x / plan.ranks;
    groups = groups_of(p, plan);
    rows = plan.rows;
    d = group % p.D;
    b0 = group / p.D * rows;
    unit = int(threadIdx.x) % units;
    row = int(threadIdx.x) / units;
    step = int(blockDim.x) / units;
    const int there = p.B - b0 < rows ? int(p.B - b0) : rows;
    mine = int64_t(rank) * units + unit < p.H && row < there ? (there - row + step - 1) / step : 0;
  }
  FSQ_DEVICE int row_of(int n) const { return row + n * step; }
  FSQ_DEVICE Spot spot(int n, Moment when) const { return {d, b0 + row_of(n), int64_t(rank) * units + unit, when}; }
  // Steps that any row of the tile takes.
  FSQ_DEVICE int64_t steps(const CudaScanParams& p) const {
    if (!p.lengths) return p.T;
    int64_t longest = 0;
    for (int64_t b = b0; b < b0 + rows && b < p.B; ++b) longest = p.lengths[b] > longest ? p.lengths[b] : longest;
    return longest;
  }
};

// Elements of 16 bytes of a tensor: what a thread reads at a time where rows begin at multiples of as many bytes.
template <class E>
constexpr int kWide = 16 / int(sizeof(Stored<E>));
template <class E>
FSQ_DEVICE bool is_wide(const CudaScanParams& p, const void* w) {
  return p.R % kWide<E> == 0 && reinterpret_cast<uintptr_t>(w) % 16 == 0;
}
// kWide of them as operands, which are as wide.
template <class E>
FSQ_DEVICE uint4 read_wide(const Stored<E>* from) {
  const uint4 packed = *reinterpret_cast<const uint4*>(from);
  if constexpr (std::is_same_v<E, Stored<E>>) return packed;
  Stored<E> stored[kWide<E>];
  memcpy(stored, &packed, sizeof(packed));
  E x[kWide<E>];
  FSQ_UNROLL
  for (int i = 0; i < kWide<E>; ++i) x[i] = operand<E>(stored[i]);
  uint4 operands;
  memcpy(&operands, x, sizeof(operands));
  return operands;
}

// Rows of W_hh of this rank's units, gates from `first` on; zeros beyond H.
template <class E>
struct WeightRows {
  const CudaScanParams& p;
  Owner owner;
  int first;

  FSQ_DEVICE const Stored<E>* row(int g, int64_t unit) const {
    return static_cast<const Stored<E>*>(p.w_hh[owner.d]) + ((first + g) * p.H + unit) * p.R;
  }
  FSQ_DEVICE E operator()(int g, int u, int k) const {
    const int64_t unit = int64_t(owner.rank) * owner.units + u;
    return unit < p.H && k < p.H ? operand<E>(row(g, unit)[k]) : narrow<E>(0);
  }
  // k, which is even, and k + 1.
  FSQ_DEVICE void pair(int g, int u, int k, E (&x)[2]) const {
    const int64_t unit = int64_t(owner.rank) * owner.units + u;
    x[0] = x[1] = narrow<E>(0);
    if (unit >= p.H || k >= p.H) return;
    const Stored<E>* const from = row(g, unit) + k;
    if (k + 1 < p.H && reinterpret_cast<uintptr_t>(from) % sizeof(uint32_t) == 0) {
      static_assert(sizeof(Stored<E>) == 2, "pairs are of half types");
      const uint32_t packed = *reinterpret_cast<const uint32_t*>(from);
      memcpy(x, &packed, sizeof(packed));
    } else {
      x[0] = from[0];
      if (k + 1 < p.H) x[1] = from[1];
    }
  }
  // What of the panel is not held: a warp takes a row at a time.
  FSQ_DEVICE void load(const Panel<E>& panel, int gates) const {
    const int lane = int(threadIdx.x) % 32;
    const bool wide = is_wide<E>(p, p.w_hh[owner.d]);
    for (int r = int(threadIdx.x) / 32; r < gates * panel.units; r += int(blockDim.x) / 32) {
      const int g = r / panel.units, u = r % panel.units;
      const int64_t unit = int64_t(owner.rank) * owner.units + u;
      if (wide) {
        FSQ_UNROLL_BY(4)
        for (int k = panel.held + lane * kWide<E>; k < panel.terms; k += 32 * kWide<E>) {
          const bool there = unit < p.H && k < p.H;
          panel.data.store(panel.at(r, k), there ? read_wide<E>(row(g, unit) + k) : uint4{0, 0, 0, 0});
        }
      } else {
        FSQ_UNROLL_BY(4)
        for (int k = panel.held + lane; k < panel.terms; k += 32) panel.data.store(panel.at(r, k), (*this)(g, u, k));
      }
    }
  }
};

// Columns of W_hh of this rank's units, as rows; terms run over the slices of all ranks, `gates` blocks in each.
template <class E>
struct WeightColumns {
  const CudaScanParams& p;
  Owner owner;
  int first, gates;

  // A row of W_hh, by its gate and unit.
  struct Term {
    int64_t gate, unit;
  };
  FSQ_DEVICE Term term(int k) const {
    const int units = owner.units, width = gates * units, in = k % width;
    return {first + in / units, int64_t(k / width) * units + in % units};
  }
  FSQ_DEVICE const Stored<E>* row(Term term, int64_t unit) const {
    return static_cast<const Stored<E>*>(p.w_hh[owner.d]) + (term.gate * p.H + term.unit) * p.R + unit;
  }
  // k, which is even, and k + 1: of the same slice and gate.
  FSQ_DEVICE void pair(int, int u, int k, E (&x)[2]) const {
    const int64_t unit = int64_t(owner.rank) * owner.units + u;
    const Term from = term(k);
    x[0] = x[1] = narrow<E>(0);
    if (unit >= p.H || from.unit >= p.H) return;
    const E* const at = row(from, unit);
    x[0] = at[0];
    if (from.unit + 1 < p.H) x[1] = at[p.R];
  }
  // A thread takes the terms of a word, which lie side by side in the panel, and of them kWide units at a time, which
  // lie side by side in memory.
  FSQ_DEVICE void load(const Panel<E>& panel) const {
    constexpr int kWord = 4 / int(sizeof(E));
    const bool wide = is_wide<E>(p, p.w_hh[owner.d]);
    for (int k = panel.held + int(threadIdx.x) * kWord; k < panel.terms; k += int(blockDim.x) * kWord) {
      const Term from = term(k);
      FSQ_UNROLL_BY(2)
      for (int u = 0; u < panel.units; u += kWide<E>) {
        const int64_t unit = int64_t(owner.rank) * owner.units + u;
        E x[kWord][kWide<E>];
        FSQ_UNROLL
        for (int c = 0; c < kWord; ++c) {
          const bool there = from.unit + c < p.H;
          const Stored<E>* const at = row({from.gate, from.unit + c}, unit);
          if (wide && there && unit < p.H) {
            const uint4 packed = read_wide<E>(at);
            memcpy(x[c], &packed, sizeof(packed));
          } else {
            FSQ_UNROLL
            for (int i = 0; i < kWide<E>; ++i) x[c][i] = there && unit + i < p.H ? operand<E>(at[i]) : narrow<E>(0);
          }
        }
        FSQ_UNROLL
        for (int i = 0; i < kWide<E>; ++i) {
          E word[kWord];
          FSQ_UNROLL
          for (int c = 0; c < kWord; ++c) word[c] = x[c][i];
          uint32_t packed;
          memcpy(&packed, word, sizeof(packed));
          panel.data.store(panel.at(u + i, k), packed);
        }
      }
    }
  }
};

}  // namespace FSQ_ISA
}  // namespace fusedseq
