// What every ISA build of the families exports.
#pragma once
#include "fusedseq.h"

namespace fusedseq {
namespace FSQ_ISA {

Status lstm_forward(const ScanParams& p);
Status lstm_backward(const ScanGradParams& p);
int64_t lstm_pack(const ScanParams& p, void* const* into);
Status gru_forward(const ScanParams& p);
Status gru_backward(const ScanGradParams& p);
int64_t gru_pack(const ScanParams& p, void* const* into);
Status gru_reset_before_forward(const ScanParams& p);
Status gru_reset_before_backward(const ScanGradParams& p);
int64_t gru_reset_before_pack(const ScanParams& p, void* const* into);
Status rnn_forward(const ScanParams& p);
Status rnn_backward(const ScanGradParams& p);
int64_t rnn_pack(const ScanParams& p, void* const* into);
Status attention_forward(const AttentionParams& p);
Status attention_backward(const AttentionGradParams& p);
Status layer_norm_forward(const LayerNormParams& p);
Status layer_norm_backward(const LayerNormGradParams& p);
Status bias_activation_forward(const BiasActivationParams& p);
Status bias_activation_backward(const BiasActivationGradParams& p);
Status linear_forward(const LinearParams& p);
Status linear_backward(const LinearGradParams& p);

}  // namespace FSQ_ISA
}  // namespace fusedseq
