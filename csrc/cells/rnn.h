// Elman RNN cell (Elman 1990), one step: h = act(a), act = tanh or relu. Backward needs the output alone.
#pragma once
#include "cells/math.h"

namespace fusedseq {
namespace FSQ_ISA {

template <bool kRelu, class V, class Act>
FSQ_INLINE V rnn_fwd(V a, Act act) {
  return kRelu ? act.relu(a) : act.state(a);
}

template <bool kRelu, class V, class Act>
FSQ_INLINE V rnn_bwd(V h, V dh, Act act) {
  return dh * (kRelu ? act.d_relu(h) : act.d_state(h));
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
