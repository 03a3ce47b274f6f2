// Backward: which kernels run, on which grid, with how much workspace.
#include "backward_plan.cuh"
#include "backward_split.cuh"
#include "sum_partials.cuh"
#include "tickets.h"

namespace bhyt::cuda {
namespace {

template <class Branch, class Stream, class Wanted>
cudaError_t run_persistent(const BackwardParams& p, const Plan& plan, const Partials<float>& out, const Device& device,
                           cudaStream_t on) {
  const auto constants = constants_of<Accumulate<Stream>>(p);
  const Grid grid = persistent_grid(plan, Wanted::sum, device, on);
  return with_summed<Wanted>(p, [&](auto summed) {
    return launch(backward_rows_persistent<Branch, Stream, Wanted, summed>, grid, p, constants, plan.ladder,
                  course_of(p, plan), out);
  });
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

cudaError_t backward(const BackwardParams& p, void* workspace, const Device& device, cudaStream_t on,
                     BackwardVariant variant) {
  if (!p.needs_g() && !p.grad_weight) return cudaSuccess;
  const Plan plan = plan_of(p, device);
  const bool ring = variant == BackwardVariant::ring && ring_stages(p, plan, device) > 0;
  if (variant == BackwardVariant::one_launch && fits_one_launch(p, plan)) {
    int ticket = kNoTicket;
    const cudaError_t error = find_ticket(device.index, on, &ticket);
    if (error != cudaSuccess || ticket != kNoTicket)
      return error == cudaSuccess ? backward_one_launch(p, workspace, device, on, ticket) : error;
  }
  return with_types(p.branch, p.stream, [&](auto branch, auto stream) {
    using Branch = typename decltype(branch)::type;
    using Stream = typename decltype(stream)::type;
    using A = Accumulate<Stream>;
    const Partials<A> partials = partials_of<A>(p, plan, workspace);
    cudaError_t error = cudaSuccess;
    if (p.rows == 0 || p.d == 0) {  // nothing to add: run_sums writes zeros
      if (p.grad_variance_out && p.rows > 0)
        error = cudaMemsetAsync(p.grad_variance_out, 0, p.rows * sizeof(A), on);
    } else if (ring) {
      error = backward_ring(p, workspace, device, on);
    } else {
      error = with_wanted(p, [&](auto wanted) {
        return run_rows<Branch, Stream, decltype(wanted)>(p, plan, partials, device, on);
      });
    }
    return error == cudaSuccess ? run_sums<A>(p, plan, partials, device, on) : error;
  });
}

}  // namespace bhyt::cuda
