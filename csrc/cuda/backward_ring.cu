// The backward with a ring of rows.
#include "backward_plan.cuh"

namespace bhyt::cuda {

cudaError_t backward_ring(const BackwardParams& p, void* workspace, const Device& device, cudaStream_t on) {
  const Plan plan = plan_of(p, device);
  const auto out = partials_of<float>(p, plan, workspace);
  const Course course = course_of(p, plan);
  Grid grid = persistent_grid(plan, true, device, on);
  RingShape ring;
  ring.stages = ring_stages(p, plan, device);
  ring.at = grid.shared_bytes;
  ring.ahead_x = (ring.stages - 1) * course.x;
  ring.ahead_grad_y = (ring.stages - 1) * course.grad_y;
  grid.shared_bytes += kInboxBytes + ring.stages * ring_stage_bytes(plan.ladder);
  return with_types(p.branch, p.stream, [&](auto branch, auto stream) {
    using T = typename decltype(stream)::type;
    return with_wanted(p, [&](auto wanted) -> cudaError_t {
      using Wanted = decltype(wanted);
      constexpr bool suits = Wanted::sum && Wanted::writes && std::is_same_v<decltype(branch), decltype(stream)>;
      if constexpr (!suits || std::is_same_v<T, double>)
        return cudaErrorInvalidValue;
      else
        return with_summed<Wanted>(p, [&](auto summed) {
          return launch(backward_rows_ring<T, Wanted, summed>, grid, p, constants_of<float>(p), plan.ladder, course,
                        out, ring);
        });
    });
  });
}

}  // namespace bhyt::cuda
