// The launchers of attention's backward pass. Errors are text, empty where all is well.
#pragma once
#include "cuda/attention.h"

namespace fusedseq {
namespace FSQ_ISA {

// lse2 and delta of every row; what comes after needs them.
std::string attention_delta(const CudaAttentionGradParams& g);
std::string attention_backward_queries(const CudaAttentionGradParams& g);  // dq, and slopes
std::string attention_backward_keys(const CudaAttentionGradParams& g);     // dk, dv
std::string attention_backward_bias(const CudaAttentionGradParams& g);     // dbias
std::string attention_backward_heads(const CudaAttentionGradParams& g);    // dalibi from slopes, dsinks

}  // namespace FSQ_ISA
}  // namespace fusedseq
