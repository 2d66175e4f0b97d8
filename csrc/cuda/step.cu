// Tier `step`: one launch for each step, or two where a second product must follow (projection, reset before the
// product). Any H, any dtype, any device; the weights stream through the caches on every step.
//
// The caller may form the product of each step itself (StepProduct), by a library that is faster at it: then a launch
// is what is left of the step. Else the products are tiles of 16 rows x 16 units, 32 terms at a time through shared
// memory, in the compute type or, of operands rounded to TF32 as they come there, by the tensor cores. A block computes
// all gates of its units, and the thread of each (row, unit) finishes it.
//
// Kernels are templates of the operand type E; tensors, and what lies between launches, have the type Stored<E>.
#include "cuda/element.cuh"
#include "cuda/launch.h"
#include "cuda/scan.h"

namespace fusedseq {
namespace FSQ_ISA {
namespace {

constexpr int kTile = 16, kDepth = 32, kThreads = kTile * kTile;

// In shared memory an operand is widened, unless the tensor cores take it as it is; rows are then aligned to 16 bytes,
// and eight of them lie in different banks either way.
template <class E>
constexpr bool kTensorCores = std::is_same_v<E, Tf32>;
template <class E>
using Staged = std::conditional_t<kTensorCores<E>, E, Compute<E>>;
template <class E>
constexpr int kPitch = kDepth + (kTensorCores<E> ? 4 : 1);
constexpr int kTermsOfMma = 8, kTermParts = kDepth / kTermsOfMma, kPartPitch = kTile + 1;

template <class E>
FSQ_DEVICE Staged<E> stage(Stored<E> x) {
  if constexpr (kTensorCores<E>)
    return operand<E>(x);
  else
    return widen(x);
}

// What a scan keeps between launches; [2] is read in one step and written for the next.
template <class E>
struct StepMemory {
  typedef Compute<E> S;
  E* fed[2];  // forward: h [D,B,R]; backward: gate gradients that meet W_hh [D,B,kFed*H]
  E* inner;   // [D,B,H] what the second product of a step takes, in backward with a projection [D,B,R]
  S* state;   // [D,B,H] c, or h where there is no c; in backward the gradient of c
  S* carry;   // [D,B,R] backward: what reaches the state before past the products
  S* gates;   // [D,B,2H] forward, reset before the product: r and z

  int64_t carve(char* base, const CudaScanParams& p, int64_t fed_width) {
    int64_t used = 0;
    const auto take = [&](auto& pointer, int64_t count) {
      pointer = reinterpret_cast<std::decay_t<decltype(pointer)>>(base + used);
      used += (count * int64_t(sizeof(*pointer)) + 255) / 256 * 256;
    };
    const int64_t rows = p.D * p.B;
    take(fed[0], rows * fed_width);
    take(fed[1], rows * fed_width);
    take(inner, rows * (p.H > p.R ? p.H : p.R));
    take(state, rows * p.H);
    take(carry, rows * p.R);
    take(gates, rows * 2 * p.H);
    return used;
  }
};

// The same where the caller has formed them: products [D,B,N*units].
template <class S, int N>
FSQ_DEVICE void take(const void* products, const Spot& s, int64_t rows, int64_t units, S (&sums)[N]) {
  const S* const mine = static_cast<const S*>(products) + (s.d * rows + s.b) * N * units + s.u;
  FSQ_UNROLL
  for (int g = 0; g < N; ++g) sums[g] = mine[g * units];
}

// sums[g] = sum over k of a[b][k] w[g][u][k] for this thread's row b0 + tid / 16 and unit u0 + tid % 16.
template <class E>
struct Factor {
  const E* w;
  int64_t gate, unit, k;  // strides
};
template <class E, int N>
FSQ_DEVICE void multiply(const Stored<E>* a, int64_t pitch, int64_t rows, int64_t b0, Factor<Stored<E>> w,
                         int64_t units, int64_t u0, int64_t K, Compute<E> (&sums)[N]) {
  typedef Compute<E> S;
  typedef Staged<E> X;
  const X zero = stage<E>(narrow<Stored<E>>(0));
  SharedArena arena = dynamic_shared();
  const SharedSpan<X> as = arena.take<X>(kTile * kPitch<E>), ws = arena.take<X>(N * kTile * kPitch<E>);
  const int tid = int(threadIdx.x), b = tid / kTile, u = tid % kTile, warp = tid / 32, lane = tid % 32;
  // By the tensor cores: units are the M of mma.sync, rows its N. A warp has 8 of the rows and every fourth 8 terms.
  const int part = warp % kTermParts, row0 = warp / kTermParts * 8;
  float acc[N][4] = {};
  for (int g = 0; g < N; ++g) sums[g] = S(0);
  for (int64_t k0 = 0; k0 < K; k0 += kDepth) {
    for (int i = tid; i < kTile * kDepth; i += kThreads) {
      const int64_t row = b0 + i / kDepth, k = k0 + i % kDepth;
      as.store(i / kDepth * kPitch<E> + i % kDepth, row < rows && k < K ? stage<E>(a[row * pitch + k]) : zero);
    }
    for (int i = tid; i < N * kTile * kDepth; i += kThreads) {
      const int g = i / (kTile * kDepth), j = i % (kTile * kDepth);
      // Neighbouring threads take neighbouring addresses.
      const int uu = w.k == 1 ? j / kDepth : j % kTile, kk = w.k == 1 ? j % kDepth : j / kTile;
      const int64_t unit = u0 + uu, k = k0 + kk;
      const bool there = unit < units && k < K;
      ws.store((g * kTile + uu) * kPitch<E> + kk, there ? stage<E>(w.w[g * w.gate + unit * w.unit + k * w.k]) : zero);
    }
    __syncthreads();
    if constexpr (kTensorCores<E>) {
      const int k = part * kTermsOfMma;
      uint32_t bs[2];
      ptx::ldmatrix<2>(bs, as.address((row0 + lane % 8) * kPitch<E> + k + lane % 16 / 8 * 4));
      FSQ_UNROLL
      for (int g = 0; g < N; ++g) {
        uint32_t ws4[4];
        ptx::ldmatrix<4>(ws4, ws.address((g * kTile + lane % 16) * kPitch<E> + k + lane / 16 * 4));
        ptx::mma_m16n8k8_tf32(acc[g], ws4, bs);
      }
    } else {
      for (int k = 0; k < kDepth; ++k) {
        const S x = as[b * kPitch<E> + k];
        FSQ_UNROLL
        for (int g = 0; g < N; ++g) sums[g] = fma(x, ws[(g * kTile + u) * kPitch<E> + k], sums[g]);
      }
    }
    __syncthreads();
  }
  if constexpr (kTensorCores<E>) {
    const SharedSpan<float> parts = arena.take<float>(kTermParts * N * kTile * kPartPitch);
    FSQ_UNROLL
    for (int g = 0; g < N; ++g) FSQ_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int row = row0 + lane % 4 * 2 + i % 2, unit = lane / 4 + i / 2 * 8;
      parts.store(((part * N + g) * kTile + row) * kPartPitch + unit, acc[g][i]);
    }
    __syncthreads();
    FSQ_UNROLL
    for (int g = 0; g < N; ++g) FSQ_UNROLL
    for (int i = 0; i < kTermParts; ++i) sums[g] += parts[((i * N + g) * kTile + b) * kPartPitch + u];
  }
}
template <class E>
constexpr int shared_bytes(int gates) {
  const int staged = (gates + 1) * (kTile * kPitch<E> * int(sizeof(Staged<E>)) + 16);
  return staged + (kTensorCores<E> ? kTermParts * gates * kTile * kPartPitch * 4 + 16 : 0);
}

FSQ_DEVICE Spot spot(const CudaScanParams& p, int64_t t) {
  const int tid = int(threadIdx.x);
  return {int64_t(blockIdx.z), int64_t(blockIdx.y) * kTile + tid / kTile, int64_t(blockIdx.x) * kTile + tid % kTile,
          moment(p, t)};
}

template <Cell C, class E>
__global__ void __launch_bounds__(kThreads) step_begin(CudaScanParams p, StepMemory<E> m) {
  const Spot s = spot(p, 0);
  if (s.b >= p.B) return;
  if (s.u < p.R) m.fed[0][state_at(p, s, p.R)] = narrow<E>(initial<E>(p, p.h0, s, p.R));
  if (s.u < p.H)
    m.state[state_at(p, s, p.H)] = C == Cell::lstm ? initial<E>(p, p.c0, s, p.H) : initial<E>(p, p.h0, s, p.H);
}

// The new state of a row: to the next step, to y, and at the end to h_n. Rows that are not live keep the old one.
template <Cell C, class E>
FSQ_DEVICE void hand_on(const CudaScanParams& p, const StepMemory<E>& m, const Spot& s, int64_t i, bool live,
                        Compute<E> h) {
  const int64_t at = state_at(p, s, p.R);
  const E next = live ? narrow<E>(h) : m.fed[i & 1][at];
  m.fed[~i & 1][at] = next;
  if (live) Forward<C, E>::emit(p, s, h);
  if (i == p.T - 1) static_cast<E*>(p.h_n)[at] = next;
}

template <Cell C, class E>
__global__ void __launch_bounds__(kThreads)
    step_forward(CudaScanParams p, StepMemory<Stored<E>> m, int64_t i, const void* products) {
  typedef Compute<E> S;
  const Spot s = spot(p, time_of(blockIdx.z, i, p.T));
  const bool mine = s.b < p.B && s.u < p.H;
  Forward<C, Stored<E>> element;
  Bias<C, Stored<E>> bias;
  if (mine) {
    element.load(p, s, int(length_of(p, s.b)));
    bias.load(p, s.d, s.u);
  }
  S sums[kFirst<C>];
  if (products) {
    if (mine) take(products, s, p.B, p.H, sums);
  } else {
    const Factor<Stored<E>> w{static_cast<const Stored<E>*>(p.w_hh[s.d]), p.H * p.R, p.R, 1};
    multiply<E>(m.fed[i & 1] + s.d * p.B * p.R, p.R, p.B, s.b - threadIdx.x / kTile, w, p.H, s.u - threadIdx.x % kTile,
                p.R, sums);
  }
  if (!mine) return;
  const int64_t at = state_at(p, s, p.H);
  if constexpr (C == Cell::gru_reset_before) {
    const S h = m.state[at];
    S rh = S(0);
    if (element.live) {
      rh = element.gate(bias, sums, h);
      m.gates[at * 2] = element.gates[0];
      m.gates[at * 2 + 1] = element.gates[1];
    }
    m.inner[at] = narrow<Stored<E>>(rh);
  } else {
    S state = m.state[at], h = S(0);
    if (element.live) {
      h = element.finish(p, bias, sums, state);
      m.state[at] = state;
      element.save(p, s);
    }
    if (C == Cell::lstm && p.w_hr[0])
      m.inner[at] = narrow<Stored<E>>(h);
    else
      hand_on<C>(p, m, s, i, element.live, h);
    if (C == Cell::lstm && i == p.T - 1) write<Stored<E>>(p.c_n, at, state);
  }
}

// The second product of a step: h = W_hr (o tanh c), or the candidate of a GRU that resets before the product.
template <Cell C, class E>
__global__ void __launch_bounds__(kThreads) step_forward_second(CudaScanParams p, StepMemory<Stored<E>> m, int64_t i) {
  typedef Compute<E> S;
  const Spot s = spot(p, time_of(blockIdx.z, i, p.T));
  const bool mine = s.b < p.B && s.u < p.R;
  typedef Stored<E> W;
  const W* const w =
      C == Cell::lstm ? static_cast<const W*>(p.w_hr[s.d]) : static_cast<const W*>(p.w_hh[s.d]) + 2 * p.H * p.R;
  S sums[1];
  multiply<E>(m.inner + s.d * p.B * p.H, p.H, p.B, s.b - threadIdx.x / kTile, Factor<Stored<E>>{w, 0, p.H, 1}, p.R,
              s.u - threadIdx.x % kTile, p.H, sums);
  if (!mine) return;
  if constexpr (C == Cell::lstm) {
    hand_on<C>(p, m, s, i, s.when.t < length_of(p, s.b), sums[0]);
  } else {
    const int64_t at = state_at(p, s, p.H);
    Forward<C, Stored<E>> element;
    Bias<C, Stored<E>> bias;
    element.load(p, s, int(length_of(p, s.b)));
    bias.load(p, s.d, s.u);
    S h = m.state[at];
    if (element.live) {
      element.gates[0] = m.gates[at * 2];
      element.gates[1] = m.gates[at * 2 + 1];
      element.finish(p, bias, sums, h);
      m.state[at] = h;
      element.save(p, s);
    }
    hand_on<C>(p, m, s, i, element.live, h);
  }
}

template <Cell C, class E>
__global__ void __launch_bounds__(kThreads) step_backward_begin(CudaScanGradParams p, StepMemory<E> m) {
  const CudaScanParams& f = p.fwd;
  const Spot s = spot(f, 0);
  if (s.b >= f.B) return;
  if (s.u < f.R) m.carry[state_at(f, s, f.R)] = initial<E>(f, p.dh_n, s, f.R);
  if (s.u >= f.H) return;
  m.state[state_at(f, s, f.H)] = initial<E>(f, p.dc_n, s, f.H);
  for (int g = 0; g < kFed<C>; ++g) m.fed[0][((s.d * f.B + s.b) * kFed<C> + g) * f.H + s.u] = narrow<E>(0);
}

template <Cell C, class E>
FSQ_DEVICE void run_backward(const CudaScanGradParams& p, const StepMemory<E>& m, const Spot& s, int64_t turn,
                             Compute<E> dh, Compute<E>& carry) {
  typedef Compute<E> S;
  const CudaScanParams& f = p.fwd;
  Backward<C, E> element;
  element.load(p, s, int(length_of(f, s.b)));
  S fed[kGatesOf<C>] = {};
  const int64_t at = state_at(f, s, f.H);
  S dc = m.state[at];
  if (element.live) {
    element.run(p, dh, fed, dc, carry);
    m.state[at] = dc;
    element.save(p, s, C == Cell::gru_reset_before);
  }
  if constexpr (C == Cell::gru_reset_before) {
    m.inner[at] = narrow<E>(fed[0]);
    fed[0] = S(0);
  }
  for (int g = 0; g < kFed<C>; ++g) m.fed[~turn & 1][((s.d * f.B + s.b) * kFed<C> + g) * f.H + s.u] = narrow<E>(fed[g]);
}

// Step i of the forward scan backwards, in turn `turn`; i = -1 only gathers the gradients of the first states.
template <Cell C, class E>
__global__ void __launch_bounds__(kThreads)
    step_backward(CudaScanGradParams p, StepMemory<Stored<E>> m, int64_t i, int64_t turn, const void* products) {
  typedef Compute<E> S;
  const CudaScanParams& f = p.fwd;
  const bool last = i < 0, projected = C == Cell::lstm && f.w_hr[0];
  const Spot s = spot(f, last ? -1 : time_of(blockIdx.z, i, f.T));
  const bool mine = s.b < f.B && s.u < f.R;
  S sums[1];
  const int64_t K = kFed<C> * f.H;
  if (products) {
    if (mine) take(products, s, f.B, f.R, sums);
  } else {
    multiply<E>(m.fed[turn & 1] + s.d * f.B * K, K, f.B, s.b - threadIdx.x / kTile,
                Factor<Stored<E>>{static_cast<const Stored<E>*>(f.w_hh[s.d]), 0, 1, f.R}, f.R,
                s.u - threadIdx.x % kTile, K, sums);
  }
  if (!mine) return;
  const int64_t at = state_at(f, s, f.R);
  S carry = m.carry[at] + sums[0];
  const bool live = !last && s.when.t < length_of(f, s.b);
  S dh = S(0);
  if (live) {
    dh = carry;
    if (p.dy.data) dh += read<Stored<E>>(p.dy.data, row_at(f, p.dy, s) + s.d * f.R + s.u);
    carry = S(0);
  }
  if (last) {
    write<Stored<E>>(p.dh0, at, carry);
    if (C == Cell::lstm)
      for (int64_t u = s.u; u < f.H; u += f.R) {
        const int64_t cell = (s.d * f.B + s.b) * f.H + u;
        write<Stored<E>>(p.dc0, cell, m.state[cell]);
      }
    return;
  }
  if (projected) {
    m.inner[at] = narrow<Stored<E>>(dh);
    if (live) write<Stored<E>>(p.dh.data, row_at(f, p.dh, s) + s.d * f.R + s.u, dh);
  } else {
    run_backward<C>(p, m, s, turn, dh, carry);
  }
  m.carry[at] = carry;
}

template <Cell C, class E>
__global__ void __launch_bounds__(kThreads)
    step_backward_second(CudaScanGradParams p, StepMemory<Stored<E>> m, int64_t i, int64_t turn) {
  typedef Compute<E> S;
  const CudaScanParams& f = p.fwd;
  const Spot s = spot(f, time_of(blockIdx.z, i, f.T));
  const bool mine = s.b < f.B && s.u < f.H;
  const int64_t K = C == Cell::lstm ? f.R : f.H;
  typedef Stored<E> W;
  const W* const w =
      C == Cell::lstm ? static_cast<const W*>(f.w_hr[s.d]) : static_cast<const W*>(f.w_hh[s.d]) + 2 * f.H * f.R;
  S sums[1];
  multiply<E>(m.inner + s.d * f.B * K, K, f.B, s.b - threadIdx.x / kTile, Factor<Stored<E>>{w, 0, 1, f.H}, f.H,
              s.u - threadIdx.x % kTile, K, sums);
  if (!mine) return;
  if constexpr (C == Cell::lstm) {
    S past = S(0);
    run_backward<C>(p, m, s, turn, sums[0], past);
  } else {
    Backward<C, Stored<E>> element;
    element.load(p, s, int(length_of(f, s.b)));
    if (!element.live) return;
    const int64_t at = state_at(f, s, f.H);
    S carry = m.carry[at];
    const S dr = element.through_reset(sums[0], carry);
    element.save(p, s, 0, 1);
    m.carry[at] = carry;
    m.fed[~turn & 1][(s.d * f.B + s.b) * kFed<C> * f.H + s.u] = narrow<Stored<E>>(dr);
  }
}

// gates: how many sums a thread forms, 0 for a kernel without a product.
template <class E>
Launch launch_of(const char* name, const CudaScanParams& p, int64_t units, int gates) {
  const unsigned tiles = unsigned((units + kTile - 1) / kTile), rows = unsigned((p.B + kTile - 1) / kTile);
  Launch launch(name, describe(p), dim3(tiles, rows, unsigned(p.D)), dim3(kThreads));
  launch.shared = gates ? shared_bytes<E>(gates) : 0;
  launch.stream = static_cast<cudaStream_t>(p.stream);
  return launch;
}

template <Cell C, class E>
std::string forward(const CudaScanParams& p, const StepProduct& product) {
  StepMemory<Stored<E>> m;
  m.carve(static_cast<char*>(p.workspace), p, p.R);
  const int64_t widest = p.H > p.R ? p.H : p.R;
  std::string error = run(&step_begin<C, Stored<E>>, launch_of<E>("step_begin", p, widest, 0), p, m);
  const Launch first = launch_of<E>("step_forward", p, p.H, product ? 0 : kFirst<C>);
  const Launch second = launch_of<E>("step_forward_second", p, p.R, 1);
  for (int64_t i = 0; i < p.T && error.empty(); ++i) {
    error = run(&step_forward<C, E>, first, p, m, i, product ? product(i) : nullptr);
    if constexpr (C == Cell::lstm || C == Cell::gru_reset_before)
      if (error.empty() && (C == Cell::gru_reset_before || p.w_hr[0]))
        error = run(&step_forward_second<C, E>, second, p, m, i);
  }
  return error;
}

template <Cell C, class E>
std::string backward(const CudaScanGradParams& p, const StepProduct& product) {
  const CudaScanParams& f = p.fwd;
  StepMemory<Stored<E>> m;
  m.carve(static_cast<char*>(f.workspace), f, kFed<C> * f.H);
  const int64_t widest = f.H > f.R ? f.H : f.R;
  std::string error = run(&step_backward_begin<C, Stored<E>>, launch_of<E>("step_backward_begin", f, widest, 0), p, m);
  const Launch first = launch_of<E>("step_backward", f, f.R, product ? 0 : 1);
  const Launch second = launch_of<E>("step_backward_second", f, f.H, 1);
  int64_t turn = 0;
  for (int64_t i = f.T - 1; i >= -1 && error.empty(); --i, ++turn) {
    error = run(&step_backward<C, E>, first, p, m, i, turn, product ? product(turn) : nullptr);
    if constexpr (C == Cell::lstm || C == Cell::gru_reset_before)
      if (error.empty() && i >= 0 && (C == Cell::gru_reset_before || f.w_hr[0]))
        error = run(&step_backward_second<C, E>, second, p, m, i, turn);
  }
  return error;
}

}  // namespace

int64_t step_workspace(const CudaScanParams& p, bool backward, int64_t* second_fed) {
  const int64_t fed = !backward ? p.R : p.cell == Cell::gru_reset_before ? 2 * p.H : gate_count(p.cell) * p.H;
  return for_element(p.dtype, [&](auto e) {
    StepMemory<decltype(e)> m;
    const int64_t bytes = m.carve(nullptr, p, fed);
    if (second_fed) *second_fed = reinterpret_cast<intptr_t>(m.fed[1]);
    return bytes;
  });
}
std::string step_forward(const CudaScanParams& p, const StepProduct& product) {
  return for_operand(p, [&](auto e) {
    return for_cell(p.cell, [&](auto c) { return forward<decltype(c)::value, decltype(e)>(p, product); });
  });
}
std::string step_backward(const CudaScanGradParams& p, const StepProduct& product) {
  return for_operand(p.fwd, [&](auto e) {
    return for_cell(p.fwd.cell, [&](auto c) { return backward<decltype(c)::value, decltype(e)>(p, product); });
  });
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
