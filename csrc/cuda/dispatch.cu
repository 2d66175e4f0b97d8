// Which tier runs a scan on the device at hand.
#include "cuda/barrier_costs.h"
#include "cuda/scan.h"
#include "cuda/share.cuh"
#include "cuda/surface.h"

namespace fusedseq {

using namespace FSQ_ISA;

namespace {

const char* const kTiers[] = {"step", "block", "cluster", "grid"};

int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// A warp has a tile of 16 units to itself; where there are few, several warps share one and split its terms.
int warps_for(int units) {
  const int tiles = units / 16;
  return tiles >= 8 ? tiles : tiles * (8 / tiles);
}

// Groups that the device runs at a time.
int64_t resident(const CudaScanParams& p, const Device& device, const CudaPlan& plan, bool backward) {
  return plan.tier == CudaTier::cluster ? cluster_resident(p, plan, backward) : device.sm_count / plan.ranks;
}

// Clocks of a step: what an exchange costs, and the longer of what a CTA reads from shared memory (weights that no
// register holds, and the state once for each tile of units, at 128 bytes a clock) and what it multiplies; times the
// turns in which the device takes all groups. Multiplications a clock: 128 in float32, and by mma.sync about two thirds
// of what wgmma does on Hopper.
double step_clocks(const CudaScanParams& p, bool backward, const CudaPlan& plan, int64_t together) {
  const int64_t groups = groups_of(p, plan);
  const double turns = double(up(groups, together) / together);
  const bool single = p.dtype == DType::f32, before = p.cell == Cell::gru_reset_before;
  // Gates side by side in forward; in backward gate gradients one after the other.
  const int gates = gate_count(p.cell), first = before ? 2 : gates, side = backward ? 1 : first;
  const double terms = double(backward ? first : 1) * plan.ranks * plan.units;
  const double most = plan.holding ? double(Holding::kHeld / (4 * side)) * parts_of(plan) * 16 : 0;
  const double held = side * plan.units * (most < terms ? most : terms);
  const double weights = double(gates) * plan.units * plan.ranks * plan.units;
  const double state = plan.units / 16 * plan.rows * terms * (before ? 1.5 : 1);
  const double through = (single ? 4 : 2) * state / 128;
  // Packed weights come through L2 at every step, some 25 bytes a clock for each SM, from memory if they are many.
  const double unique = 2.0 * gates * plan.ranks * plan.units * plan.ranks * plan.units * double(p.D);
  const double rate_of_weights = !plan.packed ? 128 : unique < 40e6 ? 25 : 16;
  // So does the state of all ranks in tier grid.
  const double filled = plan.tier == CudaTier::grid ? (single ? 4 : 2) * plan.rows * terms / 25 : 0;
  const double read = through + filled + (single ? 4 : 2) * (weights - held) / rate_of_weights;
  const double rate = !single ? 1300 : p.tf32 ? 650 : 128, multiplied = weights * plan.rows / rate;
  return turns * (exchange_clocks(plan.tier, plan.ranks) + (read > multiplied ? read : multiplied));
}

// The same of kernels whose warps go their own way. All that a rank receives comes at some 16 bytes a clock; each warp
// reads the state of all ranks, backward the gate gradients of its own, for 8 rows that it multiplies.
double warp_clocks(const CudaScanParams& p, bool backward, const CudaPlan& plan, int64_t together) {
  const int64_t groups = groups_of(p, plan);
  const double turns = double(up(groups, together) / together), all = double(plan.ranks) * plan.units;
  const int bytes = p.dtype == DType::f32 ? 4 : 2;
  const double received = all * plan.rows * (backward ? 4 : bytes) / 16;
  const double slots = gate_count(p.cell) > 1 ? 4 : 1, terms = backward ? slots * plan.units : all;
  const double read = plan.warps * terms * plan.rows * bytes / 128;
  const double multiplied = slots * plan.units * all * 8 / (bytes == 4 ? 650 : 1300);
  return turns * (kWarpExchangeClocks + received + (read > multiplied ? read : multiplied));
}

int bytes_of(const CudaScanParams& p, const CudaPlan& plan, bool backward) {
  return plan.tier == CudaTier::block     ? block_bytes(p, plan, backward)
         : plan.tier == CudaTier::cluster ? cluster_bytes(p, plan, backward)
                                          : grid_bytes(p, plan, backward);
}

// The kernels whose warps go their own way: whether they take the scan.
bool fit_by_warp(const CudaScanParams& p, bool backward, const Device& device, CudaPlan& plan, double& best) {
  CudaPlan one{};
  one.tier = CudaTier::cluster;
  one.stuck = -1;
  one.by_warp = true;
  one.warps = 8;
  one.units = warp_units(p.cell);
  one.ranks = p.H > one.units ? int((p.H + one.units - 1) / one.units) : 2;  // one has no asynchronous stores
  if (!warp_takes(p) || one.ranks > device.max_cluster) return false;
  best = 0;
  for (int rows : {8, 4}) {
    one.rows = rows;
    one.shared = warp_bytes(p, one, backward);
    const int64_t together = one.shared > device.shared_per_block ? 0 : warp_resident(p, one, backward);
    if (!together) continue;
    const double clocks = warp_clocks(p, backward, one, together);
    if (best && clocks >= best) continue;
    best = clocks;
    plan = one;
  }
  return best > 0;
}

// Why this tier does not take the scan, empty if it does; fills in the plan and the clocks of a step.
std::string fit(const CudaScanParams& p, bool backward, const Device& device, CudaTier tier, bool by_warp,
                CudaPlan& plan, double& best) {
  CudaPlan one{};
  one.tier = tier;
  one.stuck = -1;
  if (tier == CudaTier::step) {
    one.ranks = 1;
    one.workspace = step_workspace(p, backward, &one.second_fed);
    plan = one;
    return "";
  }
  if (p.dtype == DType::f64) return "float64 has no kernel that keeps its weights";
  if (p.w_hr[0]) return "a projection needs a second product";
  if (tier == CudaTier::cluster && device.max_cluster < 2) return "the device has no clusters";
  if (tier == CudaTier::cluster && by_warp && fit_by_warp(p, backward, device, plan, best)) return "";
  const int fewest = tier == CudaTier::block ? 1 : 2;
  const int most = tier == CudaTier::block ? 1 : tier == CudaTier::cluster ? device.max_cluster : device.sm_count;
  best = 0;
  for (int ranks = fewest; ranks <= most; ++ranks) {
    one.units = int(up((p.H + ranks - 1) / ranks, 16));
    one.warps = warps_for(one.units);
    one.ranks = int((p.H + one.units - 1) / one.units);
    if (one.ranks != ranks || one.warps > Wide::kWarps) continue;
    // Rows of a tile; weights in shared memory, of which a part may be in registers, or packed.
    for (int shape : {0, 1, 2, 3, 4}) {
      one.rows = shape % 3 ? 8 : 16;
      one.holding = shape == 2;
      one.packed = shape > 2;
      one.workspace = 0;
      if (one.packed && (tier != CudaTier::grid || p.dtype == DType::f32)) continue;
      if (one.rows == 16 && p.B <= 8) continue;
      const int elements = one.holding ? Holding::kElements : Wide::kElements;
      if (one.rows * one.units > 32 * one.warps * elements) continue;
      if (one.holding && (p.dtype == DType::f32 || tier == CudaTier::grid || one.warps > Holding::kWarps)) continue;
      one.shared = bytes_of(p, one, backward);
      if (one.shared > device.shared_per_block) continue;
      const int64_t together = resident(p, device, one, backward);
      if (!together) continue;
      const double clocks = step_clocks(p, backward, one, together);
      if (best && clocks >= best) continue;
      if (tier == CudaTier::grid) {
        one.together = together;
        one.workspace = grid_workspace(p, one, backward);
        one.zeroed = true;
      }
      best = clocks;
      plan = one;
    }
  }
  return best ? "" : "the weights do not fit into shared memory";
}

}  // namespace

std::string cuda_device(CudaDevice& device) {
  Device d;
  const std::string error = query(d);
  if (error.empty()) device = {d.capability, d.sm_count, d.shared_per_block, d.max_cluster};
  return error;
}

std::string cuda_plan(const CudaScanParams& p, bool backward, int tier, bool by_warp, CudaPlan& plan) {
  Device device;
  const std::string error = query(device);
  if (!error.empty()) return error;
  double clocks = 0;
  if (tier >= 0) {
    const std::string why = fit(p, backward, device, CudaTier(tier), by_warp, plan, clocks);
    return why.empty() ? why : std::string("tier ") + kTiers[tier] + " refuses " + describe(p) + ": " + why;
  }
  bool found = false;
  double best = 0;
  for (CudaTier one : {CudaTier::block, CudaTier::cluster, CudaTier::grid}) {
    CudaPlan other{};
    if (!fit(p, backward, device, one, by_warp, other, clocks).empty() || (found && clocks >= best)) continue;
    found = true;
    best = clocks;
    plan = other;
  }
  return found ? "" : fit(p, backward, device, CudaTier::step, by_warp, plan, clocks);
}

std::string cuda_scan_forward(const CudaScanParams& p, const CudaPlan& plan, const StepProduct& product) {
  switch (plan.tier) {
    case CudaTier::block:
      return block_forward(p, plan);
    case CudaTier::cluster:
      return plan.by_warp ? warp_scan_forward(p, plan) : cluster_forward(p, plan);
    case CudaTier::grid:
      return grid_forward(p, plan);
    default:
      return step_forward(p, product);
  }
}

std::string cuda_scan_backward(const CudaScanGradParams& p, const CudaPlan& plan, const StepProduct& product) {
  switch (plan.tier) {
    case CudaTier::block:
      return block_backward(p, plan);
    case CudaTier::cluster:
      return plan.by_warp ? warp_scan_backward(p, plan) : cluster_backward(p, plan);
    case CudaTier::grid:
      return grid_backward(p, plan);
    default:
      return step_backward(p, product);
  }
}

}  // namespace fusedseq
