#pragma once
#include <pybind11/pybind11.h>

namespace fusedseq {

// Adds attention_forward to the module.
void bind_cuda_attention(pybind11::module_& m);

}  // namespace fusedseq
