// Attention: integers in, a params struct, one call with the GIL released.
#include "bind/attention.h"

#include "bind/call.h"

namespace py = pybind11;

namespace fusedseq {
namespace {

Heads heads(const py::handle& x) {
  if (x.is_none()) return {nullptr, 0, 0, 0};
  const py::tuple t = py::reinterpret_borrow<py::tuple>(x);
  return {pointer(t[0]), t[1].cast<int64_t>(), t[2].cast<int64_t>(), t[3].cast<int64_t>()};
}

Table table(const py::handle& x) {
  if (x.is_none()) return {nullptr, 0, 0, 0, 0};
  const py::tuple t = py::reinterpret_borrow<py::tuple>(x);
  return {pointer(t[0]), t[1].cast<int64_t>(), t[2].cast<int64_t>(), t[3].cast<int64_t>(), t[4].cast<int64_t>()};
}

// (dtype, bias dtype, causal, left, right, scale, softcap, threshold or None, keep_scale, seed)
void numbers(AttentionParams& p, const py::tuple& t) {
  p.dtype = DType(t[0].cast<int>());
  p.bias_dtype = DType(t[1].cast<int>());
  p.causal = t[2].cast<int>();
  p.left = t[3].cast<int64_t>();
  p.right = t[4].cast<int64_t>();
  p.scale = t[5].cast<double>();
  p.softcap = t[6].cast<double>();
  p.dropout = !t[7].is_none();
  p.threshold = p.dropout ? t[7].cast<uint32_t>() : 0;
  p.keep_scale = t[8].cast<double>();
  p.seed = t[9].cast<uint64_t>();
}

AttentionParams params(int threads, const py::tuple& sizes, const py::tuple& tensors, const py::tuple& options) {
  AttentionParams p{};
  p.threads = threads < 1 ? 1 : threads;
  int64_t* const into[] = {&p.B, &p.Hq, &p.Hkv, &p.L, &p.S, &p.E, &p.Ev, &p.N};
  for (size_t i = 0; i < 8; ++i) *into[i] = sizes[i].cast<int64_t>();
  p.q = heads(tensors[0]);
  p.k = heads(tensors[1]);
  p.v = heads(tensors[2]);
  p.out = heads(tensors[3]);
  p.lse = pointer(tensors[4]);
  p.bias = table(tensors[5]);
  p.alibi_slopes = pointer(tensors[6]);
  p.sinks = pointer(tensors[7]);
  p.dense = table(tensors[8]);
  p.key_lengths = static_cast<const int64_t*>(pointer(tensors[9]));
  p.cu_q = static_cast<const int64_t*>(pointer(tensors[10]));
  p.cu_k = static_cast<const int64_t*>(pointer(tensors[11]));
  p.global_keys = static_cast<const uint8_t*>(pointer(tensors[12]));
  p.global_sb = tensors[13].cast<int64_t>();
  numbers(p, options);
  return p;
}

void forward(int threads, const py::tuple& sizes, const py::tuple& tensors, const py::tuple& options) {
  call(active_row().attention_forward, params(threads, sizes, tensors, options));
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

  // The gradients of q, k and v, all three; true and false as above.
  bool backward(int threads, uintptr_t q, const py::tuple& q_strides, uintptr_t k, const py::tuple& k_strides,
                uintptr_t v, const py::tuple& v_strides, uintptr_t out, const py::tuple& out_strides, uintptr_t lse,
                uintptr_t dout, const py::tuple& dout_strides, uintptr_t dq, const py::tuple& dq_strides, uintptr_t dk,
                const py::tuple& dk_strides, uintptr_t dv, const py::tuple& dv_strides) const {
    AttentionGradParams p{};
    p.fwd = p_;
    p.fwd.threads = threads < 1 ? 1 : threads;
    if (!place(p.fwd.q, q, q_strides) || !place(p.fwd.k, k, k_strides) || !place(p.fwd.v, v, v_strides)) return false;
    if (!place(p.fwd.out, out, out_strides) || !place(p.dout, dout, dout_strides)) return false;
    if (!place(p.dq, dq, dq_strides) || !place(p.dk, dk, dk_strides) || !place(p.dv, dv, dv_strides)) return false;
    p.fwd.lse = reinterpret_cast<void*>(lse);
    call(active_row().attention_backward, p);
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
  p.fwd = params(threads, sizes, tensors, options);
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
      .def("__call__", &Plain::run)
      .def("backward", &Plain::backward);
}

}  // namespace fusedseq
