#pragma once
#include <pybind11/pybind11.h>

namespace fusedseq {

// Adds the forward and backward of layer_norm and bias_activation to the module.
void bind_rows(pybind11::module_& m);

}  // namespace fusedseq
