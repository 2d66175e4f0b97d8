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

// Rows of W_hh of this rank's units, gates from `first` on; zeros beyond H.
template <class E>
struct WeightRows {
  const CudaScanParams& p;
  Owner owner;
  int first;

  FSQ_DEVICE E operator()(int g, int u, int k) const {
    const Stored<E>* const w = static_cast<const Stored<E>*>(p.w_hh[owner.d]);
    const int64_t unit = int64_t(owner.rank) * owner.units + u, gate = first + g;
    return unit < p.H && k < p.H ? operand<E>(w[(gate * p.H + unit) * p.R + k]) : narrow<E>(0);
  }
  // What of the panel is not held.
  FSQ_DEVICE void load(const Panel<E>& panel, int gates) const {
    const int terms = panel.terms - panel.held;
    for (int i = int(threadIdx.x); i < gates * panel.units * terms; i += int(blockDim.x)) {
      const int row = i / terms, k = panel.held + i % terms;
      panel.data.store(panel.at(row, k), (*this)(row / panel.units, row % panel.units, k));
    }
  }
};

// Columns of W_hh of this rank's units, as rows; terms run over the slices of all ranks, `gates` blocks in each.
template <class E>
struct WeightColumns {
  const CudaScanParams& p;
  Owner owner;
  int first, gates;

  FSQ_DEVICE E operator()(int, int u, int k) const {
    const Stored<E>* const w = static_cast<const Stored<E>*>(p.w_hh[owner.d]);
    const int units = owner.units, width = gates * units;
    const int64_t gate = first + k % width / units, row = int64_t(k / width) * units + k % units;
    const int64_t unit = int64_t(owner.rank) * units + u;
    return unit < p.H && row < p.H ? operand<E>(w[(gate * p.H + row) * p.R + unit]) : narrow<E>(0);
  }
  FSQ_DEVICE void load(const Panel<E>& panel) const {
    const int terms = panel.terms - panel.held;
    for (int i = int(threadIdx.x); i < panel.units * terms; i += int(blockDim.x)) {
      const int k = panel.held + i / panel.units, u = i % panel.units;  // neighbours read neighbouring addresses
      panel.data.store(panel.at(u, k), (*this)(0, u, k));
    }
  }
};

}  // namespace FSQ_ISA
}  // namespace fusedseq
