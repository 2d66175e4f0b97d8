#pragma once
#include <pybind11/pybind11.h>

#include "fusedseq.h"

namespace fusedseq {

// One step (T = 1) of `layers` layers of given sizes, without gradients. `sizes` is T, B, I, H, R, D, with I that of
// the first layer; rows of x lie `x_stride` values apart, everything else is dense.
class Step {
 public:
  Step(int cell, int dtype, const pybind11::tuple& sizes, int64_t x_stride, int layers, bool bias, bool projection);

  // x [B, I], h0 [layers*D, B, R], c0 [layers*D, B, H] or None, and for the results y [B, D*R], h_n, c_n like the
  // states; y may be h_n itself with one layer and direction. Each is anything with a method data_ptr(); `weights` is a
  // list.
  void run(const CpuTable& table, int threads, const pybind11::handle& x, const pybind11::handle& h0,
           const pybind11::handle& c0, const pybind11::handle& y, const pybind11::handle& h_n,
           const pybind11::handle& c_n, const pybind11::handle& weights) const;

 private:
  ScanParams p_{};
  int64_t layers_, value_bytes_;
  bool bias_, projection_;
  int64_t x_stride_;
};

}  // namespace fusedseq
