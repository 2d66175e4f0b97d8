// The loop that all products spend their time in.
#pragma once
#include "cpu/gemm.h"

namespace fusedseq {
namespace FSQ_ISA {

struct Nothing {
  inline __attribute__((always_inline)) void operator()() const {}
};

// acc[r][v] += sum_k a[r * row + k * step] * b[k * pitch][v] over K words, and `each` besides at every word.
template <class P, int NV, int M, class Each = Nothing>
FSQ_INLINE void accumulate(Vec<typename P::Sum> (&acc)[M][NV], const typename P::Value* a, int64_t row, int64_t step,
                           const typename P::Sum* b, int64_t pitch, int64_t K, Each&& each = Each()) {
  typedef Vec<typename P::Sum> V;
  // A column of a and one vector of b at a time, if the sums leave room for that; else a row of b and one value of a.
  constexpr bool column_fits = M * NV + M + 1 <= kRegisters;
  for (; K > 0; --K, b += pitch, a += step) {
    each();
    if constexpr (!column_fits) {
      V w[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) w[v] = load(b + v * kLanes<typename P::Sum>);
#pragma GCC unroll 8
      for (int r = 0; r < M; ++r) {
        const V x = splat_word<P>(a + r * row);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[r][v] = multiply_add<P>(x, w[v], acc[r][v]);
      }
    } else {
      V x[M];
#pragma GCC unroll 8
      for (int r = 0; r < M; ++r) x[r] = splat_word<P>(a + r * row);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const V w = load(b + v * kLanes<typename P::Sum>);
#pragma GCC unroll 8
        for (int r = 0; r < M; ++r) acc[r][v] = multiply_add<P>(x[r], w, acc[r][v]);
      }
    }
  }
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
