// A recurrence as csrc/cuda runs them, in little: h_t = tanh(W h_{t-1} + x_t), W in registers, h in the shared memory
// of every block of a cluster.
#include "case.h"

using namespace fusedseq;

namespace {

constexpr int kBatch = 16, kPad = 8;  // rows of a cluster; halves between rows of h, against bank conflicts
constexpr int kMaxDepth = 8;          // H / 16

// A block owns H / cluster units, a warp 16 of them. w: [H,H], x and y: [T,B,H]. Bugs: 1 no barrier after a step, 2
// none before the first remote store.
template <int Bug>
__global__ void scan(const __nv_bfloat16* w, const float* x, float* y, int T, int B, int H) {
  SharedArena arena = dynamic_shared();
  const int stride = H + kPad;
  const SharedSpan<__nv_bfloat16> h = arena.take<__nv_bfloat16>(2 * kBatch * stride);
  const int rank = int(ptx::cluster_rank()), size = int(ptx::cluster_size()), lane = int(ptx::lane());
  const int unit = (rank * int(blockDim.x) / 32 + int(threadIdx.x) / 32) * 16, g = lane / 4, t = lane % 4;
  const int first = int(blockIdx.x) / size * kBatch;

  uint32_t a[kMaxDepth][4] = {};
#pragma unroll
  for (int k = 0; k < kMaxDepth; ++k)
    if (k < H / 16)
      for (int i = 0; i < 4; ++i)
        a[k][i] = *reinterpret_cast<const uint32_t*>(w + (unit + g + i % 2 * 8) * H + k * 16 + 2 * t + i / 2 * 8);

  for (int i = int(threadIdx.x); i < kBatch * stride; i += int(blockDim.x)) h.store(i, __float2bfloat16(0.0f));
  if (Bug != 2) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  } else {
    __syncthreads();
  }
  for (int step = 0; step < T; ++step) {
    const int now = step % 2 * kBatch * stride, next = (step + 1) % 2 * kBatch * stride;
    float sums[2][4] = {};
#pragma unroll
    for (int k = 0; k < kMaxDepth; ++k) {
      if (k >= H / 16) break;
      for (int tile = 0; tile < 2; ++tile) {
        uint32_t b[2];
        ptx::ldmatrix<2>(b, h.address(now + (tile * 8 + lane % 8) * stride + k * 16 + lane / 8 % 2 * 8));
        ptx::mma_m16n8k16<__nv_bfloat16>(sums[tile], a[k], b);
      }
    }
    for (int tile = 0; tile < 2; ++tile)
      for (int i = 0; i < 4; ++i) {
        const int row = tile * 8 + 2 * t + i % 2, column = unit + g + i / 2 * 8;
        const int64_t at = (int64_t(step) * B + first + row) * H + column;
        const float value = tanhf(sums[tile][i] + x[at]);
        y[at] = value;
        for (int peer = 0; peer < size; ++peer)
          ptx::st_remote(ptx::mapa(h.address(next + row * stride + column), uint32_t(peer)), __float2bfloat16(value));
      }
    if (Bug != 1) {
      ptx::cluster_arrive();
      ptx::cluster_wait();
    }
  }
}

}  // namespace

FSQ_CASE scan_case(int bug, const __nv_bfloat16* w, const float* x, float* y, int T, int B, int H, int cluster) {
  void (*const kernels[])(const __nv_bfloat16*, const float*, float*, int, int, int) = {scan<0>, scan<1>, scan<2>};
  Launch launch("scan", "T=" + std::to_string(T) + " B=" + std::to_string(B) + " H=" + std::to_string(H),
                unsigned(B / kBatch * cluster), unsigned(H / cluster / 16 * 32));
  launch.cluster = cluster;
  launch.shared = 2 * kBatch * (H + kPad) * 2;
  return keep(run(kernels[bug], launch, w, x, y, T, B, H));
}
