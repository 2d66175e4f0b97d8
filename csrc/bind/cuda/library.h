// Matrix products by the vendor's library, without a detour through Python: the one that torch has loaded.
#pragma once
#include <pybind11/pybind11.h>

#include <string>

#include "fusedseq.h"

namespace fusedseq {

// A matrix in row order, rows `pitch` values apart; `transposed`: what lies there is its transpose.
struct Matrix {
  const void* data;
  int64_t pitch;
  bool transposed;
};

// Where products are enqueued.
struct Library {
  std::string name;  // as the loader knows it; it must be loaded, nothing is searched for
  int device;
  void* stream;
  void* workspace;  // of `bytes`, aligned to 256: with one of the library's own, results depend on what else runs
  int64_t bytes;
};

// into [M,N], dense = a [M,K] b [K,N], enqueued; all sizes from 1 to 2^31 - 1. `dtype` is that of a and b, `result` the
// same or float32, in which halves are summed; tf32: float32 operands may be rounded. Throws where the library is not
// there or refuses.
void library_product(const Library& library, int64_t M, int64_t N, int64_t K, const Matrix& a, const Matrix& b,
                     void* into, DType dtype, DType result, bool tf32);

// The products of tier `step`: what is fed, [D,B,K] in turns from two places, times a direction's factor [K,N].
struct LibrarySteps {
  Library library;
  const char* fed[2];
  Matrix factor[kMaxDirections];
  int64_t N, K;
  char* into;  // [D,B,N] in the compute type
  // Where the product of a turn is.
  const void* product(const CudaScanParams& p, int64_t turn) const;
};

void bind_cuda_library(pybind11::module_& m);

}  // namespace fusedseq
