// Attention's backward pass: what each row needs before the products, and what each head sums up after them.
#include "cuda/attention_backward.h"
#include "cuda/attention_scores.cuh"
#include "cuda/surface.h"

namespace fusedseq {
namespace FSQ_ISA {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

template <class E>
__global__ void __launch_bounds__(kThreads) attention_delta_kernel(const __grid_constant__ CudaAttentionGradParams g) {
  const AttentionParams& p = g.fwd.a;
  const int lane = int(ptx::lane());
  const int64_t all = p.B * p.Hq * p.L;
  for (int64_t n = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; n < all; n += int64_t(gridDim.x) * kWarps) {
    const int64_t i = n % p.L, h = n / p.L % p.Hq, b = n / p.L / p.Hq;
    const E* const out = static_cast<const E*>(p.out.data) + b * p.out.sb + h * p.out.sh + i * p.out.sn;
    const E* const dout = static_cast<const E*>(g.dout.data) + b * g.dout.sb + h * g.dout.sh + i * g.dout.sn;
    float sum = 0;
    for (int64_t e = lane; e < p.Ev; e += 32) sum = fma(widen(out[e]), widen(dout[e]), sum);
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane != 0) continue;
    const float lse = static_cast<const float*>(p.lse)[n];
    const bool nothing = lse == -infinity();
    if (g.dlse) sum -= static_cast<const float*>(g.dlse)[n];
    g.lse2[n] = nothing ? infinity() : lse * float(kLog2e);
    g.delta[n] = nothing ? 0.0f : sum;
  }
}

// A CTA owns a head; every thread sums its rows in order, and the sums of threads are added up pairwise.
__global__ void __launch_bounds__(kThreads) attention_heads_kernel(const __grid_constant__ CudaAttentionGradParams g) {
  const AttentionParams& p = g.fwd.a;
  SharedArena arena = dynamic_shared();
  const SharedSpan<float2> sums = arena.take<float2>(kThreads);
  const int thread = int(threadIdx.x);
  const int64_t h = int64_t(blockIdx.x);
  const float sink = g.dsinks ? static_cast<const float*>(p.sinks)[h] * float(kLog2e) : 0.0f;
  float2 sum = make_float2(0.0f, 0.0f);
  for (int64_t b = 0; b < p.B; ++b)
    for (int64_t i = thread; i < p.L; i += kThreads) {
      const int64_t at = (b * p.Hq + h) * p.L + i;
      if (g.dalibi) sum.x -= g.slopes[at];
      if (g.dsinks) sum.y = fma(-ptx::exp2_approx(sink - g.lse2[at]), g.delta[at], sum.y);
    }
  sums.store(thread, sum);
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) {
      const float2 other = sums[thread + half];
      sum = make_float2(sum.x + other.x, sum.y + other.y);
      sums.store(thread, sum);
    }
  }
  if (thread == 0 && g.dalibi) static_cast<float*>(g.dalibi)[h] = sum.x;
  if (thread == 0 && g.dsinks) static_cast<float*>(g.dsinks)[h] = sum.y;
}

}  // namespace

std::string attention_delta(const CudaAttentionGradParams& g) {
  const AttentionParams& p = g.fwd.a;
  const int64_t blocks = tiles_of(p.B * p.Hq * p.L, kWarps);
  if (blocks == 0) return "";
  Launch launch("attention_delta", describe(p), dim3(unsigned(blocks < 65536 ? blocks : 65536)), dim3(kThreads));
  launch.stream = static_cast<cudaStream_t>(g.fwd.stream);
  if (p.dtype == DType::bf16) return run(&attention_delta_kernel<__nv_bfloat16>, launch, g);
  return run(&attention_delta_kernel<__half>, launch, g);
}

std::string attention_backward_heads(const CudaAttentionGradParams& g) {
  Launch launch("attention_backward_heads", describe(g.fwd.a), dim3(unsigned(g.fwd.a.Hq)), dim3(kThreads));
  launch.shared = kThreads * int(sizeof(float2));
  launch.stream = static_cast<cudaStream_t>(g.fwd.stream);
  return run(&attention_heads_kernel, launch, g);
}

}  // namespace FSQ_ISA

namespace {

using namespace FSQ_ISA;

// With the kernels `queries` and `keys`, each called with what it needs.
template <class Queries, class Keys>
std::string backward(const CudaAttentionGradParams& g, Queries queries, Keys keys) {
  if (g.fwd.a.Hq == 0 || g.fwd.a.Hkv == 0) return "";
  std::string error = attention_delta(g);
  if (error.empty() && (g.dq.data || g.dalibi)) error = queries(g);
  if (error.empty() && (g.dk.data || g.dv.data)) error = keys(g);
  if (error.empty() && g.dbias.data) error = attention_backward_bias(g);
  if (error.empty() && (g.dalibi || g.dsinks)) error = attention_backward_heads(g);
  return error;
}

}  // namespace

std::string cuda_attention_backward(const CudaAttentionGradParams& g) {
  return backward(g, attention_backward_queries, attention_backward_keys);
}

std::string cuda_attention_backward_hopper_refuses(const CudaAttentionGradParams& g) {
  const AttentionParams& p = g.fwd.a;
  const std::string reason = cuda_attention_hopper_refuses(g.fwd);
  if (!reason.empty()) return reason;
  if (!boxes(g.dout, p.L, p.Hq, p.B)) return "dout has rows at multiples of 16 bytes and is not expanded";
  return p.S * p.B * p.Hkv > int64_t(1) << 30 ? "it counts keys of all heads in 32 bits" : "";
}

std::string cuda_attention_backward_hopper(const CudaAttentionGradParams& g) {
  const std::string reason = cuda_attention_backward_hopper_refuses(g);
  if (!reason.empty()) return "the Hopper kernels do not take this call: " + reason;
  Device device;
  const std::string error = query(device);
  if (!error.empty()) return error;
  const auto on_device = [&](auto kernel) {
    return [&, kernel](const CudaAttentionGradParams& g) { return kernel(g, device.sm_count); };
  };
  return backward(g, on_device(attention_hopper_queries), on_device(attention_hopper_keys));
}

int cuda_attention_backward_bytes(const AttentionParams& p) {
  const int queries = attention_backward_queries_bytes(p), keys = attention_backward_keys_bytes(p);
  const int bias = p.bias.data ? attention_backward_bias_bytes(p) : 0;
  return most(most(queries, keys), bias);
}

}  // namespace fusedseq
