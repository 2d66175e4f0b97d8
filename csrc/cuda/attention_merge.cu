// Merges the parts of keys that attention_forward has left of few rows, in their order: a warp for each row.
#include "cuda/attention.h"
#include "cuda/attention_scores.cuh"
#include "cuda/surface.h"

namespace fusedseq {
namespace FSQ_ISA {
namespace {

constexpr int kWarps = 4, kWidest = 256;

template <class E>
__global__ void __launch_bounds__(32 * kWarps) attention_merge(const __grid_constant__ CudaAttentionParams c) {
  const AttentionParams& p = c.a;
  const int64_t rows = p.B * p.Hq * p.L, row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int lane = int(ptx::lane());
  if (row >= rows) return;
  float sums[kWidest / 32] = {};
  float top = -infinity(), total = 0;
  for (int64_t part = 0; part < c.parts; ++part) {
    const int64_t at = part * rows + row;
    const float its_top = c.part_top[at], now = ::fmaxf(top, its_top), base = now == -infinity() ? 0.0f : now;
    const float mine = ptx::exp2_approx(top - base), its = ptx::exp2_approx(its_top - base);
    total = fma(total, mine, c.part_total[at] * its);
    FSQ_UNROLL
    for (int i = 0; i < kWidest / 32; ++i) {
      const int e = 32 * i + lane;
      if (e < p.Ev) sums[i] = fma(sums[i], mine, c.part_out[at * p.Ev + e] * its);
    }
    top = now;
  }
  const int64_t i = row % p.L, h = row / p.L % p.Hq, b = row / p.L / p.Hq;
  const RowEnd end(p, int(h), top, total);
  if (lane == 0) static_cast<float*>(p.lse)[row] = end.lse;
  E* const out = static_cast<E*>(p.out.data) + b * p.out.sb + h * p.out.sh + i * p.out.sn;
  FSQ_UNROLL
  for (int n = 0; n < kWidest / 32; ++n) {
    const int e = 32 * n + lane;
    if (e < p.Ev) out[e] = narrow<E>(sums[n] * end.factor);
  }
}

template <class E>
std::string launch(const CudaAttentionParams& c) {
  const int64_t rows = c.a.B * c.a.Hq * c.a.L;
  Launch launch("attention_merge", describe(c.a), dim3(unsigned(tiles_of(rows, kWarps))), dim3(32 * kWarps));
  launch.stream = static_cast<cudaStream_t>(c.stream);
  return run(&attention_merge<E>, launch, c);
}

}  // namespace

std::string attention_merge_parts(const CudaAttentionParams& c) {
  return c.a.dtype == DType::bf16 ? launch<__nv_bfloat16>(c) : launch<__half>(c);
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
