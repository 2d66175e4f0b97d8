// What the CUDA backend offers to its Python module; no CUDA header needed. Errors are text, empty where all is well.
#pragma once
#include <functional>
#include <string>

#include "fusedseq.h"

namespace fusedseq {

struct CudaDevice {
  int capability;  // 80, 90
  int sm_count;
  int shared_per_block;  // bytes that a CTA may have
  int max_cluster;       // CTAs
};

// The current device.
std::string cuda_device(CudaDevice& device);
// How this device would run the scan. `tier` below 0 chooses the fastest tier that takes it, else it must be that one.
// by_warp: tier cluster is the kernels of warp_scan.cuh, for what these take.
std::string cuda_plan(const CudaScanParams& p, bool backward, int tier, bool by_warp, CudaPlan& plan);
// Tier `step`, where the caller forms the recurrent products: the address of the product of a turn, enqueued on the
// same stream, in the compute type. Forward: h W_hh^T [D,B,G*H], h [D,B,R] lying at the front of the workspace in even
// turns, at CudaPlan::second_fed in odd ones; backward: gate gradients [D,B,G*H], of a GRU with the third as it meets
// W_hn, times W_hh: [D,B,R]. Not for a GRU that resets before the product.
typedef std::function<const void*(int64_t turn)> StepProduct;
std::string cuda_scan_forward(const CudaScanParams& p, const CudaPlan& plan, const StepProduct& product = nullptr);
std::string cuda_scan_backward(const CudaScanGradParams& p, const CudaPlan& plan, const StepProduct& product = nullptr);
// into [T,B,D*R]: the h that entered each step, 0 where it was reset or the row is past its length.
std::string cuda_previous(const CudaScanParams& p, const Rows& into);
// The pointwise part of a cell. `wide` becomes whether it moved 16 bytes at a time, which takes rows that are dense,
// aligned to 16 bytes and of a multiple of as many units.
std::string cuda_cell_forward(const CudaCellParams& p, bool& wide);
std::string cuda_cell_backward(const CudaCellGradParams& p, bool& wide);
std::string cuda_attention_forward(const CudaAttentionParams& p);
// The forward kernel for Hopper, and why it would not take a call, empty if it would.
std::string cuda_attention_hopper(const CudaAttentionParams& p);
std::string cuda_attention_hopper_refuses(const CudaAttentionParams& p);
std::string cuda_attention_backward(const CudaAttentionGradParams& p);
// The same with the kernels for Hopper, and why they would not take a call.
std::string cuda_attention_backward_hopper(const CudaAttentionGradParams& p);
std::string cuda_attention_backward_hopper_refuses(const CudaAttentionGradParams& p);
// Bytes of shared memory that a CTA of the backward pass takes; of `p` it reads sizes, dtype, dropout and whether there
// is a bias.
int cuda_attention_backward_bytes(const AttentionParams& p);

}  // namespace fusedseq
