// The states that entered the steps, for the products that make the gradient of W_hh.
#include "cuda/element.cuh"
#include "cuda/scan.h"
#include "cuda/surface.h"

namespace fusedseq {
namespace FSQ_ISA {
namespace {

constexpr int kThreads = 256;

template <class E>
__global__ void __launch_bounds__(kThreads) previous_states(CudaScanParams p, Rows into) {
  const int64_t columns = p.D * p.R, all = p.T * p.B * columns;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < all; i += int64_t(gridDim.x) * kThreads) {
    const int64_t column = i % columns, d = column / p.R;
    const Spot s{d, i / columns % p.B, column % p.R, moment(p, i / columns / p.B)};
    const int64_t t = s.when.t;
    const int64_t length = length_of(p, s.b);
    // Packed rows past their length have no place at all.
    if (t >= length && p.offsets) continue;
    E h = narrow<E>(0);
    const bool reset = p.resets.data && static_cast<const unsigned char*>(p.resets.data)[row_at(p, p.resets, s)];
    if (t < length && !reset) {
      const int64_t before = d == 1 ? t + 1 : t - 1;
      if (before >= 0 && before < length)
        h = static_cast<const E*>(p.y.data)[row_at(p, p.y, moment(p, before), s.b) + column];
      else
        h = narrow<E>(initial<E>(p, p.h0, s, p.R));
    }
    static_cast<E*>(into.data)[row_at(p, into, s) + column] = h;
  }
}

}  // namespace
}  // namespace FSQ_ISA

std::string cuda_previous(const CudaScanParams& p, const Rows& into) {
  using namespace FSQ_ISA;
  const int64_t blocks = (p.T * p.B * p.D * p.R + kThreads - 1) / kThreads;
  Launch launch("previous_states", describe(p), dim3(unsigned(blocks < 65536 ? blocks : 65536)), dim3(kThreads));
  launch.stream = static_cast<cudaStream_t>(p.stream);
  return for_element(p.dtype, [&](auto e) { return run(&previous_states<decltype(e)>, launch, p, into); });
}

}  // namespace fusedseq
