// What a backward launches: one plan answers how much workspace, and which kernels on which grid.
#pragma once

#include "backward_ring.cuh"
#include "dispatch.cuh"

namespace bhyt::cuda {
namespace {

struct Plan {
  Ladder ladder;
  Columns columns;
  bool wide = false;
  bool persistent = false;
  int64_t blocks = 0;      // along the rows
  int64_t weight_at = 0;   // offsets into the workspace, in accumulate elements
  int64_t lam_at = 0;
  int64_t row_sums_at = 0;
  int64_t elements = 0;
};

bool tuned_weight(const BackwardParams& p) {
  return p.weight.data == nullptr || p.weight.dtype == p.branch || p.weight.dtype == DType::f32;
}

Plan plan_of(const BackwardParams& p, const Device& device) {
  Plan plan;
  if (p.rows == 0 || p.d == 0) return plan;
  plan.ladder = backward_ladder(p.d, p.stream);
  plan.columns = columns_for(p.d, p.stream);
  plan.wide = p.stream != DType::f64 && is_wide(p);
  const int64_t resident = plan.ladder.fits_a_cluster() ? persistent_blocks(plan.ladder, device) : 0;
  plan.persistent = plan.wide && tuned_weight(p) && resident > 0;
  if (plan.persistent) {
    plan.blocks = even_blocks(p.rows, plan.ladder.groups, resident);
  } else {
    plan.blocks = std::min(p.rows, ceil_div(16 * int64_t(device.multiprocessors), plan.columns.blocks));
  }
  const int64_t lam_count = plan.persistent ? plan.blocks : p.rows;
  plan.lam_at = p.grad_weight ? plan.blocks * p.d : 0;
  plan.row_sums_at = plan.lam_at + (p.grad_lam ? lam_count : 0);
  plan.elements = plan.row_sums_at + (plan.persistent || !p.needs_sums() ? 0 : p.rows);
  return plan;
}

// Whether the blocks of the rows add the partial sums too, where that is asked for.
bool fits_one_launch(const BackwardParams& p, const Plan& plan) {
  return plan.persistent && (p.grad_weight || p.grad_lam);
}

int64_t persistent_shared_bytes(const Ladder& ladder) {
  return sizeof(SumSlots<float>) + sizeof(float) * kGainsApart * ladder.threads;
}

// A row's part of x and of grad_y.
int64_t ring_stage_bytes(const Ladder& ladder) { return 2 * int64_t(ladder.packs) * ladder.threads * 16; }

// Rows of the ring of backward_ring.cuh: 3, or 2 where they are long; 0 where it does not suit. Its rows are those of
// clusters, so that all threads of a block work on one; x and grad_y are alike; and a row has a sum and a grad_x.
int ring_stages(const BackwardParams& p, const Plan& plan, const Device& device) {
  const Ladder& ladder = plan.ladder;
  if (!plan.persistent || ladder.parts == 1 || p.branch != p.stream || !p.needs_sums() || !p.grad_x) return 0;
  const int64_t left = device.shared_bytes - persistent_shared_bytes(ladder) - kInboxBytes;
  const int64_t stages = left / ring_stage_bytes(ladder);
  return stages < 2 ? 0 : static_cast<int>(std::min<int64_t>(stages, kMostStages));
}

template <class A>
Partials<A> partials_of(const BackwardParams& p, const Plan& plan, void* workspace) {
  A* const base = static_cast<A*>(workspace);
  Partials<A> out;
  if (p.grad_weight) out.weight = base + plan.weight_at;
  if (p.grad_lam) out.lam = base + plan.lam_at;
  out.row_sums = base + plan.row_sums_at;
  out.count = plan.blocks;
  out.lam_count = plan.persistent ? plan.blocks : plan.elements ? p.rows : 0;
  return out;
}

// A group has fewer than 2^31 rows: no memory holds that many rows for each group of a GPU.
Course course_of(const BackwardParams& p, const Plan& plan) {
  const int64_t step = plan.blocks * plan.ladder.groups;
  Course course;
  course.turns = static_cast<int>(p.rows / step);
  course.more = p.rows % step;
  course.x = step * p.x.stride * size_of(p.stream);
  course.grad_y = step * p.grad_y.stride * size_of(p.branch);
  course.grad_sum = step * p.grad_sum.stride * size_of(p.stream);
  course.grad_x = step * p.d * size_of(p.stream);
  course.statistics = step * static_cast<int64_t>(sizeof(float));
  const void* const with_variance = p.exact ? p.grad_variance : p.grad_variance_out;
  course.has_grad_variance = with_variance != nullptr;
  if (with_variance) {
    course.to_grad_variance = static_cast<const char*>(with_variance) - static_cast<const char*>(p.variance);
    if (!p.exact) course.to_grad_variance -= course.statistics;
  }
  course.needs_sums = p.needs_sums();
  const Ladder& ladder = plan.ladder;
  course.packs = static_cast<int>(ladder.row_packs / ladder.threads);
  course.more_lanes = static_cast<int>(ladder.row_packs % ladder.threads);
  course.groups_at_once = ladder.threads < 32 ? 32 / ladder.threads : 1;
  course.group_turns = static_cast<int>(ceil_div(ladder.groups, course.groups_at_once));
  return course;
}

// The persistent kernel's grid. sums: of rows, so that a cluster's blocks exchange theirs.
Grid persistent_grid(const Plan& plan, bool sums, const Device& device, cudaStream_t on) {
  const Ladder& ladder = plan.ladder;
  Grid grid;
  grid.blocks_x = plan.blocks;
  grid.blocks_y = ladder.parts;
  if (sums) grid.cluster = ladder.parts;
  grid.threads_x = ladder.threads;
  grid.threads_y = ladder.groups;
  grid.shared_bytes = persistent_shared_bytes(ladder);
  grid.overlaps_last = device.hopper_or_later;
  grid.on = on;
  return grid;
}

// f(whether a grad_sum is added to grad_x)
template <class Wanted, class F>
cudaError_t with_summed(const BackwardParams& p, F&& f) {
  if constexpr (Wanted::writes)
    if (p.grad_sum.data) return f(std::true_type());
  return f(std::false_type());
}

}  // namespace

// The rows of the variants, each a translation unit of its own; that of one launch adds the partial sums too.
cudaError_t backward_one_launch(const BackwardParams& p, void* workspace, const Device& device, cudaStream_t on,
                                int ticket);
cudaError_t backward_ring(const BackwardParams& p, void* workspace, const Device& device, cudaStream_t on);

}  // namespace bhyt::cuda
