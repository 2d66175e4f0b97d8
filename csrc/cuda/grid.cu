// Tier `grid`: as many CTAs as the device holds share the weights of a direction; the state goes through global memory.
// Weights that do not fit into their shared memory are packed once and read at every step.
#include "cuda/persistent.cuh"

namespace fusedseq {
namespace FSQ_ISA {

namespace {

// f(c, e, shape)
template <class F>
auto for_grid(const CudaScanParams& p, const CudaPlan& plan, F f) {
  return for_persistent(p, [&](auto c, auto e) {
    if constexpr (sizeof(e) == 2)
      if (plan.packed) return f(c, e, Streaming());
    return f(c, e, Wide());
  });
}

// The weights as every step reads them, before the scan that does.
template <Cell C, class E, class Shape, bool BACKWARD>
std::string pack(const CudaScanParams& p, const CudaPlan& plan) {
  if constexpr (Shape::kPacked) {
    const int64_t count = PackedPanels<C>(plan, BACKWARD).all(p.D * plan.ranks), blocks = (count + 255) / 256;
    Launch launch("pack_weights", describe(p), dim3(unsigned(blocks < 4096 ? blocks : 4096)), dim3(256));
    launch.stream = static_cast<cudaStream_t>(p.stream);
    return run(&pack_weights<C, E, BACKWARD>, launch, p, plan, int(count));
  } else {
    return std::string();
  }
}

// As many groups at a time as are resident together.
template <class F>
std::string in_turns(const char* name, const CudaScanParams& p, CudaPlan plan, F f) {
  const int64_t groups = groups_of(p, plan);
  std::string error;
  for (plan.first = 0; plan.first < groups && error.empty(); plan.first += plan.together) {
    const int64_t left = groups - plan.first;
    error = f(persistent_launch(name, p, plan, left < plan.together ? left : plan.together), plan);
  }
  return error;
}

}  // namespace

int grid_bytes(const CudaScanParams& p, const CudaPlan& plan, bool backward) {
  return for_grid(p, plan, [&](auto c, auto e, auto shape) {
    return persistent_bytes<decltype(c)::value, decltype(e), GridChannel, decltype(shape)>(plan, backward);
  });
}

int64_t grid_workspace(const CudaScanParams& p, CudaPlan& plan, bool backward) {
  return for_persistent(p, [&](auto c, auto e) {
    constexpr Cell C = decltype(c)::value;
    typedef decltype(e) E;
    SharedArena arena;
    int64_t bytes = 0;
    if (backward) {
      const auto m = BackwardMemory<C, E, GridChannel, Wide>::carve(arena, plan);
      bytes = m.fed.bytes() + (m.kTwo ? m.dn.bytes() : 0);
    } else {
      const auto m = ForwardMemory<C, E, GridChannel, Wide>::carve(arena, plan);
      bytes = m.h.bytes() + (m.kTwo ? m.rh.bytes() : 0);
    }
    const int64_t exchanged = groups_of(p, plan) * bytes;
    if (!plan.packed) return exchanged;
    plan.packed = (exchanged + 255) / 256 * 256;
    return plan.packed + PackedPanels<C>(plan, backward).all(p.D * plan.ranks) * int64_t(sizeof(uint4));
  });
}

std::string grid_forward(const CudaScanParams& p, const CudaPlan& plan) {
  return for_grid(p, plan, [&](auto c, auto e, auto s) {
    constexpr Cell C = decltype(c)::value;
    typedef decltype(e) E;
    typedef decltype(s) Shape;
    const std::string error = pack<C, E, Shape, false>(p, plan);
    if (!error.empty()) return error;
    return in_turns("grid_forward", p, plan, [&](const Launch& launch, const CudaPlan& part) {
      return run(&persistent_forward<C, E, GridChannel, Shape>, launch, p, part);
    });
  });
}

std::string grid_backward(const CudaScanGradParams& p, const CudaPlan& plan) {
  return for_grid(p.fwd, plan, [&](auto c, auto e, auto s) {
    constexpr Cell C = decltype(c)::value;
    typedef decltype(e) E;
    typedef decltype(s) Shape;
    const std::string error = pack<C, E, Shape, true>(p.fwd, plan);
    if (!error.empty()) return error;
    return in_turns("grid_backward", p.fwd, plan, [&](const Launch& launch, const CudaPlan& part) {
      return run(&persistent_backward<C, E, GridChannel, Shape>, launch, p, part);
    });
  });
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
