// Barriers and shared memory of one block.
#include "case.h"

using namespace fusedseq;

namespace {

// out[i] = in[n - 1 - i] through shared memory.
enum Reverse { kRight, kMissingBarrier, kOutOfBounds, kMisaligned, kDivergent, kExited, kPastEnd };

template <int Bug>
__global__ void reverse(const float* in, float* out) {
  SharedArena arena = dynamic_shared();
  const int n = int(blockDim.x), i = int(threadIdx.x);
  const SharedSpan<float> values = arena.take<float>(n);
  if (Bug == kExited && i == 0) return;
  values.store(Bug == kOutOfBounds ? i + 1 : i, in[i]);
  if (Bug == kDivergent && i >= n / 2)
    ptx::barrier_sync(1, n);
  else if (Bug != kMissingBarrier)
    __syncthreads();
  out[i] = Bug == kMisaligned ? values.load<float2>(n - 1 - i).x : values[n - 1 - i];
  if (Bug == kPastEnd) out[i] = values.load<float4>(n - 4 + (i == 0) * 4).x;
}

}  // namespace

FSQ_CASE reverse_case(int bug, const float* in, float* out, int n) {
  void (*const kernels[])(const float*, float*) = {reverse<0>, reverse<1>, reverse<2>, reverse<3>,
                                                   reverse<4>, reverse<5>, reverse<6>};
  Launch launch("reverse", "n=" + std::to_string(n), 1, unsigned(n));
  launch.shared = n * 4;
  return keep(run(kernels[bug], launch, in, out));
}
