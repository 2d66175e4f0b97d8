// The loops that measure barriers, for bench/barriers.py.
#include "bind/cuda/costs.h"

#include "bind/cuda/arguments.h"
#include "cuda/barrier_costs.h"

namespace py = pybind11;

namespace fusedseq {
namespace {

void barrier_loop(int kind, int ctas, int threads, int rounds, int units, bool handed, const py::dict& named) {
  const Arguments a(named);
  BarrierParams p{};
  p.kind = Barrier(kind);
  p.ctas = ctas;
  p.threads = threads;
  p.rounds = rounds;
  p.units = units;
  p.handed = handed;
  p.ns = a.pointer<uint64_t>("ns");
  p.clocks = a.pointer<uint64_t>("clocks");
  p.word = a.pointer<uint32_t>("word");
  p.workspace = a.pointer("workspace");
  p.stream = a.pointer("stream");
  std::string error;
  {
    py::gil_scoped_release release;
    error = barrier_rounds(p);
  }
  check(error);
}

int64_t workspace(int kind, int ctas, int units) {
  BarrierParams p{};
  p.kind = Barrier(kind);
  p.ctas = ctas;
  p.units = units;
  return barrier_workspace(p);
}

}  // namespace

void bind_cuda_barriers(py::module_& m) {
  m.attr("barriers") = py::make_tuple("block", "cluster", "cluster_exchange", "flag", "grid_exchange", "grid",
                                      "warp_exchange_4", "warp_exchange_8");
  m.def(
      "assumed_clocks", [](int tier, int ranks) { return exchange_clocks(CudaTier(tier), ranks); },
      "What the choice of a tier assumes for the exchanges of a step.");
  m.def("barrier_workspace", &workspace, "Bytes of zeros that the loop needs.");
  m.def("barrier_rounds", &barrier_loop);
}

}  // namespace fusedseq
