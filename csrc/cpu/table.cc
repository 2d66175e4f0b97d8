// The entry points of one ISA build.
#include "cpu/families.h"
#include "cpu/gemm.h"

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

template <class S>
static void apply(int which, const S* x, S* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<S>) {
    const Vec<S> v = load_n(x + i, n - i);
    store_n(y + i, which == 0 ? sigmoid(v) : FSQ_ISA::tanh(v), n - i);
  }
}

static void math(int which, DType dtype, const void* x, void* y, int64_t n) {
  if (dtype == DType::f64)
    apply(which, static_cast<const double*>(x), static_cast<double*>(y), n);
  else
    apply(which, static_cast<const float*>(x), static_cast<float*>(y), n);
}

static int64_t multiply_adds(int64_t rounds) {
  constexpr int kChains = tile_rows(kMaxPanel) * kMaxPanel;  // as many as a tile has
  VecF acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = splat(float(i));
  VecF x = splat(0.5f), y = splat(1.0f);
  for (int64_t r = 0; r < rounds; ++r)
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) acc[i] = fma(acc[i], x, y);
  VecF sum{};
  for (int i = 0; i < kChains; ++i) sum = sum + acc[i];
  volatile float keep = sum[0];
  (void)keep;
  return rounds * kChains * kLanes<float> * 2;
}

#define FSQ_NAME_(x) #x
#define FSQ_NAME(x) FSQ_NAME_(x)
extern const CpuTable table;
const CpuTable table = {FSQ_NAME(FSQ_ISA), forward, backward, math, multiply_adds};

}  // namespace FSQ_ISA
}  // namespace fusedseq
