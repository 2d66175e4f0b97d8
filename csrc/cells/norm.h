// Layer normalisation (Ba et al. 2016, arXiv:1607.06450) of one element of a row, given the row's moments.
//
//   n = (s - mean) rstd,   y = w n + b,   rstd = 1 / sqrt(var + eps)
//
// Nothing is saved but s itself: moments are formed again from it, which costs less than keeping them.
#pragma once
#include "cells/value.h"

namespace fusedseq {
namespace FSQ_ISA {

template <class V>
FSQ_INLINE V normalized(V s, V mean, V rstd) {
  return (s - mean) * rstd;
}

// g: gradient of n, that is w dy; mean_g and mean_gn: means over the row of g and of g n. Returns the gradient of s.
template <class V>
FSQ_INLINE V normalized_bwd(V g, V n, V rstd, V mean_g, V mean_gn) {
  return rstd * (fma(-n, mean_gn, g) - mean_g);
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
