// The pointwise part of one step on a GPU: matrices by name, each as its address, row stride and column stride.
#include "bind/cuda/cells.h"

#include "bind/cuda/arguments.h"
#include "cuda/surface.h"

namespace py = pybind11;

namespace fusedseq {
namespace {

template <class P>
P sized(int cell, int dtype, int phase, int64_t B, int64_t H, const Arguments& a) {
  P p{};
  p.cell = Cell(cell);
  p.dtype = DType(dtype);
  p.phase = phase;
  p.B = B;
  p.H = H;
  p.stream = a.pointer("stream");
  return p;
}

template <class P>
bool run(std::string (*f)(const P&, bool&), const P& p) {
  bool wide = false;
  std::string error;
  {
    py::gil_scoped_release release;
    error = f(p, wide);
  }
  check(error);
  return wide;
}

bool cell_forward(int cell, int dtype, int phase, int64_t B, int64_t H, const py::dict& named) {
  const Arguments a(named);
  CudaCellParams p = sized<CudaCellParams>(cell, dtype, phase, B, H, a);
  p.gx = a.strided("gx");
  p.gh = a.strided("gh");
  p.b_ih = a.strided("b_ih");
  p.b_hh = a.strided("b_hh");
  p.h = a.strided("h");
  p.c = a.strided("c");
  p.h_new = a.strided("h_new");
  p.c_new = a.strided("c_new");
  p.kept = a.strided("kept");
  return run(&cuda_cell_forward, p);
}

bool cell_backward(int cell, int dtype, int phase, int64_t B, int64_t H, const py::dict& named) {
  const Arguments a(named);
  CudaCellGradParams p = sized<CudaCellGradParams>(cell, dtype, phase, B, H, a);
  p.kept = a.strided("kept");
  p.y = a.strided("y");
  p.h = a.strided("h");
  p.c = a.strided("c");
  p.dh = a.strided("dh");
  p.dc = a.strided("dc");
  p.drh = a.strided("drh");
  p.dgates = a.strided("dgates");
  p.dinner = a.strided("dinner");
  p.dh_past = a.strided("dh_past");
  p.dc_past = a.strided("dc_past");
  return run(&cuda_cell_backward, p);
}

}  // namespace

void bind_cuda_cells(py::module_& m) {
  m.def("cell_forward", &cell_forward, "Whether it moved 16 bytes at a time.");
  m.def("cell_backward", &cell_backward, "Whether it moved 16 bytes at a time.");
}

}  // namespace fusedseq
