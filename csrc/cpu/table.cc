// The entry points of one ISA build.
#include "cpu/families.h"
#include "cpu/gemm.h"
//
#include "cells/softmax.h"

namespace fusedseq {
namespace FSQ_ISA {

static Status forward(const ScanParams& p) {
  switch (p.cell) {
    case Cell::lstm:
      return lstm_forward(p);
    case Cell::gru:
      return gru_forward(p);
    case Cell::gru_reset_before:
      return gru_reset_before_forward(p);
    default:
      return rnn_forward(p);
  }
}

static Status backward(const ScanGradParams& p) {
  switch (p.fwd.cell) {
    case Cell::lstm:
      return lstm_backward(p);
    case Cell::gru:
      return gru_backward(p);
    case Cell::gru_reset_before:
      return gru_reset_before_backward(p);
    default:
      return rnn_backward(p);
  }
}

static int64_t pack(const ScanParams& p, void* const* into) {
  switch (p.cell) {
    case Cell::lstm:
      return lstm_pack(p, into);
    case Cell::gru:
      return gru_pack(p, into);
    case Cell::gru_reset_before:
      return gru_reset_before_pack(p, into);
    default:
      return rnn_pack(p, into);
  }
}

template <class S>
static void apply(int which, const S* x, S* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<S>) {
    const Vec<S> v = load_n(x + i, n - i);
    store_n(y + i, which == 0 ? sigmoid(v) : which == 1 ? FSQ_ISA::tanh(v) : FSQ_ISA::exp2(v), n - i);
  }
}

static void math(int which, DType dtype, const void* x, void* y, int64_t n) {
  if (dtype == DType::f64)
    apply(which, static_cast<const double*>(x), static_cast<double*>(y), n);
  else
    apply(which, static_cast<const float*>(x), static_cast<float*>(y), n);
}

template <class P>
static int64_t multiply_adds_of(int64_t rounds) {
  typedef typename P::Sum S;
  constexpr int kChains = tile_rows(kMaxPanel) * kMaxPanel;  // as many as a tile has
  Vec<S> acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = splat(S(i));
  const typename P::Value one[2] = {};
  const Vec<S> x = splat_word<P>(one), y = splat(S(1));
  for (int64_t r = 0; r < rounds; ++r)
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) acc[i] = multiply_add<P>(x, y, acc[i]);
  Vec<S> sum{};
  for (int i = 0; i < kChains; ++i) sum = sum + acc[i];
  volatile S keep = sum[0];
  (void)keep;
  return rounds * kChains * kLanes<S> * P::per_word * 2;
}

static int64_t multiply_adds(DType dtype, int64_t rounds) {
  if (dtype == DType::f64) return multiply_adds_of<Whole<double>>(rounds);
#if FSQ_BF16_PAIRS
  if (dtype == DType::bf16) return multiply_adds_of<Bf16Pairs>(rounds);
#endif
  return multiply_adds_of<Whole<float>>(rounds);
}

#define FSQ_NAME_(x) #x
#define FSQ_NAME(x) FSQ_NAME_(x)
extern const CpuTable table;
const CpuTable table = {FSQ_NAME(FSQ_ISA),
                        forward,
                        backward,
                        pack,
                        attention_forward,
                        attention_backward,
                        layer_norm_forward,
                        layer_norm_backward,
                        bias_activation_forward,
                        bias_activation_backward,
                        linear_forward,
                        linear_backward,
                        math,
                        multiply_adds};

}  // namespace FSQ_ISA
}  // namespace fusedseq
