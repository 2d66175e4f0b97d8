// Warp collectives and the tensor cores.
#include "case.h"

using namespace fusedseq;

namespace {

constexpr unsigned kAll = 0xffffffffu;

// out: of each warp its sum, in every lane. Bugs: 1 a lane has left, 2 a lane calls with a mask that lacks it, 3 the
// lanes part into different collectives.
template <int Bug>
__global__ void warp_sum(const float* in, float* out) {
  const int lane = int(ptx::lane());
  float sum = in[threadIdx.x];
  if (Bug == 1 && lane == 31) return;
  if (Bug == 3 && lane >= 16)
    sum += float(__ballot_sync(kAll, lane & 1));
  else
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(Bug == 2 ? 0xfffffffeu : kAll, sum, step);
  out[threadIdx.x] = sum;
}

// All kinds of shuffles and votes: out[kind * n + thread].
__global__ void warp_all(const float* in, float* out) {
  const int n = int(blockDim.x), i = int(threadIdx.x), lane = int(ptx::lane());
  const float x = in[i];
  float results[10];
  results[0] = __shfl_sync(kAll, x, 5);
  results[1] = __shfl_sync(kAll, x, lane + 1, 8);
  results[2] = __shfl_up_sync(kAll, x, 3);
  results[3] = __shfl_down_sync(kAll, x, 2, 16);
  results[4] = __shfl_xor_sync(kAll, x, 9);
  results[5] = float(__ballot_sync(kAll, x > 0) & 0xffff);
  results[6] = float(__any_sync(kAll, x > 1) + 2 * __all_sync(kAll, x > -100));
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  results[7] = __shfl_xor_sync(half, x, 15);
  results[8] = float(__shfl_sync(kAll, double(x), 31 - lane));
  results[9] = lane < 16 ? __shfl_down_sync(half, x, 1) : __shfl_up_sync(half, x, 1, 16);
  for (int kind = 0; kind < 10; ++kind) out[kind * n + i] = results[kind];
}

// Lanes exchange through shared memory. Bug 1: without __syncwarp.
template <int Bug>
__global__ void warp_exchange(const float* in, float* out) {
  SharedArena arena = dynamic_shared();
  const SharedSpan<float> values = arena.take<float>(int(blockDim.x));
  const int i = int(threadIdx.x);
  values.store(i, in[i]);
  if (Bug != 1) __syncwarp();
  out[i] = values[i ^ 7];
}

// One product on registers that the caller lays out: a[32][4], b[32][2], d[32][4]. type: 0 bf16, 1 f16, 2 tf32.
__global__ void fragments(int type, const uint32_t* a, const uint32_t* b, float* d) {
  const int lane = int(ptx::lane());
  uint32_t ra[4], rb[2];
  float sums[4];
  for (int i = 0; i < 4; ++i) ra[i] = a[lane * 4 + i];
  for (int i = 0; i < 2; ++i) rb[i] = b[lane * 2 + i];
  for (int i = 0; i < 4; ++i) sums[i] = d[lane * 4 + i];
  if (type == 0)
    ptx::mma_m16n8k16<__nv_bfloat16>(sums, ra, rb);
  else if (type == 1)
    ptx::mma_m16n8k16<__half>(sums, ra, rb);
  else
    ptx::mma_m16n8k8_tf32(sums, ra, rb);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = sums[i];
}

// What each lane finds in its registers: out[32][N], of N matrices of 8x8 halves in shared memory, row after row.
template <int N, bool Trans>
__global__ void load_matrices(const uint16_t* in, uint32_t* out) {
  SharedArena arena = dynamic_shared();
  const SharedSpan<uint16_t> values = arena.take<uint16_t>(N * 64);
  const int lane = int(ptx::lane());
  for (int i = lane; i < N * 64; i += 32) values.store(i, in[i]);
  __syncwarp();
  uint32_t r[N];
  ptx::ldmatrix<N, Trans>(r, values.address(lane % (8 * N) * 8));
  for (int i = 0; i < N; ++i) out[lane * N + i] = r[i];
}

// d[16,8] = a[16,16] b[8,16]^T in bf16 through ldmatrix. Bugs: 1 registers a[1] and a[2] exchanged, 2 a row past the
// end, 3 rows at odd addresses, 4 the tile is read before the warp has written it, 5 half of the warp takes part.
template <int Bug>
__global__ void tile(const __nv_bfloat16* a, const __nv_bfloat16* b, float* d) {
  SharedArena arena = dynamic_shared();
  const SharedSpan<__nv_bfloat16> sa = arena.take<__nv_bfloat16>(16 * 16), sb = arena.take<__nv_bfloat16>(8 * 16);
  const int lane = int(ptx::lane());
  for (int i = lane; i < 16 * 16; i += 32) sa.store(i, a[i]);
  for (int i = lane; i < 8 * 16; i += 32) sb.store(i, b[i]);
  if (Bug != 4) __syncwarp();
  uint32_t ra[4], rb[2];
  const int row = lane % 16, column = lane / 16 * 8;
  ptx::ldmatrix<4>(
      ra, sa.address((Bug == 1 ? lane / 16 * 8 + lane % 8 : row) * 16 + (Bug == 1 ? lane / 8 % 2 * 8 : column)) +
              (Bug == 3 ? 2u : 0u) + (Bug == 2 && lane == 31 ? 16384u : 0u));
  ptx::ldmatrix<2>(rb, sb.address(lane % 8 * 16 + lane / 8 % 2 * 8));
  float sums[4] = {};
  if (Bug != 5 || lane < 16) ptx::mma_m16n8k16<__nv_bfloat16>(sums, ra, rb);
  const int g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

// d[16,8] = a[16,8] b[8,8]^T in TF32, both rounded on their way into shared memory. Bugs: 1 A's upper and right quarter
// exchanged, 2 the terms of B exchanged, 3 units and rows of the result exchanged, 4 the operands are not rounded, so
// that the tensor core cuts them off, 5 the tile is read before the warp has written it.
template <int Bug>
__global__ void tile_tf32(const float* a, const float* b, float* d) {
  SharedArena arena = dynamic_shared();
  const SharedSpan<uint32_t> sa = arena.take<uint32_t>(16 * 8), sb = arena.take<uint32_t>(8 * 8);
  const int lane = int(ptx::lane());
  const auto operand = [](float x) { return Bug == 4 ? __float_as_uint(x) : ptx::to_tf32(x); };
  for (int i = lane; i < 16 * 8; i += 32) sa.store(i, operand(a[i]));
  for (int i = lane; i < 8 * 8; i += 32) sb.store(i, operand(b[i]));
  if (Bug != 5) __syncwarp();
  uint32_t ra[4], rb[2];
  const int low = lane / 8 % 2, high = lane / 16;
  ptx::ldmatrix<4>(ra, sa.address((lane % 8 + (Bug == 1 ? high : low) * 8) * 8 + (Bug == 1 ? low : high) * 4));
  ptx::ldmatrix<2>(rb, sb.address(lane % 8 * 8 + (Bug == 2 ? 1 - low : low) * 4));
  float sums[4] = {};
  ptx::mma_m16n8k8_tf32(sums, ra, rb);
  const int g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) {
    const int unit = g + (Bug == 3 ? i % 2 : i / 2) * 8, row = 2 * t + (Bug == 3 ? i / 2 : i % 2);
    d[unit * 8 + row] = sums[i];
  }
}

// The bits of n values rounded to TF32.
__global__ void round_tf32(const float* in, uint32_t* out) { out[threadIdx.x] = ptx::to_tf32(in[threadIdx.x]); }

}  // namespace

FSQ_CASE tile_tf32_case(int bug, const float* a, const float* b, float* d) {
  void (*const kernels[])(const float*, const float*, float*) = {tile_tf32<0>, tile_tf32<1>, tile_tf32<2>,
                                                                 tile_tf32<3>, tile_tf32<4>, tile_tf32<5>};
  Launch launch("tile_tf32", "", 1, 32);
  launch.shared = (16 + 8) * 8 * 4;
  return keep(run(kernels[bug], launch, a, b, d));
}

FSQ_CASE round_tf32_case(const float* in, uint32_t* out, int n) {
  return keep(run(round_tf32, Launch("round_tf32", "n=" + std::to_string(n), 1, unsigned(n)), in, out));
}

FSQ_CASE warp_sum_case(int bug, const float* in, float* out, int n) {
  void (*const kernels[])(const float*, float*) = {warp_sum<0>, warp_sum<1>, warp_sum<2>, warp_sum<3>};
  return keep(run(kernels[bug], Launch("warp_sum", "n=" + std::to_string(n), 1, unsigned(n)), in, out));
}

FSQ_CASE warp_all_case(const float* in, float* out, int n) {
  return keep(run(warp_all, Launch("warp_all", "n=" + std::to_string(n), 1, unsigned(n)), in, out));
}

FSQ_CASE warp_exchange_case(int bug, const float* in, float* out, int n) {
  Launch launch("warp_exchange", "n=" + std::to_string(n), 1, unsigned(n));
  launch.shared = n * 4;
  return keep(run(bug ? warp_exchange<1> : warp_exchange<0>, launch, in, out));
}

FSQ_CASE fragments_case(int type, const uint32_t* a, const uint32_t* b, float* d) {
  return keep(run(fragments, Launch("fragments", "", 1, 32), type, a, b, d));
}

FSQ_CASE load_matrices_case(int count, int transposed, const uint16_t* in, uint32_t* out) {
  void (*const kernels[2][3])(const uint16_t*, uint32_t*) = {
      {load_matrices<1, false>, load_matrices<2, false>, load_matrices<4, false>},
      {load_matrices<1, true>, load_matrices<2, true>, load_matrices<4, true>}};
  Launch launch("load_matrices", "count=" + std::to_string(count), 1, 32);
  launch.shared = count * 128;
  return keep(run(kernels[transposed][count / 2], launch, in, out));
}

FSQ_CASE tile_case(int bug, const __nv_bfloat16* a, const __nv_bfloat16* b, float* d) {
  void (*const kernels[])(const __nv_bfloat16*, const __nv_bfloat16*, float*) = {tile<0>, tile<1>, tile<2>,
                                                                                 tile<3>, tile<4>, tile<5>};
  Launch launch("tile", "", 1, 32);
  launch.shared = (16 + 8) * 16 * 2;
  return keep(run(kernels[bug], launch, a, b, d));
}
