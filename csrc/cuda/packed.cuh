// Weights of tier `grid` that do not fit into shared memory: packed once in the workspace, read at every step.
#pragma once
#include "cuda/share.cuh"

namespace fusedseq {
namespace FSQ_ISA {

// Packed panels in the workspace: those of the first product, [D][ranks], then those of the second.
template <Cell C>
struct PackedPanels {
  static constexpr int kSecond = C == Cell::gru_reset_before ? 1 : 0;
  int64_t first, second;  // elements of a panel, 0 where there is no second

  FSQ_BOTH PackedPanels(const CudaPlan& plan, bool backward) {
    const int terms = plan.ranks * plan.units;
    first = backward ? Packed<1>::size(plan.units, kFed<C> * terms) : Packed<kFirst<C>>::size(plan.units, terms);
    second = kSecond * Packed<1>::size(plan.units, terms);
  }
  FSQ_BOTH int64_t all(int64_t panels) const { return panels * (first + second); }
};
template <class Shape, int N>
FSQ_DEVICE auto packed_panel(const CudaScanParams& p, const CudaPlan& plan, const Owner& owner, int64_t before,
                             int64_t size) {
  if constexpr (Shape::kPacked) {
    const uint4* const all = reinterpret_cast<const uint4*>(static_cast<const char*>(p.workspace) + plan.packed);
    return Packed<N>{all + before * p.D * plan.ranks + (owner.d * plan.ranks + owner.rank) * size};
  } else {
    return Unpacked();
  }
}

template <Cell C, class E, bool BACKWARD>
__global__ void __launch_bounds__(256)
    pack_weights(const __grid_constant__ CudaScanParams p, const __grid_constant__ CudaPlan plan, int count) {
  const PackedPanels<C> panels(plan, BACKWARD);
  const int whole = int(panels.all(1)), terms = plan.ranks * plan.units;
  uint4* const all = reinterpret_cast<uint4*>(static_cast<char*>(p.workspace) + plan.packed);
  for (int i = int(blockIdx.x) * 256 + int(threadIdx.x); i < count; i += int(gridDim.x) * 256) {
    // The panels of both products of an owner one after the other; in memory all of the first come before the others.
    const int panel = i / whole, at = i % whole;
    const Owner owner{panel / plan.ranks, panel % plan.ranks, plan.units};
    const bool second = at >= panels.first;
    const int64_t into = second ? panels.first * p.D * plan.ranks + panel * panels.second + at - panels.first
                                : panel * panels.first + at;
    if (second)
      all[into] = BACKWARD ? pack_fragment<E, 1>(at - int(panels.first), terms, WeightColumns<E>{p, owner, 2, 1})
                           : pack_fragment<E, 1>(at - int(panels.first), terms, WeightRows<E>{p, owner, 2});
    else if constexpr (BACKWARD)
      all[into] = pack_fragment<E, 1>(at, terms * kFed<C>, WeightColumns<E>{p, owner, 0, kFed<C>});
    else
      all[into] = pack_fragment<E, kFirst<C>>(at, terms, WeightRows<E>{p, owner, 0});
  }
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
