#include "cpu/lane_sums.h"

#include "cpu/convert.h"
#include "cpu/parallel.h"
#include "cpu/transpose.h"

namespace fusedseq {
namespace FSQ_ISA {

// Rows in a tile with four rows of w: sums, a word of each row and one of w fill the registers.
constexpr int kTile = kRegisters == 32 ? 6 : 3;

// M rows against R rows of w from `lane` on, over the operands [begin, end): sums[j][lane + r] in lanes of k.
template <class S, DType W, int M, int R>
static void dot_block(const LaneSums<S>& s, int c, int begin, int end, int64_t first, int64_t lane,
                      Vec<S> (*sums)[kLanes<S>]) {
  constexpr int L = kLanes<S>;
  Vec<S> acc[R][M] = {};
  for (int o = begin; o < end; ++o) {
    const LaneOperand<S>& p = s.operands[o];
    const S* a = p.a + first * p.lda;
    const int64_t lda = p.lda, pitch = p.w_pitch;
    int64_t w = (s.row[c] + lane) * pitch;
    const auto block = [&](int64_t n) __attribute__((always_inline)) {
      Vec<S> x[M];
#pragma GCC unroll 8
      for (int j = 0; j < M; ++j) x[j] = load_n(a + j * lda, n);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec<S> word = load_as<S>(p.w, W, w + r * pitch, n);
#pragma GCC unroll 8
        for (int j = 0; j < M; ++j) acc[r][j] = fma(x[j], word, acc[r][j]);
      }
      a += L;
      w += L;
    };
    int64_t k = p.K;
    for (; k >= L; k -= L) block(L);
    if (k > 0) block(k);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < M; ++j) sums[j][lane + r] = acc[r][j];
}

// m rows against R rows of w.
template <class S, DType W, int R>
static void dot_rows(const LaneSums<S>& s, int c, int begin, int end, int64_t first, int m, int64_t lane,
                     Vec<S> (*sums)[kLanes<S>]) {
  for_tiles(m, kTile, [&](int64_t j, int rows) {
    switch (rows) {
      case 1:
        return dot_block<S, W, 1, R>(s, c, begin, end, first + j, lane, sums + j);
      case 2:
        return dot_block<S, W, 2, R>(s, c, begin, end, first + j, lane, sums + j);
      case 3:
        return dot_block<S, W, 3, R>(s, c, begin, end, first + j, lane, sums + j);
      case 4:
        return dot_block<S, W, 4, R>(s, c, begin, end, first + j, lane, sums + j);
      case 5:
        return dot_block<S, W, 5, R>(s, c, begin, end, first + j, lane, sums + j);
      case 6:
        return dot_block<S, W, 6, R>(s, c, begin, end, first + j, lane, sums + j);
    }
  });
}

// All lanes of one vector for m rows. A few rows of w at a time pass all m rows while they are in the first-level
// cache.
template <class S, DType W>
static void dots(const LaneSums<S>& s, int c, int begin, int end, int64_t first, int m, const S* bias, S* out,
                 int64_t pitch) {
  constexpr int L = kLanes<S>, kTogether = L < 4 ? L : 4, kMany = L < 8 ? L : 8;
  Vec<S> sums[kLaneRows][L];
  const int64_t lanes = s.lanes[c];
  int64_t lane = 0;
  for (; m == 1 && lane + kMany <= lanes; lane += kMany) dot_block<S, W, 1, kMany>(s, c, begin, end, first, lane, sums);
  for (; lane + kTogether <= lanes; lane += kTogether)
    dot_rows<S, W, kTogether>(s, c, begin, end, first, m, lane, sums);
  for (; lane < lanes; ++lane) dot_rows<S, W, 1>(s, c, begin, end, first, m, lane, sums);
  for (; lane < L; ++lane)
    for (int j = 0; j < m; ++j) sums[j][lane] = Vec<S>{};
  for (int j = 0; j < m; ++j) store(out + j * pitch, load(bias) + fold<S>(sums[j]));
}

template <class S, DType W>
static void dot_tile(const LaneSums<S>& s, int64_t first, int m, S* out, int64_t pitch) {
  constexpr int L = kLanes<S>;
  for (int c = 0; c < s.nv; ++c) {
    const bool apart = c == s.apart;
    if (apart) dots<S, W>(s, c, 0, 1, first, m, s.bias + s.nv * L, out + s.nv * L, pitch);
    dots<S, W>(s, c, apart, s.count, first, m, s.bias + c * L, out + c * L, pitch);
  }
}

template <class S>
void lane_sums(const LaneSums<S>& s, int64_t first, int m, S* out, int64_t pitch) {
  if constexpr (sizeof(S) == 8) return dot_tile<S, DType::f64>(s, first, m, out, pitch);
  switch (s.dtype) {
    case DType::bf16:
      return dot_tile<S, DType::bf16>(s, first, m, out, pitch);
    case DType::f16:
      return dot_tile<S, DType::f16>(s, first, m, out, pitch);
    default:
      return dot_tile<S, DType::f32>(s, first, m, out, pitch);
  }
}

template void lane_sums<float>(const LaneSums<float>&, int64_t, int, float*, int64_t);
template void lane_sums<double>(const LaneSums<double>&, int64_t, int, double*, int64_t);

}  // namespace FSQ_ISA
}  // namespace fusedseq
