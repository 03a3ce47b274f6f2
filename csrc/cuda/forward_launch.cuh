// Forward: which of forward_kernels.cuh's kernels runs, on which grid. Included by forward.cu and forward_quantized.cu,
// which compile beside each other.
#pragma once

#include "dispatch.cuh"
#include "forward_kernels.cuh"

namespace bhyt::cuda {
namespace {

template <class Branch, class Stream, class Weight, class Y, bool residual_added, bool exact>
cudaError_t in_registers(const ForwardParams& p, const Ladder& ladder, const Grid& grid) {
  using A = Accumulate<Stream>;
  const auto run = [&](auto packs) {
    return launch(forward_row_in_registers<Branch, Stream, Weight, Y, residual_added, exact, decltype(packs)::value>,
                  grid, p, constants_of<A>(p), ladder, Output<Y, A>(p));
  };
  return ladder.packs <= 2 ? run(std::integral_constant<int, 2>()) : run(std::integral_constant<int, kForwardPacks>());
}

// Whether forward_row_in_registers is compiled for the gain: none, of y's dtype, or fp32. For quantised outputs, whose
// gains are folded into their readers, none alone.
template <class Y>
bool gain_is_tuned(const ForwardParams& p) {
  return p.weight.data == nullptr ||
         (!std::is_same_v<Y, Byte> && (p.weight.dtype == p.branch || p.weight.dtype == DType::f32));
}

template <class Branch, class Stream, class Y, bool residual_added, bool exact>
cudaError_t in_registers(const ForwardParams& p, const Ladder& ladder, const Grid& grid) {
  if constexpr (!std::is_same_v<Y, Byte>) {
    if (p.weight.data && p.weight.dtype == p.branch)
      return in_registers<Branch, Stream, Branch, Y, residual_added, exact>(p, ladder, grid);
    if (p.weight.data) return in_registers<Branch, Stream, float, Y, residual_added, exact>(p, ladder, grid);
  }
  return in_registers<Branch, Stream, NoGain, Y, residual_added, exact>(p, ladder, grid);
}

template <class Branch, class Stream, class Y, bool residual_added, bool exact>
cudaError_t run_form(const ForwardParams& p, const Device& device, cudaStream_t on) {
  using A = Accumulate<Stream>;
  const Ladder ladder = forward_ladder(p.d, p.stream);
  Grid grid;
  grid.blocks_x = ceil_div(p.rows, ladder.groups);
  grid.threads_x = ladder.threads;
  grid.threads_y = ladder.groups;
  grid.shared_bytes = sizeof(SumSlots<A>);
  grid.overlaps_last = device.hopper_or_later;
  grid.on = on;
  const bool wide = is_wide(p);
  if constexpr (!std::is_same_v<Stream, double>) {
    const bool cluster = ladder.fits_a_cluster() && device.resident_clusters[cluster_index(ladder)] > 0;
    const bool reaches = exact ? ladder.parts == 1 || cluster : ladder.parts <= kMaxGridY;
    if (wide && reaches && p.rows <= kMaxRows && gain_is_tuned<Y>(p)) {
      grid.blocks_y = ladder.parts;
      if (exact) grid.cluster = ladder.parts;
      return in_registers<Branch, Stream, Y, residual_added, exact>(p, ladder, grid);
    }
  }
  // The packs of an approximate site are independent of each other; a block of an exact site reads back what it has
  // stored.
  grid.blocks_y = exact ? 1 : std::min(ladder.parts, kMaxGridY);
  const auto run = [&](auto is_wide) {
    return launch(forward_row_read_twice<Branch, Stream, Y, residual_added, exact, decltype(is_wide)::value>, grid, p,
                  constants_of<A>(p), ladder, Output<Y, A>(p));
  };
  if constexpr (!std::is_same_v<Stream, double>)
    if (wide) return run(std::true_type());
  return run(std::false_type());
}

// Y: Byte, or void for the branch's dtype.
template <class Y>
cudaError_t launch_forward(const ForwardParams& p, const Device& device, cudaStream_t on) {
  if (p.rows == 0 || (p.d == 0 && !p.exact)) return cudaSuccess;
  return with_types(p.branch, p.stream, [&](auto branch, auto stream) {
    using Branch = typename decltype(branch)::type;
    using Stream = typename decltype(stream)::type;
    using Stored = std::conditional_t<std::is_void_v<Y>, Branch, Y>;
    if (p.residual.data != nullptr || !std::is_same_v<Branch, Stream>)
      return p.exact ? run_form<Branch, Stream, Stored, true, true>(p, device, on)
                     : run_form<Branch, Stream, Stored, true, false>(p, device, on);
    if constexpr (std::is_same_v<Branch, Stream>)
      return p.exact ? run_form<Branch, Stream, Stored, false, true>(p, device, on)
                     : run_form<Branch, Stream, Stored, false, false>(p, device, on);
    return cudaErrorInvalidValue;
  });
}

}  // namespace
}  // namespace bhyt::cuda
