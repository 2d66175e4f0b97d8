// The tiers as the dispatcher sees them, and what their launchers share. Errors are text, empty where all is well.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <string>
#include <type_traits>

#include "cuda/launch.h"
#include "cuda/value.cuh"
#include "fusedseq.h"

namespace fusedseq {
namespace FSQ_ISA {

inline std::string describe(const CudaScanParams& p) {
  static const char* const cells[] = {"lstm", "gru", "gru_reset_before", "rnn_tanh", "rnn_relu"};
  static const char* const dtypes[] = {"float32", "float64", "bfloat16", "float16"};
  std::string text = std::string(cells[int(p.cell)]) + " " + dtypes[int(p.dtype)];
  if (p.dtype == DType::f32 && p.tf32) text += " tf32";
  const auto add = [&](const char* name, int64_t n) { text += std::string(" ") + name + "=" + std::to_string(n); };
  add("T", p.T), add("B", p.B), add("H", p.H), add("R", p.R), add("D", p.D);
  return text;
}

// f(e) with e of the element type.
template <class F>
auto for_element(DType dtype, F f) {
  switch (dtype) {
    case DType::f64:
      return f(double());
    case DType::bf16:
      return f(__nv_bfloat16());
    case DType::f16:
      return f(__half());
    default:
      return f(float());
  }
}
// The same of a scan's operands, which may be narrower than its elements.
template <class F>
auto for_operand(const CudaScanParams& p, F f) {
  if (p.dtype == DType::f32 && p.tf32) return f(Tf32());
  return for_element(p.dtype, f);
}
template <Cell C>
using CellConstant = std::integral_constant<Cell, C>;
// f(c) with decltype(c)::value the cell, rnn_tanh for both activations of an RNN.
template <class F>
auto for_cell(Cell cell, F f) {
  switch (cell) {
    case Cell::lstm:
      return f(CellConstant<Cell::lstm>());
    case Cell::gru:
      return f(CellConstant<Cell::gru>());
    case Cell::gru_reset_before:
      return f(CellConstant<Cell::gru_reset_before>());
    default:
      return f(CellConstant<Cell::rnn_tanh>());
  }
}

int64_t step_workspace(const CudaScanParams& p, bool backward);
std::string step_forward(const CudaScanParams& p);
std::string step_backward(const CudaScanGradParams& p);
// Shared memory of a CTA under this plan.
int block_bytes(const CudaScanParams& p, const CudaPlan& plan, bool backward);
std::string block_forward(const CudaScanParams& p, const CudaPlan& plan);
std::string block_backward(const CudaScanGradParams& p, const CudaPlan& plan);
// Whether the device can hold one of its clusters at all.
bool cluster_possible(const CudaScanParams& p, const CudaPlan& plan, bool backward);
int cluster_bytes(const CudaScanParams& p, const CudaPlan& plan, bool backward);
std::string cluster_forward(const CudaScanParams& p, const CudaPlan& plan);
std::string cluster_backward(const CudaScanGradParams& p, const CudaPlan& plan);
int grid_bytes(const CudaScanParams& p, const CudaPlan& plan, bool backward);
int64_t grid_workspace(const CudaScanParams& p, const CudaPlan& plan, bool backward);
std::string grid_forward(const CudaScanParams& p, const CudaPlan& plan);
std::string grid_backward(const CudaScanGradParams& p, const CudaPlan& plan);

}  // namespace FSQ_ISA
}  // namespace fusedseq
