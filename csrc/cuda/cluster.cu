// Tier `cluster`: up to 16 CTAs share the weights of a direction; the state goes through distributed shared memory.
// sm_90
#include "cuda/persistent.cuh"

namespace fusedseq {
namespace FSQ_ISA {

int cluster_bytes(const CudaScanParams& p, const CudaPlan& plan, bool backward) {
  return for_shape(p, plan, [&](auto c, auto e, auto shape) {
    return persistent_bytes<decltype(c)::value, decltype(e), ClusterChannel, decltype(shape)>(plan, backward);
  });
}

int cluster_resident(const CudaScanParams& p, const CudaPlan& plan, bool backward) {
  int clusters = 0;
  const std::string error = for_shape(p, plan, [&](auto c, auto e, auto shape) {
    constexpr Cell C = decltype(c)::value;
    typedef decltype(e) E;
    return backward ? active_clusters(clusters, &persistent_backward<C, E, ClusterChannel, decltype(shape)>,
                                      persistent_launch("cluster_backward", p, plan))
                    : active_clusters(clusters, &persistent_forward<C, E, ClusterChannel, decltype(shape)>,
                                      persistent_launch("cluster_forward", p, plan));
  });
  return error.empty() ? clusters : 0;
}

std::string cluster_forward(const CudaScanParams& p, const CudaPlan& plan) {
  return for_shape(p, plan, [&](auto c, auto e, auto shape) {
    return run(&persistent_forward<decltype(c)::value, decltype(e), ClusterChannel, decltype(shape)>,
               persistent_launch("cluster_forward", p, plan), p, plan);
  });
}

std::string cluster_backward(const CudaScanGradParams& p, const CudaPlan& plan) {
  return for_shape(p.fwd, plan, [&](auto c, auto e, auto shape) {
    return run(&persistent_backward<decltype(c)::value, decltype(e), ClusterChannel, decltype(shape)>,
               persistent_launch("cluster_backward", p.fwd, plan), p, plan);
  });
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
