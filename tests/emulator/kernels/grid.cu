// Blocks that exchange through global memory and flags.
#include "case.h"

using namespace fusedseq;

namespace {

// A chain: block b waits for flag b - 1, adds its values to the row that block b - 1 left, and raises flag b.
// Bugs: 1 the flag is raised without a release, 2 awaited without an acquire, 3 raised before the block is done, 4
// never raised by block 1, 5 a store past the end, 6 relaxed flags with a fence on one side only. Variant 10: relaxed
// flags with fences on both sides, which is right too; 11: atomics as flags.
template <int Variant>
__global__ void chain(const float* in, float* rows, uint32_t* flags) {
  const int n = int(blockDim.x), i = int(threadIdx.x), b = int(blockIdx.x);
  const GlobalSpan<float> exchange(rows, int64_t(n) * gridDim.x);
  float sum = in[b * n + i];
  if (b > 0) {
    if (i == 0) {
      if (Variant == 2 || Variant == 6 || Variant == 10)
        while (ptx::ld_relaxed(flags + b - 1) == 0) ptx::nanosleep(20);
      else if (Variant == 11)
        while (ptx::atom_add_acq_rel(flags + b - 1, 0) == 0) ptx::nanosleep(20);
      else
        while (ptx::ld_acquire(flags + b - 1) == 0) ptx::nanosleep(20);
      if (Variant == 10) ptx::fence_acq_rel_gpu();
    }
    __syncthreads();
    sum += exchange.load((b - 1) * n + i);
  }
  exchange.store(b * n + i + (Variant == 5 ? n : 0), sum);
  if (Variant != 3) __syncthreads();
  if (i == 0 && !(Variant == 4 && b == 1)) {
    if (Variant == 6 || Variant == 10) ptx::fence_acq_rel_gpu();
    if (Variant == 1 || Variant == 6 || Variant == 10)
      ptx::st_relaxed(flags + b, 1u);
    else if (Variant == 11)
      ptx::red_release_add(flags + b, 1);
    else
      ptx::st_release(flags + b, 1u);
  }
}

// Waits for a flag that nobody raises, gives up after a second and says so in out[0].
__global__ void impatient(const uint32_t* flag, float* out) {
  const uint64_t start = ptx::globaltimer();
  bool late = false;
  while (ptx::ld_acquire(flag) == 0 && !late) late = ptx::globaltimer() - start > 1000000000u;
  if (late) out[threadIdx.x] = 1;
}

// sums[0] += every value, by atomics.
__global__ void accumulate(const float* in, float* sums, int* counts) {
  SharedArena arena = dynamic_shared();
  const SharedSpan<float> partial = arena.take<float>(1);
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (threadIdx.x == 0) partial.store(0, 0.0f);
  __syncthreads();
  atomicAdd(partial.pointer(0), in[i]);
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(sums, partial[0]);
  atomicMax(counts, i);
  atomicAdd(counts + 1, 1);
}

}  // namespace

FSQ_CASE chain_case(int variant, const float* in, float* rows, uint32_t* flags, int n, int grid, int cooperative) {
  void (*const kernels[])(const float*, float*, uint32_t*) = {chain<0>, chain<1>, chain<2>,  chain<3>,
                                                              chain<4>, chain<5>, chain<6>,  chain<0>,
                                                              chain<0>, chain<0>, chain<10>, chain<11>};
  Launch launch("chain", "n=" + std::to_string(n), unsigned(grid), unsigned(n));
  launch.cooperative = cooperative != 0;
  return keep(run(kernels[variant], launch, in, rows, flags));
}

FSQ_CASE impatient_case(const uint32_t* flag, float* out) {
  return keep(run(impatient, Launch("impatient", "", 1, 32), flag, out));
}

FSQ_CASE accumulate_case(const float* in, float* sums, int* counts, int n, int grid) {
  Launch launch("accumulate", "", unsigned(grid), unsigned(n));
  launch.shared = 16;
  return keep(run(accumulate, launch, in, sums, counts));
}
