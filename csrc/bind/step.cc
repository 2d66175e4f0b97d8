// One step of a stack of layers, for calls that repeat: sizes are settled once, a call brings nothing but tensors.
#include "bind/step.h"

#include <stdlib.h>

#include <new>
#include <stdexcept>
#include <string>

#include "bind/scratch.h"

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

// The tensors of a list or a tuple, one after the other.
class Tensors {
 public:
  Tensors(const py::handle& all, int64_t count, const char* name) {
    if (!(PyList_Check(all.ptr()) || PyTuple_Check(all.ptr())) || PySequence_Fast_GET_SIZE(all.ptr()) != count)
      throw py::type_error(std::string(name) + ": expected a list of " + std::to_string(count) + " tensors");
    at_ = PySequence_Fast_ITEMS(all.ptr());
  }
  char* next() { return address(*at_++); }

 private:
  PyObject** at_;
};

// Per direction w_ih, w_hh, (b_ih, b_hh), (w_hr).
template <class T>
void take(Tensors& all, int64_t directions, bool bias, bool projection, T* (&w_ih)[2], T* (&w_hh)[2], T* (&b_ih)[2],
          T* (&b_hh)[2], T* (&w_hr)[2]) {
  for (int64_t d = 0; d < directions; ++d) {
    w_ih[d] = all.next();
    w_hh[d] = all.next();
    b_ih[d] = bias ? all.next() : nullptr;
    b_hh[d] = bias ? all.next() : nullptr;
    w_hr[d] = projection ? all.next() : nullptr;
  }
}

constexpr char kBound[] = "fusedseq.Step.run";
struct Bound {
  const py::object keep;
  const Step& step;
  const CpuTable* const* active;
};

PyObject* run_bound(PyObject* self, PyObject* const* a, Py_ssize_t count) {
  if (count != 9) return PyErr_Format(PyExc_TypeError, "a step takes 9 arguments, got %zd", count);
  const int threads = int(PyLong_AsLong(a[0]));
  if (threads == -1 && PyErr_Occurred()) return nullptr;
  const Bound& bound = *static_cast<const Bound*>(PyCapsule_GetPointer(self, kBound));
  try {
    bound.step.run(**bound.active, threads, a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8]);
  } catch (py::error_already_set& e) {
    e.restore();
    return nullptr;
  } catch (const py::builtin_exception& e) {
    e.set_error();
    return nullptr;
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
  Py_RETURN_NONE;
}

struct Buffer {
  explicit Buffer(size_t bytes) : data(bytes ? static_cast<char*>(malloc(bytes)) : nullptr) {
    if (bytes && !data) throw std::bad_alloc();
  }
  ~Buffer() { free(data); }
  Buffer(const Buffer&) = delete;
  char* const data;
};

}  // namespace

py::object run_function(const py::object& step, const CpuTable* const* active) {
  static PyMethodDef method = {"run", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(run_bound)),
                               METH_FASTCALL, "One step; see Step."};
  const py::capsule bound(new Bound{step, step.cast<const Step&>(), active}, kBound,
                          [](PyObject* capsule) { delete static_cast<Bound*>(PyCapsule_GetPointer(capsule, kBound)); });
  PyObject* const function = PyCFunction_New(&method, bound.ptr());
  if (!function) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(function);
}

Step::Step(const py::object& local, int cell, int dtype, const py::tuple& sizes, int64_t x_stride, int layers,
           bool bias, bool projection)
    : local_(local), layers_(layers), bias_(bias), projection_(projection), x_stride_(x_stride) {
  p_.cell = Cell(cell);
  p_.dtype = DType(dtype);
  int64_t* const into[] = {&p_.T, &p_.B, &p_.I, &p_.H, &p_.R, &p_.D};
  for (size_t i = 0; i < 6; ++i) *into[i] = sizes[i].cast<int64_t>();
  if (p_.T != 1) throw py::value_error("sizes: a step has T = 1");
  value_bytes_ = p_.dtype == DType::f64 ? 8 : p_.dtype == DType::f32 ? 4 : 2;
}

void Step::run(const CpuTable& table, int threads, const py::handle& x, const py::handle& h0, const py::handle& c0,
               const py::handle& y, const py::handle& h_n, const py::handle& c_n, const py::handle& weights,
               const py::handle& reserve) const {
  Tensors from(weights, layers_ * weights_of_layer(), "weights");
  const int64_t state = p_.D * p_.B * p_.R * value_bytes_, cells = p_.D * p_.B * p_.H * value_bytes_;
  const Buffer between(layers_ > 1 && p_.D > 1 ? 2 * size_t(state) : 0);  // outputs of layers that feed others
  const Buffer calls(sizeof(ScanParams) * size_t(layers_));
  ScanParams* const all = reinterpret_cast<ScanParams*>(calls.data);
  char *in = address(x), *const h_in = address(h0), *const c_in = address(c0);
  char *const out = address(y), *const h_out = address(h_n), *const c_out = address(c_n);
  int64_t width = p_.I, stride = x_stride_;
  for (int64_t layer = 0; layer < layers_; ++layer) {
    ScanParams& p = *new (all + layer) ScanParams(p_);
    p.threads = threads < 1 ? 1 : threads;
    p.I = width;
    p.x = {in, 0, stride};
    p.h0 = h_in ? h_in + layer * state : nullptr;
    p.c0 = c_in ? c_in + layer * cells : nullptr;
    take(from, p.D, bias_, projection_, p.w_ih, p.w_hh, p.b_ih, p.b_hh, p.w_hr);
    p.h_n = h_out + layer * state;
    p.c_n = c_out ? c_out + layer * cells : nullptr;
    p.reserve = address(reserve);
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

void Step::backward(const CpuTable& table, int threads, const py::handle& dh, const py::handle& dc, const py::handle& x,
                    const py::handle& h0, const py::handle& c0, const py::handle& h_n, const py::handle& reserve,
                    const py::handle& weights, const py::handle& dx, const py::handle& dh0, const py::handle& dc0,
                    const py::handle& dweights) const {
  if (layers_ != 1 || p_.D != 1) throw py::type_error("backward: expected a step of one layer and direction");
  ScanGradParams g{};
  ScanParams& p = g.fwd;
  p = p_;
  KeptScratch& scratch = local_.attr("scratch").cast<KeptScratch&>();
  p.scratch = &scratch;
  p.threads = threads < 1 ? 1 : threads;
  p.x = {address(x), 0, x_stride_};
  p.h0 = address(h0);
  p.c0 = address(c0);
  Tensors from(weights, weights_of_layer(), "weights");
  take(from, 1, bias_, projection_, p.w_ih, p.w_hh, p.b_ih, p.b_hh, p.w_hr);
  p.y = {address(h_n), 0, p.R};
  p.reserve = address(reserve);
  g.dh_n = address(dh);
  g.dc_n = address(dc);
  g.dx = {address(dx), 0, p.I};
  g.dh0 = address(dh0);
  g.dc0 = address(dc0);
  if (py::len(dweights) > 0) {
    Tensors into(dweights, weights_of_layer(), "dweights");
    take(into, 1, bias_, projection_, g.dw_ih, g.dw_hh, g.db_ih, g.db_hh, g.dw_hr);
  }
  Status status;
  {
    py::gil_scoped_release release;
    status = table.backward(g);
  }
  if (status == Status::out_of_memory) throw std::bad_alloc();
  scratch.grow();
}

}  // namespace fusedseq
