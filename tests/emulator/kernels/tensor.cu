// Tensor copies: boxes of a tensor into shared memory and back.
#include "case.h"

using namespace fusedseq;

namespace {

// Copies one box of `in` to the same place of `out`, and the bytes of shared memory to `image`. Bugs: 1 the image is
// read before the mbarrier says so, 2 too few bytes expected, 3 shared memory was stored to without a proxy fence, 4 a
// destination in the middle of a swizzle's pattern, 5 the store is not waited for, 6 the box is changed before the
// store without a proxy fence, 7 the source is overwritten before the wait, 8 coordinates of another rank.
template <int Rank, int Bug>
__global__ void carry(const __grid_constant__ TensorMap from, const __grid_constant__ TensorMap to, const int* at,
                      int bytes, uint32_t* image) {
  SharedArena arena = dynamic_shared();
  const SharedSpan<uint32_t> box = arena.take<uint32_t>(bytes / 4, 1024);
  const SharedSpan<uint64_t> full = arena.take<uint64_t>(1);
  const int i = int(threadIdx.x);
  int corner[Rank];
  for (int d = 0; d < Rank; ++d) corner[d] = at[d];
  if (i == 0) {
    ptx::mbarrier_init(full.address(0), 1);
    ptx::fence_mbarrier_init();
    ptx::prefetch_tensor_map(&from);
  }
  if (Bug == 3) box.store(i, 0u);
  __syncthreads();
  if (i == 0) {
    ptx::mbarrier_arrive_expect_tx(full.address(0), uint32_t(Bug == 2 ? bytes - 16 : bytes));
    if constexpr (Bug == 8) {
      const int short_corner[] = {corner[0], corner[1]};
      ptx::tensor_load(box.address(0), &from, short_corner, full.address(0));
    } else {
      ptx::tensor_load(box.address(0) + (Bug == 4 ? 128u : 0u), &from, corner, full.address(0));
    }
  }
  if (Bug != 1)
    while (!ptx::mbarrier_try_wait(full.address(0), 0)) {
    }
  for (int k = i; k < bytes / 4; k += int(blockDim.x)) image[k] = box[k];
  if (Bug == 6) box.store(i, box[i]);
  __syncthreads();
  if (i == 0) {
    ptx::tensor_store(&to, corner, box.address(0));
    ptx::bulk_commit();
    if (Bug == 7) box.store(5, 0u);
    if (Bug != 5) ptx::bulk_wait_read<0>();
  }
  __syncthreads();
  box.store(i, 0u);
}

template <int Rank>
std::string run_carry(int bug, const Launch& launch, const TensorMap& from, const TensorMap& to, const int* at,
                      int bytes, uint32_t* image) {
  void (*const kernels[])(TensorMap, TensorMap, const int*, int, uint32_t*) = {
      carry<Rank, 0>, carry<Rank, 1>, carry<Rank, 2>, carry<Rank, 3>, carry<Rank, 4>,
      carry<Rank, 5>, carry<Rank, 6>, carry<Rank, 7>, carry<Rank, 8>};
  return run(kernels[bug], launch, from, to, at, bytes, image);
}

}  // namespace

// layout: rank, swizzle, then five each of size, stride in bytes, box, corner.
FSQ_CASE carry_case(int bug, const uint16_t* in, uint16_t* out, const int* layout, uint32_t* image) {
  BoxedTensor tensor = {};
  tensor.bf16 = true;
  tensor.rank = layout[0];
  tensor.swizzle = Swizzle(layout[1]);
  int bytes = 2;
  for (int i = 0; i < tensor.rank; ++i) {
    tensor.size[i] = uint64_t(layout[2 + i]);
    tensor.stride[i] = uint64_t(layout[7 + i]);
    tensor.box[i] = uint32_t(layout[12 + i]);
    bytes *= layout[12 + i];
  }
  TensorMap from, to;
  tensor.data = in;
  std::string error = encode(from, tensor);
  tensor.data = out;
  if (error.empty()) error = encode(to, tensor);
  if (!error.empty()) return keep(error);
  Launch launch("carry", "rank=" + std::to_string(tensor.rank), 1, 64);
  launch.shared = bytes + 16 + (bug == 4 ? 1024 : 0);
  const int* at = layout + 17;
  return keep(tensor.rank == 2   ? run_carry<2>(bug, launch, from, to, at, bytes, image)
              : tensor.rank == 3 ? run_carry<3>(bug, launch, from, to, at, bytes, image)
              : tensor.rank == 4 ? run_carry<4>(bug, launch, from, to, at, bytes, image)
                                 : run_carry<5>(bug, launch, from, to, at, bytes, image));
}
