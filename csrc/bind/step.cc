// One step of a stack of layers, for streams: sizes are settled once, a call brings nothing but tensors.
#include "bind/step.h"

#include <stdlib.h>

#include <new>
#include <stdexcept>

namespace py = pybind11;

namespace fusedseq {
namespace {

// Tensors are known by their method data_ptr() alone.
char* address(PyObject* tensor) {
  static PyObject* const name = PyUnicode_InternFromString("data_ptr");
  PyObject* const value = PyObject_CallMethodNoArgs(tensor, name);
  if (!value) throw py::error_already_set();
  void* const p = PyLong_AsVoidPtr(value);
  Py_DECREF(value);
  if (!p && PyErr_Occurred()) throw py::error_already_set();
  return static_cast<char*>(p);
}
char* address(const py::handle& x) { return x.is_none() ? nullptr : address(x.ptr()); }

struct Buffer {
  explicit Buffer(size_t bytes) : data(bytes ? static_cast<char*>(malloc(bytes)) : nullptr) {
    if (bytes && !data) throw std::bad_alloc();
  }
  ~Buffer() { free(data); }
  Buffer(const Buffer&) = delete;
  char* const data;
};

}  // namespace

Step::Step(int cell, int dtype, const py::tuple& sizes, int64_t x_stride, int layers, bool bias, bool projection)
    : layers_(layers), bias_(bias), projection_(projection), x_stride_(x_stride) {
  p_.cell = Cell(cell);
  p_.dtype = DType(dtype);
  int64_t* const into[] = {&p_.T, &p_.B, &p_.I, &p_.H, &p_.R, &p_.D};
  for (size_t i = 0; i < 6; ++i) *into[i] = sizes[i].cast<int64_t>();
  if (p_.T != 1) throw py::value_error("sizes: a step has T = 1");
  value_bytes_ = p_.dtype == DType::f64 ? 8 : p_.dtype == DType::f32 ? 4 : 2;
}

void Step::run(const CpuTable& table, int threads, const py::handle& x, const py::handle& h0, const py::handle& c0,
               const py::handle& y, const py::handle& h_n, const py::handle& c_n, const py::handle& weights) const {
  const int64_t per_layer = p_.D * ((bias_ ? 4 : 2) + (projection_ ? 1 : 0));
  if (!PyList_Check(weights.ptr()) || PyList_GET_SIZE(weights.ptr()) != layers_ * per_layer)
    throw py::type_error("weights: expected a list of " + std::to_string(layers_ * per_layer) + " tensors");
  const int64_t state = p_.D * p_.B * p_.R * value_bytes_, cells = p_.D * p_.B * p_.H * value_bytes_;
  const Buffer between(layers_ > 1 && p_.D > 1 ? 2 * size_t(state) : 0);  // outputs of layers that feed others
  const Buffer calls(sizeof(ScanParams) * size_t(layers_));
  ScanParams* const all = reinterpret_cast<ScanParams*>(calls.data);
  char *in = address(x), *const h_in = address(h0), *const c_in = address(c0);
  char *const out = address(y), *const h_out = address(h_n), *const c_out = address(c_n);
  int64_t width = p_.I, stride = x_stride_;
  Py_ssize_t at = 0;
  for (int64_t layer = 0; layer < layers_; ++layer) {
    ScanParams& p = *new (all + layer) ScanParams(p_);
    p.threads = threads < 1 ? 1 : threads;
    p.I = width;
    p.x = {in, 0, stride};
    p.h0 = h_in ? h_in + layer * state : nullptr;
    p.c0 = c_in ? c_in + layer * cells : nullptr;
    const auto next = [&]() -> void* { return address(PyList_GET_ITEM(weights.ptr(), at++)); };
    for (int64_t d = 0; d < p.D; ++d) {
      p.w_ih[d] = next();
      p.w_hh[d] = next();
      p.b_ih[d] = bias_ ? next() : nullptr;
      p.b_hh[d] = bias_ ? next() : nullptr;
      p.w_hr[d] = projection_ ? next() : nullptr;
    }
    p.h_n = h_out + layer * state;
    p.c_n = c_out ? c_out + layer * cells : nullptr;
    // With one direction a step's output is its state.
    char* const here = layer == layers_ - 1 ? out : p.D == 1 ? h_out + layer * state : between.data + layer % 2 * state;
    p.y = {here, 0, p.D * p.R};
    in = here;
    width = stride = p.D * p.R;
  }
  Status status = Status::ok;
  {
    py::gil_scoped_release release;
    for (int64_t layer = 0; layer < layers_ && status == Status::ok; ++layer) status = table.forward(all[layer]);
  }
  if (status == Status::out_of_memory) throw std::bad_alloc();
}

}  // namespace fusedseq
