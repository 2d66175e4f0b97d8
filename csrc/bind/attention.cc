// Attention: integers in, a params struct, one call with the GIL released.
#include "bind/attention.h"

#include "bind/attention_params.h"

namespace py = pybind11;

namespace fusedseq {
namespace {

void forward(int threads, const py::tuple& sizes, const py::tuple& tensors, const py::tuple& options) {
  call(active_row().attention_forward, attention_params(threads, sizes, tensors, options));
}

// Attention without masks, bias or dropout for calls that repeat: sizes and numbers are settled once.
class Plain {
 public:
  Plain(const py::tuple& sizes, const py::tuple& options) {
    int64_t* const into[] = {&p_.B, &p_.Hq, &p_.Hkv, &p_.L, &p_.S, &p_.E, &p_.Ev};
    for (size_t i = 0; i < 7; ++i) *into[i] = sizes[i].cast<int64_t>();
    numbers(p_, options);
  }

  // Addresses and strides; false, with nothing done, if the elements of a head do not lie side by side.
  bool run(int threads, uintptr_t q, const py::tuple& q_strides, uintptr_t k, const py::tuple& k_strides, uintptr_t v,
           const py::tuple& v_strides, uintptr_t out, const py::tuple& out_strides, uintptr_t lse) const {
    AttentionParams p = p_;
    p.threads = threads < 1 ? 1 : threads;
    if (!place(p.q, q, q_strides) || !place(p.k, k, k_strides) || !place(p.v, v, v_strides)) return false;
    if (!place(p.out, out, out_strides)) return false;
    p.lse = reinterpret_cast<void*>(lse);
    call(active_row().attention_forward, p);
    return true;
  }

 private:
  static bool place(Heads& t, uintptr_t data, const py::tuple& strides) {
    if (strides.size() != 4 || strides[3].cast<int64_t>() != 1) return false;
    t = {reinterpret_cast<void*>(data), strides[0].cast<int64_t>(), strides[1].cast<int64_t>(),
         strides[2].cast<int64_t>()};
    return true;
  }

  AttentionParams p_{};
};

void backward(int threads, const py::tuple& sizes, const py::tuple& tensors, const py::tuple& options,
              const py::tuple& grads) {
  AttentionGradParams p{};
  p.fwd = attention_params(threads, sizes, tensors, options);
  p.dout = heads(grads[0]);
  p.dlse = pointer(grads[1]);
  p.dq = heads(grads[2]);
  p.dk = heads(grads[3]);
  p.dv = heads(grads[4]);
  p.dbias = table(grads[5]);
  p.dalibi = pointer(grads[6]);
  p.dsinks = pointer(grads[7]);
  call(active_row().attention_backward, p);
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention_forward", &forward);
  m.def("attention_backward", &backward);
  py::class_<Plain>(m, "PlainAttention")
      .def(py::init<const py::tuple&, const py::tuple&>())
      .def("__call__", &Plain::run);
}

}  // namespace fusedseq
