// Attention on a GPU: what the CPU's module takes, and by name what only a GPU needs.
#include "bind/cuda/attention.h"

#include "bind/attention_params.h"
#include "bind/cuda/arguments.h"
#include "cuda/surface.h"

namespace py = pybind11;

namespace fusedseq {
namespace {

CudaAttentionParams device_params(const py::tuple& sizes, const py::tuple& tensors, const py::tuple& options,
                                  const py::dict& named) {
  const Arguments a(named);
  CudaAttentionParams p{};
  p.a = attention_params(1, sizes, tensors, options);
  p.seed = a.pointer<const int64_t>("seed");
  p.positions = a.pointer<const int32_t>("positions");
  p.ranks = a.pointer<const int32_t>("ranks");
  p.positions_sb = a.number("positions_sb", 0);
  p.ranks_sb = a.number("ranks_sb", 0);
  p.parts = a.number("parts", 1);
  p.part = a.number("part", 0);
  p.part_out = a.pointer<float>("part_out");
  p.part_top = a.pointer<float>("part_top");
  p.part_total = a.pointer<float>("part_total");
  p.fault = a.pointer<uint32_t>("fault");
  p.stuck = a.number("stuck", 0) != 0;
  p.stream = a.pointer("stream");
  return p;
}

template <std::string (*run)(const CudaAttentionParams&)>
void forward(const py::tuple& sizes, const py::tuple& tensors, const py::tuple& options, const py::dict& named) {
  const CudaAttentionParams p = device_params(sizes, tensors, options, named);
  std::string error;
  {
    py::gil_scoped_release release;
    error = run(p);
  }
  check(error);
}

std::string hopper_refuses(const py::tuple& sizes, const py::tuple& tensors, const py::tuple& options,
                           const py::dict& named) {
  return cuda_attention_hopper_refuses(device_params(sizes, tensors, options, named));
}

// grads: (dout, dlse, dq, dk, dv, dbias, dalibi, dsinks); by name the scratch: lse2, delta, slopes.
CudaAttentionGradParams grad_params(const py::tuple& sizes, const py::tuple& tensors, const py::tuple& options,
                                    const py::dict& named, const py::tuple& grads) {
  const Arguments a(named);
  CudaAttentionGradParams g{};
  g.fwd = device_params(sizes, tensors, options, named);
  g.dout = heads(grads[0]);
  g.dlse = pointer(grads[1]);
  g.dq = heads(grads[2]);
  g.dk = heads(grads[3]);
  g.dv = heads(grads[4]);
  g.dbias = table(grads[5]);
  g.dalibi = pointer(grads[6]);
  g.dsinks = pointer(grads[7]);
  g.lse2 = a.pointer<float>("lse2");
  g.delta = a.pointer<float>("delta");
  g.slopes = a.pointer<float>("slopes");
  return g;
}

template <std::string (*run)(const CudaAttentionGradParams&)>
void backward(const py::tuple& sizes, const py::tuple& tensors, const py::tuple& options, const py::dict& named,
              const py::tuple& grads) {
  const CudaAttentionGradParams g = grad_params(sizes, tensors, options, named, grads);
  std::string error;
  {
    py::gil_scoped_release release;
    error = run(g);
  }
  check(error);
}

std::string backward_hopper_refuses(const py::tuple& sizes, const py::tuple& tensors, const py::tuple& options,
                                    const py::dict& named, const py::tuple& grads) {
  return cuda_attention_backward_hopper_refuses(grad_params(sizes, tensors, options, named, grads));
}

int backward_shared(int64_t E, int64_t Ev, bool bias, bool dropout) {
  AttentionParams p{};
  p.E = E;
  p.Ev = Ev;
  p.bias.data = bias ? &p : nullptr;  // it is asked only whether there is one
  p.dropout = dropout;
  return cuda_attention_backward_bytes(p);
}

}  // namespace

void bind_cuda_attention(py::module_& m) {
  m.def("attention_forward", &forward<cuda_attention_forward>);
  m.def("attention_hopper", &forward<cuda_attention_hopper>);
  m.def("attention_hopper_refuses", &hopper_refuses);
  m.def("attention_backward", &backward<cuda_attention_backward>);
  m.def("attention_backward_hopper", &backward<cuda_attention_backward_hopper>);
  m.def("attention_backward_hopper_refuses", &backward_hopper_refuses);
  m.def("attention_backward_shared", &backward_shared, "Bytes of shared memory that a CTA of the backward pass takes.");
}

}  // namespace fusedseq
