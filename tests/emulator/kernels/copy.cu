// cp.async of one block.
#include "case.h"

using namespace fusedseq;

namespace {

// out[i] = sum over tiles of in[tile * n + i], n the block's size, the next tile on its way while this one is summed.
// Bugs: 1 no wait, 2 a wait that leaves the tile itself pending, 3 no barrier after the wait, 4 no barrier before the
// buffer is filled again, 5 a misaligned source, 6 a destination out of bounds.
template <int Bug>
__global__ void pipeline(const float* in, float* out, int tiles, int total) {
  SharedArena arena = dynamic_shared();
  const int n = int(blockDim.x), i = int(threadIdx.x);
  const SharedSpan<float> buffer = arena.take<float>(2 * n);
  const auto fetch = [&](int tile) {
    const int first = tile * n + i * 4;
    if (i < n / 4 && tile < tiles) {
      const int valid = max(0, min(4, total - first)) * 4;
      const uint32_t to = buffer.address(tile % 2 * n + i * 4) + (Bug == 6 && tile == 1 && i == n / 4 - 1 ? 16u : 0u);
      ptx::cp_async<16>(to, in + (valid ? first : 0) + (Bug == 5 ? 1 : 0), valid);
    }
    ptx::cp_async_commit();
  };
  float sum = 0;
  fetch(0);
  for (int tile = 0; tile < tiles; ++tile) {
    fetch(tile + 1);
    if (Bug == 2) ptx::cp_async_wait<2>();
    if (Bug != 1 && Bug != 2) ptx::cp_async_wait<1>();
    if (Bug != 3) __syncthreads();
    sum += buffer[tile % 2 * n + (i + 5) % n];
    if (Bug != 4) __syncthreads();
  }
  out[(i + 5) % n] = sum;
}

}  // namespace

FSQ_CASE pipeline_case(int bug, const float* in, float* out, int n, int tiles, int total) {
  void (*const kernels[])(const float*, float*, int, int) = {pipeline<0>, pipeline<1>, pipeline<2>, pipeline<3>,
                                                             pipeline<4>, pipeline<5>, pipeline<6>};
  Launch launch("pipeline", "n=" + std::to_string(n), 1, unsigned(n));
  launch.shared = n * 8;
  return keep(run(kernels[bug], launch, in, out, tiles, total));
}
