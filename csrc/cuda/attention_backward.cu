// Attention's backward pass: what each row needs before the products, and what each head sums up after them.
#include "cuda/attention_backward.h"
#include "cuda/attention_scores.cuh"
#include "cuda/surface.h"

namespace fusedseq {
namespace FSQ_ISA {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// The lanes of a warp that work on a row of `Ev` elements, 8 or, if rows are not aligned, one of them at a time.
constexpr int kWide = 8;

// This lane's part of the product of two rows, lane `part` of T.
template <class E, int T, bool WIDE>
FSQ_DEVICE float dot(const E* a, const E* b, int part, int64_t Ev) {
  float sum = 0;
  if constexpr (WIDE) {
    if (part * kWide >= Ev) return sum;
    const uint4 both[2] = {reinterpret_cast<const uint4*>(a)[part], reinterpret_cast<const uint4*>(b)[part]};
    E x[kWide], y[kWide];
    memcpy(static_cast<void*>(x), &both[0], sizeof x);
    memcpy(static_cast<void*>(y), &both[1], sizeof y);
    FSQ_UNROLL
    for (int e = 0; e < kWide; ++e) sum = fma(widen(x[e]), widen(y[e]), sum);
  } else {
    for (int64_t e = part; e < Ev; e += T) sum = fma(widen(a[e]), widen(b[e]), sum);
  }
  return sum;
}

// A warp takes 32 rows of a head, 32 / T side by side, and loads a few turns ahead; in the end every lane has the sum
// of one row.
template <class E, int T, bool WIDE>
__global__ void __launch_bounds__(kThreads) attention_delta_kernel(const __grid_constant__ CudaAttentionGradParams g) {
  constexpr int kBeside = 32 / T, kAhead = 4;
  const AttentionParams& p = g.fwd.a;
  const int lane = int(ptx::lane()), part = lane % T, beside = lane / T;
  const int64_t tiles = tiles_of(p.L, 32), all = p.B * p.Hq * tiles;
  for (int64_t n = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; n < all; n += int64_t(gridDim.x) * kWarps) {
    const int64_t pair = n / tiles, first = n % tiles * 32, b = pair / p.Hq, h = pair % p.Hq;
    const E* const out = static_cast<const E*>(p.out.data) + b * p.out.sb + h * p.out.sh;
    const E* const dout = static_cast<const E*>(g.dout.data) + b * g.dout.sb + h * g.dout.sh;
    float mine = 0;
    for (int turn = 0; turn < T && first + turn * kBeside < p.L; turn += kAhead) {
      float sums[kAhead];
      FSQ_UNROLL
      for (int a = 0; a < kAhead; ++a) {
        int64_t i = first + (turn + a) * kBeside + beside;
        if (i >= p.L) i = p.L - 1;  // computed and left
        sums[a] = dot<E, T, WIDE>(out + i * p.out.sn, dout + i * g.dout.sn, part, p.Ev);
      }
      FSQ_UNROLL
      for (int a = 0; a < kAhead; ++a) {
        FSQ_UNROLL
        for (int step = T / 2; step > 0; step /= 2) sums[a] += __shfl_xor_sync(0xffffffffu, sums[a], step);
        if (part == turn + a) mine = sums[a];
      }
    }
    const int64_t i = first + part * kBeside + beside, at = pair * p.L + i;
    if (i >= p.L) continue;
    const float lse = static_cast<const float*>(p.lse)[at];
    const bool nothing = lse == -infinity();
    if (g.dlse) mine -= static_cast<const float*>(g.dlse)[at];
    g.lse2[at] = nothing ? infinity() : lse * float(kLog2e);
    g.delta[at] = nothing ? 0.0f : mine;
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
  const int64_t blocks = tiles_of(p.B * p.Hq * tiles_of(p.L, 32), kWarps), limit = int64_t(1) << 20;
  if (blocks == 0) return "";
  Launch launch("attention_delta", describe(p), dim3(unsigned(blocks < limit ? blocks : limit)), dim3(kThreads));
  launch.stream = static_cast<cudaStream_t>(g.fwd.stream);
  const auto start = [&](auto e) {
    typedef decltype(e) E;
    if (p.Ev % kWide || !aligned(p.out) || !aligned(g.dout))
      return run(&attention_delta_kernel<E, 32, false>, launch, g);
    if (p.Ev <= 8 * kWide) return run(&attention_delta_kernel<E, 8, true>, launch, g);
    if (p.Ev <= 16 * kWide) return run(&attention_delta_kernel<E, 16, true>, launch, g);
    if (p.Ev <= 32 * kWide) return run(&attention_delta_kernel<E, 32, true>, launch, g);
    return run(&attention_delta_kernel<E, 32, false>, launch, g);
  };
  return p.dtype == DType::bf16 ? start(__nv_bfloat16()) : start(__half());
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
