// What works on rows (layer normalisation, bias and activation, linear layers): integers in, a params struct, one call.
#include "bind/rows.h"

#include "bind/attention.h"
#include "bind/call.h"

namespace py = pybind11;

namespace fusedseq {
namespace {

// None, or (threshold, scale, seed).
Dropout dropout(const py::handle& x) {
  if (x.is_none()) return {false, 0, 1.0, 0};
  const py::tuple t = py::reinterpret_borrow<py::tuple>(x);
  return {true, t[0].cast<uint32_t>(), t[1].cast<double>(), t[2].cast<uint64_t>()};
}

// Of either family: what its params structs begin with.
template <class P>
P params(int threads, int dtype, int64_t rows, int64_t d, const py::handle& random) {
  P p{};
  p.dtype = DType(dtype);
  p.threads = threads < 1 ? 1 : threads;
  p.rows = rows;
  p.d = d;
  p.dropout = dropout(random);
  return p;
}

LayerNormParams layer_norm(int threads, int dtype, int64_t rows, int64_t d, double eps, const py::handle& random,
                           const py::tuple& tensors) {
  LayerNormParams p = params<LayerNormParams>(threads, dtype, rows, d, random);
  p.eps = eps;
  p.x = pointer(tensors[0]);
  p.residual = pointer(tensors[1]);
  p.weight = pointer(tensors[2]);
  p.bias = pointer(tensors[3]);
  return p;
}

void layer_norm_forward(int threads, int dtype, int64_t rows, int64_t d, double eps, const py::handle& random,
                        const py::tuple& tensors, const py::handle& out, const py::handle& sum) {
  LayerNormParams p = layer_norm(threads, dtype, rows, d, eps, random, tensors);
  p.out = pointer(out);
  p.sum = pointer(sum);
  call(active_row().layer_norm_forward, p);
}

void layer_norm_backward(int threads, int dtype, int64_t rows, int64_t d, double eps, const py::handle& random,
                         const py::tuple& tensors, const py::tuple& upstream, const py::tuple& grads) {
  LayerNormGradParams p{};
  p.fwd = layer_norm(threads, dtype, rows, d, eps, random, tensors);
  p.dout = pointer(upstream[0]);
  p.dsum = pointer(upstream[1]);
  p.dx = pointer(grads[0]);
  p.dresidual = pointer(grads[1]);
  p.dweight = pointer(grads[2]);
  p.dbias = pointer(grads[3]);
  call(active_row().layer_norm_backward, p);
}

BiasActivationParams bias_activation(int threads, int dtype, int64_t rows, int64_t d, int activation,
                                     const py::handle& random, const py::tuple& tensors) {
  BiasActivationParams p = params<BiasActivationParams>(threads, dtype, rows, d, random);
  p.activation = Activation(activation);
  p.x = pointer(tensors[0]);
  p.bias = pointer(tensors[1]);
  p.residual = pointer(tensors[2]);
  return p;
}

void bias_activation_forward(int threads, int dtype, int64_t rows, int64_t d, int activation, const py::handle& random,
                             const py::tuple& tensors, const py::handle& out) {
  BiasActivationParams p = bias_activation(threads, dtype, rows, d, activation, random, tensors);
  p.out = pointer(out);
  call(active_row().bias_activation_forward, p);
}

void bias_activation_backward(int threads, int dtype, int64_t rows, int64_t d, int activation, const py::handle& random,
                              const py::tuple& tensors, const py::handle& dout, const py::handle& dx,
                              const py::handle& dbias) {
  BiasActivationGradParams p{};
  p.fwd = bias_activation(threads, dtype, rows, d, activation, random, tensors);
  p.dout = pointer(dout);
  p.dx = pointer(dx);
  p.dbias = pointer(dbias);
  call(active_row().bias_activation_backward, p);
}

// sizes: M, N, K.
LinearParams linear(int threads, int dtype, const py::tuple& sizes, const py::handle& x, int64_t x_pitch,
                    const py::handle& w) {
  LinearParams p{};
  p.dtype = DType(dtype);
  p.threads = threads < 1 ? 1 : threads;
  p.M = sizes[0].cast<int64_t>();
  p.N = sizes[1].cast<int64_t>();
  p.K = sizes[2].cast<int64_t>();
  p.x = pointer(x);
  p.x_pitch = x_pitch;
  p.w = pointer(w);
  return p;
}

void linear_forward(int threads, int dtype, const py::tuple& sizes, const py::handle& x, int64_t x_pitch,
                    const py::handle& w, const py::handle& bias, const py::handle& y) {
  LinearParams p = linear(threads, dtype, sizes, x, x_pitch, w);
  p.bias = pointer(bias);
  p.y = pointer(y);
  call(active_row().linear_forward, p);
}

void linear_backward(int threads, int dtype, const py::tuple& sizes, const py::handle& x, int64_t x_pitch,
                     const py::handle& w, const py::handle& dy, int64_t dy_pitch, const py::handle& dx,
                     const py::handle& dw, const py::handle& db) {
  LinearGradParams p{};
  p.fwd = linear(threads, dtype, sizes, x, x_pitch, w);
  p.dy = pointer(dy);
  p.dy_pitch = dy_pitch;
  p.dx = pointer(dx);
  p.dw = pointer(dw);
  p.db = pointer(db);
  call(active_row().linear_backward, p);
}

}  // namespace

void bind_rows(py::module_& m) {
  m.def("layer_norm_forward", &layer_norm_forward);
  m.def("layer_norm_backward", &layer_norm_backward);
  m.def("bias_activation_forward", &bias_activation_forward);
  m.def("bias_activation_backward", &bias_activation_backward);
  m.def("linear_forward", &linear_forward);
  m.def("linear_backward", &linear_backward);
}

}  // namespace fusedseq
