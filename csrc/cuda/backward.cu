// Backward: which kernels run, on which grid, with how much workspace.
#include "backward_persistent.cuh"
#include "backward_split.cuh"
#include "dispatch.cuh"
#include "sum_partials.cuh"

namespace bhyt::cuda {
namespace {

// One plan answers both questions of the binding: how much workspace, and what to launch.
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

int64_t persistent_shared_bytes(const Ladder& ladder) {
  return sizeof(SumSlots<float>) + sizeof(float) * kGainsApart * ladder.threads;
}

template <class Branch, class Stream, class Wanted>
cudaError_t run_persistent(const BackwardParams& p, const Plan& plan, const Partials<float>& out, const Device& device,
                           cudaStream_t on) {
  const auto constants = constants_of<Accumulate<Stream>>(p);
  const Ladder& ladder = plan.ladder;
  const Course course = course_of(p, plan);
  Grid grid;
  grid.blocks_x = plan.blocks;
  grid.blocks_y = ladder.parts;
  if (Wanted::sum) grid.cluster = ladder.parts;
  grid.threads_x = ladder.threads;
  grid.threads_y = ladder.groups;
  grid.shared_bytes = persistent_shared_bytes(ladder);
  grid.overlaps_last = device.hopper_or_later;
  grid.on = on;
  const auto run = [&](auto summed) {
    return launch(backward_rows_persistent<Branch, Stream, Wanted, summed>, grid, p, constants, ladder, course, out);
  };
  if constexpr (Wanted::writes)
    if (p.grad_sum.data) return run(std::true_type());
  return run(std::false_type());
}

template <class Branch, class Stream, class Wanted, bool wide>
cudaError_t run_split(const BackwardParams& p, const Plan& plan, const Partials<Accumulate<Stream>>& out,
                      cudaStream_t on) {
  const auto constants = constants_of<Accumulate<Stream>>(p);
  Grid grid;
  grid.on = on;
  if constexpr (Wanted::sum) {
    grid.blocks_x = ceil_div(p.rows, plan.ladder.groups);
    grid.threads_x = plan.ladder.threads;
    grid.threads_y = plan.ladder.groups;
    grid.shared_bytes = sizeof(SumSlots<Accumulate<Stream>>);
    const cudaError_t error = launch(backward_row_sums<Branch, Stream, wide>, grid, p, constants, plan.ladder, out);
    if (error != cudaSuccess) return error;
  }
  if constexpr (Wanted::writes || Wanted::grad_weight) {
    grid.blocks_x = plan.blocks;
    grid.blocks_y = plan.columns.blocks;
    grid.threads_x = plan.columns.threads;
    grid.threads_y = 1;
    grid.shared_bytes = 0;
    using Rest = bhyt::Wanted<Wanted::grad_x, false, Wanted::grad_weight>;
    return launch(backward_columns<Branch, Stream, Rest, wide>, grid, p, constants, plan.ladder.row_packs, out);
  }
  return cudaSuccess;
}

template <class Branch, class Stream, class Wanted>
cudaError_t run_rows(const BackwardParams& p, const Plan& plan, const Partials<Accumulate<Stream>>& out,
                     const Device& device, cudaStream_t on) {
  if constexpr (!std::is_same_v<Stream, double>) {
    if (plan.persistent) return run_persistent<Branch, Stream, Wanted>(p, plan, out, device, on);
    if (plan.wide) return run_split<Branch, Stream, Wanted, true>(p, plan, out, on);
  }
  return run_split<Branch, Stream, Wanted, false>(p, plan, out, on);
}

template <class A>
cudaError_t run_sums(const BackwardParams& p, const Plan& plan, const Partials<A>& in, const Device& device,
                     cudaStream_t on) {
  if (!p.grad_weight && !p.grad_lam) return cudaSuccess;
  Grid grid;
  grid.blocks_x = (p.grad_weight ? ceil_div(p.d, kStripe) : 0) + 1;
  grid.threads_x = kStripe;
  grid.threads_y = kSlices;
  grid.shared_bytes = sizeof(A) * kSumThreads;
  grid.overlaps_last = plan.persistent && device.hopper_or_later;
  grid.on = on;
  return launch(sum_partials<A>, grid, p, in);
}

}  // namespace

#ifdef __CUDACC__
ClusterKernel cluster_kernel() {
  const auto kernel = backward_rows_persistent<bf16, bf16, Wanted<GradX::after_sum, true, true>, false>;
  Ladder ladder;
  ladder.threads = kMaxThreads;
  return {reinterpret_cast<const void*>(kernel), kMaxThreads, persistent_shared_bytes(ladder)};
}
#endif

int64_t backward_workspace(const BackwardParams& p, const Device& device) {
  return plan_of(p, device).elements * size_of(accumulate_dtype(p.stream));
}

cudaError_t backward(const BackwardParams& p, void* workspace, const Device& device, cudaStream_t on) {
  if (!p.needs_g() && !p.grad_weight) return cudaSuccess;
  const Plan plan = plan_of(p, device);
  return with_types(p.branch, p.stream, [&](auto branch, auto stream) {
    using Branch = typename decltype(branch)::type;
    using Stream = typename decltype(stream)::type;
    using A = Accumulate<Stream>;
    const Partials<A> partials = partials_of<A>(p, plan, workspace);
    cudaError_t error = cudaSuccess;
    if (p.rows == 0 || p.d == 0) {  // nothing to add: run_sums writes zeros
      if (p.grad_variance_out && p.rows > 0)
        error = cudaMemsetAsync(p.grad_variance_out, 0, p.rows * sizeof(A), on);
    } else {
      error = with_wanted(p, [&](auto wanted) {
        return run_rows<Branch, Stream, decltype(wanted)>(p, plan, partials, device, on);
      });
    }
    return error == cudaSuccess ? run_sums<A>(p, plan, partials, device, on) : error;
  });
}

}  // namespace bhyt::cuda
