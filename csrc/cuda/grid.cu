// Tier `grid`: as many CTAs as the device holds share the weights of a direction; the state goes through global memory.
#include "cuda/persistent.cuh"

namespace fusedseq {
namespace FSQ_ISA {

namespace {

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
  return for_persistent(p, [&](auto c, auto e) {
    return persistent_bytes<decltype(c)::value, decltype(e), GridChannel, Wide>(plan, backward);
  });
}

int64_t grid_workspace(const CudaScanParams& p, const CudaPlan& plan, bool backward) {
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
    return groups_of(p, plan) * bytes;
  });
}

std::string grid_forward(const CudaScanParams& p, const CudaPlan& plan) {
  return for_persistent(p, [&](auto c, auto e) {
    return in_turns("grid_forward", p, plan, [&](const Launch& launch, const CudaPlan& part) {
      return run(&persistent_forward<decltype(c)::value, decltype(e), GridChannel, Wide>, launch, p, part);
    });
  });
}

std::string grid_backward(const CudaScanGradParams& p, const CudaPlan& plan) {
  return for_persistent(p.fwd, [&](auto c, auto e) {
    return in_turns("grid_backward", p.fwd, plan, [&](const Launch& launch, const CudaPlan& part) {
      return run(&persistent_backward<decltype(c)::value, decltype(e), GridChannel, Wide>, launch, p, part);
    });
  });
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
