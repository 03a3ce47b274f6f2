// The backward in one launch.
#include "backward_one_launch.cuh"

#include "backward_plan.cuh"

namespace bhyt::cuda {
namespace {

// A share for each block; a stripe for each team of a block at least.
Finish finish_of(const BackwardParams& p, const Plan& plan, int ticket) {
  const Ladder& ladder = plan.ladder;
  const int64_t stripes = p.grad_weight ? ceil_div(p.d, kStripe) : 0;
  const int64_t teams = ladder.threads * ladder.groups / kSumThreads;
  Finish finish;
  finish.ticket = ticket;
  finish.stripes = ceil_div(ceil_div(stripes, teams), plan.blocks * ladder.parts) * teams;
  finish.shares = static_cast<uint32_t>(stripes ? ceil_div(stripes, finish.stripes) : 0) + 1;
  return finish;
}

template <class Branch, class Stream, class Wanted>
cudaError_t run(const BackwardParams& p, const Plan& plan, const Partials<float>& out, const Device& device,
                cudaStream_t on, int ticket) {
  const auto constants = constants_of<float>(p);
  const Finish finish = finish_of(p, plan, ticket);
  Grid grid = persistent_grid(plan, Wanted::sum, device, on);
  const int64_t sums = sizeof(float) * plan.ladder.threads * plan.ladder.groups + 2 * sizeof(uint32_t);
  grid.shared_bytes = std::max<int64_t>(grid.shared_bytes, sizeof(SumSlots<float>) + sums);
  return with_summed<Wanted>(p, [&](auto summed) {
    return launch(backward_rows_one_launch<Branch, Stream, Wanted, summed>, grid, p, constants, plan.ladder,
                  course_of(p, plan), out, finish);
  });
}

}  // namespace

cudaError_t backward_one_launch(const BackwardParams& p, void* workspace, const Device& device, cudaStream_t on,
                                int ticket) {
  const Plan plan = plan_of(p, device);
  const auto out = partials_of<float>(p, plan, workspace);
  return with_types(p.branch, p.stream, [&](auto branch, auto stream) {
    using Branch = typename decltype(branch)::type;
    using Stream = typename decltype(stream)::type;
    return with_wanted(p, [&](auto wanted) -> cudaError_t {
      using Wanted = decltype(wanted);
      if constexpr (std::is_same_v<Stream, double> || !(Wanted::sum || Wanted::grad_weight))
        return cudaErrorInvalidValue;
      else
        return run<Branch, Stream, Wanted>(p, plan, out, device, on, ticket);
    });
  });
}

}  // namespace bhyt::cuda
