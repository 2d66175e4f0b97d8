#pragma once
#include <pybind11/pybind11.h>

namespace fusedseq {

// Adds what measures barriers to the module: barriers, barrier_workspace, barrier_rounds, assumed_clocks.
void bind_cuda_barriers(pybind11::module_& m);

}  // namespace fusedseq
