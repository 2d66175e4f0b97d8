// The launchers of attention's backward pass. Errors are text, empty where all is well.
#pragma once
#include "cuda/attention.h"

namespace fusedseq {
namespace FSQ_ISA {

// lse2 and delta of every row; what comes after needs them.
std::string attention_delta(const CudaAttentionGradParams& g);
std::string attention_backward_queries(const CudaAttentionGradParams& g);     // dq, and slopes
std::string attention_backward_keys(const CudaAttentionGradParams& g);        // dk, dv
std::string attention_backward_keys_pairs(const CudaAttentionGradParams& g);  // the same, of heads wider than 64
// The same two for Hopper, of calls that cuda_attention_backward_hopper_refuses has nothing against.
std::string attention_hopper_queries(const CudaAttentionGradParams& g, int sm_count);
std::string attention_hopper_keys(const CudaAttentionGradParams& g, int sm_count);
std::string attention_backward_bias(const CudaAttentionGradParams& g);   // dbias
std::string attention_backward_heads(const CudaAttentionGradParams& g);  // dalibi from slopes, dsinks

// Bytes of shared memory that a CTA takes for heads and dropout as in `p`, in calls with all that there may be.
int attention_backward_queries_bytes(const AttentionParams& p);
int attention_backward_keys_bytes(const AttentionParams& p);
int attention_backward_keys_pairs_bytes(const AttentionParams& p);
int attention_backward_bias_bytes(const AttentionParams& p);

}  // namespace FSQ_ISA
}  // namespace fusedseq
