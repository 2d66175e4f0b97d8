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

}  // namespace

void bind_cuda_attention(py::module_& m) {
  m.def("attention_forward", &forward<cuda_attention_forward>);
  m.def("attention_hopper", &forward<cuda_attention_hopper>);
  m.def("attention_hopper_refuses", &hopper_refuses);
}

}  // namespace fusedseq
