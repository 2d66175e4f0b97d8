#pragma once
#include <pybind11/pybind11.h>

namespace fusedseq {

// Adds cell_forward and cell_backward, the pointwise part of one step, to the module.
void bind_cuda_cells(pybind11::module_& m);

}  // namespace fusedseq
