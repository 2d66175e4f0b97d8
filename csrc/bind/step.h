#pragma once
#include <pybind11/pybind11.h>

#include "fusedseq.h"

namespace fusedseq {

// One step (T = 1) of `layers` layers of given sizes. `sizes` is T, B, I, H, R, D, with I that of the first layer; rows
// of x lie `x_stride` values apart, everything else is dense. A tensor is anything with a method data_ptr(), or None;
// several come as a list or a tuple.
class Step {
 public:
  // `local` is an object whose attribute `scratch` is the calling thread's KeptScratch.
  Step(const pybind11::object& local, int cell, int dtype, const pybind11::tuple& sizes, int64_t x_stride, int layers,
       bool bias, bool projection);

  // x [B, I], h0 [layers*D, B, R], c0 [layers*D, B, H] or None, and for the results y [B, D*R], h_n, c_n like the
  // states; y may be h_n itself with one layer and direction. What backward needs goes to `reserve`, if that is not
  // None.
  void run(const CpuTable& table, int threads, const pybind11::handle& x, const pybind11::handle& h0,
           const pybind11::handle& c0, const pybind11::handle& y, const pybind11::handle& h_n,
           const pybind11::handle& c_n, const pybind11::handle& weights, const pybind11::handle& reserve) const;

  // The backward of a cell's step (one layer, one direction, float32 or float64): gradients dh, dc of the new state
  // [B, R], [B, H] or None, then what `run` was given and wrote, then room for the gradients; dx may be None and
  // `dweights` empty where they are not wanted.
  void backward(const CpuTable& table, int threads, const pybind11::handle& dh, const pybind11::handle& dc,
                const pybind11::handle& x, const pybind11::handle& h0, const pybind11::handle& c0,
                const pybind11::handle& h_n, const pybind11::handle& reserve, const pybind11::handle& weights,
                const pybind11::handle& dx, const pybind11::handle& dh0, const pybind11::handle& dc0,
                const pybind11::handle& dweights) const;

 private:
  int64_t weights_of_layer() const { return p_.D * ((bias_ ? 4 : 2) + (projection_ ? 1 : 0)); }

  const pybind11::object local_;
  ScanParams p_{};
  int64_t layers_, value_bytes_;
  bool bias_, projection_;
  int64_t x_stride_;
};

// `run` of a Python object `step` as a builtin function of the same arguments, with the table that stands at `active`
// when it is called. A step is a few microseconds, and pybind11's way to a method takes half of one.
pybind11::object run_function(const pybind11::object& step, const CpuTable* const* active);

}  // namespace fusedseq
