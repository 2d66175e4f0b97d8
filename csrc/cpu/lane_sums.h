// Products with a weight as it lies in memory, row by row: for what uses every weight once, a single step or few
// queries.
//
// Lanes are k: a sum over K is kLanes sums, one for each k modulo kLanes, that run over both operands one after the
// other and are folded into one at the end. A row's result does not depend on how many rows there are.
#pragma once
#include "cpu/gemm.h"

namespace fusedseq {
namespace FSQ_ISA {

constexpr int kLaneRows = 16;

template <class S>
struct LaneOperand {
  const S* a;  // rows of the left operand
  int64_t lda;
  const void* w;  // [*, K]
  int64_t K;
  int64_t w_pitch;  // of rows of w
};

// For each of `nv` vectors: out[i][lane] = bias[lane] + sum over operands and k of a[i][k] w[row + lane][k].
template <class S>
struct LaneSums {
  LaneOperand<S> operands[2];
  int count;  // of operands
  DType dtype;
  int nv;
  int64_t row[kMaxPanel], lanes[kMaxPanel];  // the first row of w, and how many: other lanes get nothing but the bias
  const S* bias;                             // a vector for each of out
  // A vector whose two products are not added up: the second goes to it, the first to vector nv of out. -1: none.
  int apart = -1;

  int sums() const { return nv + (apart >= 0); }  // vectors of out
};

// m rows from row `first` on, kLaneRows at most.
template <class S>
void lane_sums(const LaneSums<S>& s, int64_t first, int m, S* out, int64_t pitch);

}  // namespace FSQ_ISA
}  // namespace fusedseq
