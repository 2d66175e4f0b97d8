// Tier `block`: one CTA holds all weights of a direction. Small H; no CTA waits for another.
#include "cuda/persistent.cuh"

namespace fusedseq {
namespace FSQ_ISA {

int block_bytes(const CudaScanParams& p, const CudaPlan& plan, bool backward) {
  return for_shape(p, plan, [&](auto c, auto e, auto shape) {
    return persistent_bytes<decltype(c)::value, decltype(e), BlockChannel, decltype(shape)>(plan, backward);
  });
}

std::string block_forward(const CudaScanParams& p, const CudaPlan& plan) {
  return for_shape(p, plan, [&](auto c, auto e, auto shape) {
    return run(&persistent_forward<decltype(c)::value, decltype(e), BlockChannel, decltype(shape)>,
               persistent_launch("block_forward", p, plan), p, plan);
  });
}

std::string block_backward(const CudaScanGradParams& p, const CudaPlan& plan) {
  return for_shape(p.fwd, plan, [&](auto c, auto e, auto shape) {
    return run(&persistent_backward<decltype(c)::value, decltype(e), BlockChannel, decltype(shape)>,
               persistent_launch("block_backward", p.fwd, plan), p, plan);
  });
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
