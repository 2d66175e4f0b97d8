#pragma once
#include <pybind11/pybind11.h>

#include "fusedseq.h"

namespace fusedseq {

// The row of the ISA table in use.
const CpuTable& active_row();
// Adds attention_forward, attention_backward and PlainAttention to the module.
void bind_attention(pybind11::module_& m);

}  // namespace fusedseq
