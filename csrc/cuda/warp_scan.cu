// Tier `cluster` with warps that go their own way (warp_scan.cuh): launches, and what the planner asks.
#include "cuda/warp_scan.cuh"

namespace fusedseq {
namespace FSQ_ISA {

namespace {

// f(c, e) for the cells and types that have such kernels.
template <class F>
auto for_warp_scan(const CudaScanParams& p, F f) {
  const auto of_type = [&](auto c) {
    if (p.dtype == DType::f32) return f(c, Tf32());
    return p.dtype == DType::f16 ? f(c, __half()) : f(c, __nv_bfloat16());
  };
  switch (family(p.cell)) {
    case Cell::lstm:
      return of_type(CellConstant<Cell::lstm>());
    case Cell::gru:
      return of_type(CellConstant<Cell::gru>());
    default:
      return of_type(CellConstant<Cell::rnn_tanh>());
  }
}

}  // namespace

int warp_units(Cell cell) {
  return gate_count(cell) > 1 ? WarpTile<Cell::lstm>::kUnits : WarpTile<Cell::rnn_tanh>::kUnits;
}

bool warp_takes(const CudaScanParams& p) {
  if (p.cell == Cell::gru_reset_before || p.w_hr[0]) return false;
  const bool half = p.dtype == DType::bf16 || p.dtype == DType::f16;
  return half ? p.H <= kMostTerms<__half> : p.dtype == DType::f32 && p.tf32 && p.H <= kMostTerms<Tf32>;
}

int warp_bytes(const CudaScanParams& p, const CudaPlan& plan, bool backward) {
  return for_warp_scan(p, [&](auto c, auto e) {
    constexpr Cell C = decltype(c)::value;
    typedef decltype(e) E;
    SharedArena arena;
    if (backward)
      WarpBackwardMemory<C, E>::carve(arena, plan);
    else
      WarpForwardMemory<C, E>::carve(arena, plan);
    return arena.bytes();
  });
}

int warp_resident(const CudaScanParams& p, const CudaPlan& plan, bool backward) {
  int clusters = 0;
  const std::string error = for_warp_scan(p, [&](auto c, auto e) {
    constexpr Cell C = decltype(c)::value;
    typedef decltype(e) E;
    return backward ? active_clusters(clusters, &warp_backward<C, E>, persistent_launch("warp_backward", p, plan))
                    : active_clusters(clusters, &warp_forward<C, E>, persistent_launch("warp_forward", p, plan));
  });
  return error.empty() ? clusters : 0;
}

std::string warp_scan_forward(const CudaScanParams& p, const CudaPlan& plan) {
  return for_warp_scan(p, [&](auto c, auto e) {
    return run(&warp_forward<decltype(c)::value, decltype(e)>, persistent_launch("warp_forward", p, plan), p, plan);
  });
}

std::string warp_scan_backward(const CudaScanGradParams& p, const CudaPlan& plan) {
  return for_warp_scan(p.fwd, [&](auto c, auto e) {
    return run(&warp_backward<decltype(c)::value, decltype(e)>, persistent_launch("warp_backward", p.fwd, plan), p,
               plan);
  });
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
