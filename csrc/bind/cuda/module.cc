// fusedseq._cuda, and under the emulator fusedseq._cuda_emulated: addresses, sizes and strides by name, a params
// struct, one call with the GIL released. Work is enqueued on the caller's stream; nothing waits for it.
#include <pybind11/pybind11.h>

#include <string>

#include "bind/cuda/arguments.h"
#include "bind/cuda/attention.h"
#include "bind/cuda/cells.h"
#include "bind/cuda/costs.h"
#include "bind/cuda/library.h"
#include "cuda/surface.h"

#ifndef FSQ_CUDA_MODULE
#define FSQ_CUDA_MODULE _cuda
#endif
#ifndef FSQ_CUDA_ARCHS
#define FSQ_CUDA_ARCHS ""
#endif

namespace py = pybind11;
using namespace fusedseq;

namespace {

CudaScanParams sized(int cell, int dtype, const py::tuple& sizes) {
  CudaScanParams p{};
  p.cell = Cell(cell);
  p.dtype = DType(dtype);
  int64_t* const into[] = {&p.T, &p.B, &p.H, &p.R, &p.D};
  for (size_t i = 0; i < 5; ++i) *into[i] = sizes[i].cast<int64_t>();
  return p;
}

CudaScanParams scan_params(int cell, int dtype, const py::tuple& sizes, const Arguments& a) {
  CudaScanParams p = sized(cell, dtype, sizes);
  p.offsets = a.pointer<const int64_t>("offsets");
  p.lengths = a.pointer<const int32_t>("lengths");
  p.gates = a.rows("gates");
  a.directions("b_ih", p.b_ih);
  a.directions("b_hh", p.b_hh);
  p.h0 = a.pointer("h0");
  p.c0 = a.pointer("c0");
  a.directions("w_hh", p.w_hh);
  a.directions("w_hr", p.w_hr);
  p.resets = a.rows("resets");
  p.y = a.rows("y");
  p.c_all = a.rows("c_all");
  p.h_n = a.pointer("h_n");
  p.c_n = a.pointer("c_n");
  p.reserve = a.rows("reserve");
  p.reserve_sd = a.number("reserve_sd", 0);
  p.recompute = a.flag("recompute");
  p.tf32 = a.flag("tf32");
  p.workspace = a.pointer("workspace");
  p.fault = a.pointer<uint32_t>("fault");
  p.stream = a.pointer("stream");
  return p;
}

CudaPlan plan(int cell, int dtype, const py::tuple& sizes, bool projected, bool backward, bool tf32, int tier,
              bool by_warp) {
  CudaScanParams p = sized(cell, dtype, sizes);
  p.tf32 = tf32;
  if (projected) p.w_hr[0] = p.w_hr[1] = &p;  // a plan asks only whether it is there
  CudaPlan plan{};
  check(cuda_plan(p, backward, tier, by_warp, plan));
  return plan;
}

// Who forms the products of tier `step`, where the kernel does not: a function of the caller's, or the vendor's
// library, for which no Python is needed.
struct Product {
  StepProduct form;
  bool python;
};
Product product_of(const CudaScanParams& p, const Arguments& a) {
  const py::object given = a.at("product");
  if (given.is_none()) return {nullptr, false};
  if (!py::isinstance<LibrarySteps>(given))
    return {[given](int64_t turn) { return pointer<const void>(given(turn)); }, true};
  const LibrarySteps& steps = given.cast<const LibrarySteps&>();
  return {[&steps, &p](int64_t turn) { return steps.product(p, turn); }, false};
}

// Errors of a scan come as text, those of a product as exceptions.
template <class F>
void run(const Product& product, F scan) {
  std::string error;
  if (product.python) {
    error = scan(product.form);
  } else {
    py::gil_scoped_release release;
    error = scan(product.form);
  }
  check(error);
}

void scan_forward(const CudaPlan& plan, int cell, int dtype, const py::tuple& sizes, const py::dict& named) {
  const Arguments a(named);
  const CudaScanParams p = scan_params(cell, dtype, sizes, a);
  run(product_of(p, a), [&](const StepProduct& product) { return cuda_scan_forward(p, plan, product); });
}

void scan_backward(const CudaPlan& plan, int cell, int dtype, const py::tuple& sizes, const py::dict& named) {
  const Arguments a(named);
  CudaScanGradParams p{};
  p.fwd = scan_params(cell, dtype, sizes, a);
  p.dy = a.rows("dy");
  p.dc_all = a.rows("dc_all");
  p.dh_n = a.pointer("dh_n");
  p.dc_n = a.pointer("dc_n");
  p.dgates = a.rows("dgates");
  p.dhn = a.rows("dhn");
  p.dh = a.rows("dh");
  p.dh0 = a.pointer("dh0");
  p.dc0 = a.pointer("dc0");
  run(product_of(p.fwd, a), [&](const StepProduct& product) { return cuda_scan_backward(p, plan, product); });
}

void previous(int cell, int dtype, const py::tuple& sizes, const py::dict& named) {
  const Arguments a(named);
  check(cuda_previous(scan_params(cell, dtype, sizes, a), a.rows("into")));
}

}  // namespace

PYBIND11_MODULE(FSQ_CUDA_MODULE, m) {
  m.doc() = "Fused sequence kernels for NVIDIA GPUs. fusedseq.backends.cuda is its caller.";
  m.attr("architectures") = FSQ_CUDA_ARCHS;
  m.attr("tiers") = py::make_tuple("step", "block", "cluster", "grid");
  m.def(
      "device",
      [] {
        CudaDevice d{};
        check(cuda_device(d));
        return py::make_tuple(d.capability, d.sm_count, d.shared_per_block, d.max_cluster);
      },
      "Of the current device: 10 x compute capability, SMs, shared memory of a block in bytes, CTAs of a cluster.");
  // The emulated module may be loaded beside the real one.
  py::class_<CudaPlan>(m, "Plan", py::module_local(), "How the current device runs a scan.")
      .def_property_readonly("tier", [](const CudaPlan& plan) { return int(plan.tier); })
      .def_readonly("ranks", &CudaPlan::ranks)
      .def_readonly("rows", &CudaPlan::rows)
      .def_readonly("units", &CudaPlan::units)
      .def_readonly("warps", &CudaPlan::warps)
      .def_readonly("holding", &CudaPlan::holding)
      .def_readonly("by_warp", &CudaPlan::by_warp)
      .def_readonly("shared", &CudaPlan::shared)
      .def_readonly("workspace", &CudaPlan::workspace)
      .def_readonly("packed", &CudaPlan::packed)
      .def_readonly("second_fed", &CudaPlan::second_fed)
      .def_readonly("zeroed", &CudaPlan::zeroed)
      .def_readonly("together", &CudaPlan::together)
      .def_readwrite("stuck", &CudaPlan::stuck);
  m.def("plan", &plan);
  m.def("scan_forward", &scan_forward);
  m.def("scan_backward", &scan_backward);
  m.def("previous", &previous);
  bind_cuda_cells(m);
  bind_cuda_attention(m);
  bind_cuda_barriers(m);
  bind_cuda_library(m);
}
