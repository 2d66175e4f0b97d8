// The tiers as the dispatcher sees them, and what their launchers share. Errors are text, empty where all is well.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <initializer_list>
#include <string>
#include <type_traits>
#include <utility>

#include "cuda/launch.h"
#include "cuda/surface.h"
#include "cuda/value.cuh"
#include "fusedseq.h"

namespace fusedseq {
namespace FSQ_ISA {

// Warps that share a tile of 16 units and split its terms.
inline __host__ __device__ int parts_of(const CudaPlan& plan) { return plan.warps / (plan.units / 16); }

// What a CTA is compiled for: warps, rows, (row, unit) pairs of a thread, registers of a thread for weights, and
// whether these are packed in global memory.
struct Wide {
  static constexpr int kWarps = 8, kRows = 16, kElements = 4, kHeld = 0;
  static constexpr bool kPacked = false;
};
struct Streaming : Wide {
  static constexpr bool kPacked = true;
};
// 256 threads have 255 registers each. All else needs about 160 of them, so 88 hold weights: of an LSTM's 4 gates by 5
// tiles of 16 terms.
struct Holding {
  static constexpr int kWarps = 8, kRows = 8, kElements = 2, kHeld = 88;
  static constexpr bool kPacked = false;
};
// Tiles of 16 terms that a warp of this shape holds of a panel with so many gates.
template <class Shape, int Gates>
constexpr int kHeldTiles = Shape::kHeld / (4 * Gates);

// "lstm float32 B=3 H=5", with what else decides about the kernel after the type.
inline std::string describe(Cell cell, DType dtype, std::initializer_list<std::pair<const char*, int64_t>> sizes,
                            const char* more = "") {
  static const char* const cells[] = {"lstm", "gru", "gru_reset_before", "rnn_tanh", "rnn_relu"};
  static const char* const dtypes[] = {"float32", "float64", "bfloat16", "float16"};
  std::string text = std::string(cells[int(cell)]) + " " + dtypes[int(dtype)] + more;
  for (const auto& [name, n] : sizes) text += std::string(" ") + name + "=" + std::to_string(n);
  return text;
}
inline std::string describe(const CudaScanParams& p) {
  return describe(p.cell, p.dtype, {{"T", p.T}, {"B", p.B}, {"H", p.H}, {"R", p.R}, {"D", p.D}},
                  p.dtype == DType::f32 && p.tf32 ? " tf32" : "");
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

// second_fed: where in the workspace what every other product takes lies; what the others take is where it begins.
int64_t step_workspace(const CudaScanParams& p, bool backward, int64_t* second_fed = nullptr);
std::string step_forward(const CudaScanParams& p, const StepProduct& product);
std::string step_backward(const CudaScanGradParams& p, const StepProduct& product);
// Shared memory of a CTA under this plan.
int block_bytes(const CudaScanParams& p, const CudaPlan& plan, bool backward);
std::string block_forward(const CudaScanParams& p, const CudaPlan& plan);
std::string block_backward(const CudaScanGradParams& p, const CudaPlan& plan);
// Clusters that the device holds at a time, 0 if it cannot hold one.
int cluster_resident(const CudaScanParams& p, const CudaPlan& plan, bool backward);
int cluster_bytes(const CudaScanParams& p, const CudaPlan& plan, bool backward);
std::string cluster_forward(const CudaScanParams& p, const CudaPlan& plan);
std::string cluster_backward(const CudaScanGradParams& p, const CudaPlan& plan);
// The kernels of warp_scan.cuh: units of a rank, and whether they have the scan's cell, type and size.
int warp_units(Cell cell);
bool warp_takes(const CudaScanParams& p);
int warp_resident(const CudaScanParams& p, const CudaPlan& plan, bool backward);
int warp_bytes(const CudaScanParams& p, const CudaPlan& plan, bool backward);
std::string warp_scan_forward(const CudaScanParams& p, const CudaPlan& plan);
std::string warp_scan_backward(const CudaScanGradParams& p, const CudaPlan& plan);
int grid_bytes(const CudaScanParams& p, const CudaPlan& plan, bool backward);
// A plan that has weights packed is told where.
int64_t grid_workspace(const CudaScanParams& p, CudaPlan& plan, bool backward);
std::string grid_forward(const CudaScanParams& p, const CudaPlan& plan);
std::string grid_backward(const CudaScanGradParams& p, const CudaPlan& plan);

}  // namespace FSQ_ISA
}  // namespace fusedseq
