// wgmma: one warpgroup, or two with the registers moved between them.
#include "case.h"

using namespace fusedseq;

namespace {

// An image of shared memory, and descriptors into it: offset, leading, stride in bytes, swizzle.
struct Operands {
  const uint4* image;
  int chunks;
  int a[3], b[3];
  Swizzle swizzle;
};

FSQ_DEVICE uint64_t descriptor(const SharedSpan<uint4>& image, const int (&where)[3], Swizzle swizzle) {
  return ptx::matrix_descriptor(image.address(0) + uint32_t(where[0]), uint32_t(where[1]), uint32_t(where[2]), swizzle);
}

FSQ_DEVICE SharedSpan<uint4> load_image(const uint4* from, int chunks) {
  SharedArena arena = dynamic_shared();
  const SharedSpan<uint4> image = arena.take<uint4>(chunks);
  for (int i = int(threadIdx.x); i < chunks; i += int(blockDim.x)) image.store(i, from[i]);
  ptx::fence_proxy_async();
  __syncthreads();
  return image;
}

// d[thread][i] += one product, with both operands from an image that the host has laid out.
template <class T, int N, ptx::Major MajorA, ptx::Major MajorB>
__global__ void one_product(Operands operands, int accumulate, float* d) {
  const SharedSpan<uint4> image = load_image(operands.image, operands.chunks);
  float sums[N / 2];
  for (int i = 0; i < N / 2; ++i) sums[i] = d[int(threadIdx.x) * (N / 2) + i];
  ptx::wgmma_fence(sums);
  ptx::wgmma<T, MajorB, MajorA>(sums, descriptor(image, operands.a, operands.swizzle),
                                descriptor(image, operands.b, operands.swizzle), accumulate != 0);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>(sums);
  for (int i = 0; i < N / 2; ++i) d[int(threadIdx.x) * (N / 2) + i] = sums[i];
}

// The same with A in registers that the host has filled: a[thread][4].
template <class T, int N, ptx::Major MajorB>
__global__ void register_product(Operands operands, const uint32_t* a, float* d) {
  const SharedSpan<uint4> image = load_image(operands.image, operands.chunks);
  float sums[N / 2];
  uint32_t left[4];
  for (int i = 0; i < N / 2; ++i) sums[i] = d[int(threadIdx.x) * (N / 2) + i];
  for (int i = 0; i < 4; ++i) left[i] = a[int(threadIdx.x) * 4 + i];
  ptx::wgmma_fence(sums, left);
  ptx::wgmma<T, MajorB>(sums, left, descriptor(image, operands.b, operands.swizzle), true);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>(sums);
  for (int i = 0; i < N / 2; ++i) d[int(threadIdx.x) * (N / 2) + i] = sums[i];
}

// d[64,64] = sum over steps of a[step][64,64] b[step][64,64]^T through two buffers, the first of two chained products
// from shared memory, the second with A in registers: d = (a b^T) rounded to bfloat16, times b, summed up. Bugs: 1 no
// wgmma_fence, 2 sums read before the wait, 3 the next tile is stored before the wait, 4 no proxy fence, 5 no barrier
// after the stores, 6 a warp stays away, 7 no commit, 8 A is written before the wait, 9 A is written after the fence,
// 10 a wait that leaves the group pending, 11 descriptors that differ, 12 the wait does not name the sums, 13 sums
// written in flight, 14 leaves without a wait, 15 an operand past the end of shared
// memory, 16 the sums are waited for, but read before.
template <int Bug>
__global__ void chained(const __nv_bfloat16* a, const __nv_bfloat16* b, float* d, int steps) {
  SharedArena arena = dynamic_shared();
  constexpr int kTile = 64 * 64;
  const SharedSpan<__nv_bfloat16> left = arena.take<__nv_bfloat16>(2 * kTile, 1024);
  const SharedSpan<__nv_bfloat16> right = arena.take<__nv_bfloat16>(2 * kTile, 1024);
  const int i = int(threadIdx.x);
  const auto fetch = [&](int step) {
    for (int k = i; k < kTile / 8; k += 128) {
      const int row = k / 8, chunk = k % 8, to = step % 2 * kTile + row * 64 + (chunk ^ row % 8) * 8;
      left.store(to, reinterpret_cast<const uint4*>(a)[step * kTile / 8 + k]);
      right.store(to, reinterpret_cast<const uint4*>(b)[step * kTile / 8 + k]);
    }
    if (Bug != 4) ptx::fence_proxy_async();
  };
  const auto tile = [&](const SharedSpan<__nv_bfloat16>& of, int step, int bytes) {
    return ptx::matrix_descriptor(of.address(step % 2 * kTile) + uint32_t(bytes), 16, 1024, Swizzle::bytes128);
  };
  float sums[32] = {}, scores[32];
  uint32_t packed[4][4];
  fetch(0);
  for (int step = 0; step < steps; ++step) {
    if (Bug != 5) __syncthreads();
    if (Bug == 6 && i >= 96) break;
    if (Bug != 1) ptx::wgmma_fence(scores);
    const uint32_t past = Bug == 15 ? 65536u : Bug == 11 && i == 77 ? 32u : 0u;
    for (int k = 0; k < 4; ++k)
      ptx::wgmma<__nv_bfloat16>(scores, tile(left, step, 32 * k), tile(right, step, 32 * k + int(past)), k > 0);
    if (Bug != 7) ptx::wgmma_commit();
    if (Bug == 10)
      ptx::wgmma_wait<1>(scores);
    else if (Bug != 2 && Bug != 16)
      ptx::wgmma_wait<0>(scores);
    for (int k = 0; k < 4; ++k)
      for (int r = 0; r < 4; ++r) {
        const __nv_bfloat16 low(scores[8 * k + 2 * r]), high(scores[8 * k + 2 * r + 1]);
        packed[k][r] = uint32_t(__bfloat16_as_ushort(low)) | uint32_t(__bfloat16_as_ushort(high)) << 16;
      }
    if (Bug == 16) ptx::wgmma_wait<0>(scores);
    ptx::wgmma_fence(sums, packed);
    if (Bug == 9) packed[1][2] ^= 1u;
    for (int k = 0; k < 4; ++k)
      ptx::wgmma<__nv_bfloat16, ptx::Major::mn>(sums, packed[k], tile(right, step, 2048 * k), true);
    ptx::wgmma_commit();
    if (Bug == 8) packed[3][0] = 0;
    if (Bug == 13) sums[5] = 1.0f;
    if (Bug == 3 && step + 2 < steps) fetch(step + 2);
    if (Bug == 14 && step == steps - 1) return;
    if (Bug == 12)
      ptx::wgmma_wait<0>();
    else
      ptx::wgmma_wait<0>(sums);
    if (step + 1 < steps) fetch(step + 1);
  }
  for (int k = 0; k < 32; ++k) d[i * 32 + k] = sums[k];
}

// Three warpgroups, as __launch_bounds__(384, 1) lets them begin with 168 registers each; one gives up, the others
// take. out[group] = 1 when it is through. Bugs: 1 more than there is, 2 an increase to fewer, 3 a warp stays away.
template <int Bug>
__global__ void __launch_bounds__(384, 1) move_registers(float* out) {
  const int group = int(threadIdx.x) / 128;
  if (group == 0) {
    if (Bug == 3 && threadIdx.x >= 96) return;
    if (Bug == 1)
      ptx::setmaxnreg_dec<40>();
    else
      ptx::setmaxnreg_dec<24>();
  } else {
    if (Bug == 2)
      ptx::setmaxnreg_inc<160>();
    else
      ptx::setmaxnreg_inc<240>();
  }
  if (threadIdx.x % 128 == 0) out[group] = 1.0f;
}

template <class T, int N>
std::string run_product(int majors, const Launch& launch, const Operands& operands, int accumulate, float* d) {
  constexpr ptx::Major k = ptx::Major::k, mn = ptx::Major::mn;
  void (*const kernels[])(Operands, int, float*) = {one_product<T, N, k, k>, one_product<T, N, mn, k>,
                                                    one_product<T, N, k, mn>, one_product<T, N, mn, mn>};
  return run(kernels[majors], launch, operands, accumulate, d);
}

}  // namespace

// layout: a offset, leading, stride, b the same, swizzle, type (0 bf16, 1 f16), N, A's major + 2 B's major, accumulate.
FSQ_CASE one_product_case(const uint4* image, int chunks, const int* layout, float* d) {
  const Operands operands = {
      image, chunks, {layout[0], layout[1], layout[2]}, {layout[3], layout[4], layout[5]}, Swizzle(layout[6])};
  const int type = layout[7], n = layout[8], majors = layout[9], accumulate = layout[10];
  Launch launch("one_product", "N=" + std::to_string(n), 1, 128);
  launch.shared = chunks * 16;
  if (type) return keep(run_product<__half, 64>(majors, launch, operands, accumulate, d));
  return keep(n == 8     ? run_product<__nv_bfloat16, 8>(majors, launch, operands, accumulate, d)
              : n == 64  ? run_product<__nv_bfloat16, 64>(majors, launch, operands, accumulate, d)
              : n == 128 ? run_product<__nv_bfloat16, 128>(majors, launch, operands, accumulate, d)
                         : run_product<__nv_bfloat16, 256>(majors, launch, operands, accumulate, d));
}

FSQ_CASE register_product_case(const uint4* image, int chunks, const int* layout, const uint32_t* a, float* d) {
  const Operands operands = {image, chunks, {}, {layout[3], layout[4], layout[5]}, Swizzle(layout[6])};
  Launch launch("register_product", "", 1, 128);
  launch.shared = chunks * 16;
  constexpr ptx::Major k = ptx::Major::k, mn = ptx::Major::mn;
  void (*const kernels[2][2])(Operands, const uint32_t*, float*) = {
      {register_product<__nv_bfloat16, 64, k>, register_product<__nv_bfloat16, 64, mn>},
      {register_product<__half, 64, k>, register_product<__half, 64, mn>}};
  return keep(run(kernels[layout[7]][layout[9] / 2], launch, operands, a, d));
}

FSQ_CASE chained_case(int bug, const __nv_bfloat16* a, const __nv_bfloat16* b, float* d, int steps) {
  void (*const kernels[])(const __nv_bfloat16*, const __nv_bfloat16*, float*, int) = {
      chained<0>, chained<1>,  chained<2>,  chained<3>,  chained<4>,  chained<5>,  chained<6>,  chained<7>, chained<8>,
      chained<9>, chained<10>, chained<11>, chained<12>, chained<13>, chained<14>, chained<15>, chained<16>};
  Launch launch("chained", "steps=" + std::to_string(steps), 1, 128);
  launch.shared = 4 * 64 * 64 * 2;
  return keep(run(kernels[bug], launch, a, b, d, steps));
}

FSQ_CASE move_registers_case(int bug, float* out) {
  void (*const kernels[])(float*) = {move_registers<0>, move_registers<1>, move_registers<2>, move_registers<3>};
  return keep(run(kernels[bug], Launch("move_registers", "", 1, 384), out));
}
