// grad_weight and grad_lam from the partial sums of the row kernels.
#pragma once

#include "backward_formula.cuh"

namespace bhyt::cuda {
namespace {

// Adds the partial sums in an order fixed by their number: each of kSlices threads takes every kSlices-th, then one
// thread adds the results. The last block sums grad_lam, every other one a stripe of grad_weight's columns. A thread
// asks for kAhead partial sums at once: with kSlices threads those of 192 blocks, more than most GPUs run.
constexpr int kStripe = 32, kSlices = 16, kAhead = 12;

template <class A>
BHYT_KERNEL(kStripe * kSlices) sum_partials(const BackwardParams p, const Partials<A> in) {
  A* const slices = reinterpret_cast<A*>(hw::shared());  // [kSlices, kStripe]
  const int lane = hw::thread_x(), slice = hw::thread_y();
  const bool for_lam = hw::block_x() == hw::blocks_x() - 1;
  const int64_t column = for_lam ? lane : hw::block_x() * kStripe + lane;
  hw::wait_for_previous_grid();
  A sum = 0;
  if (for_lam) {
    if (p.grad_lam)
      for (int64_t i = slice * kStripe + lane; i < in.lam_count; i += kStripe * kSlices) sum = hw::add(sum, in.lam[i]);
  } else if (p.grad_weight && column < p.d) {
    for (int64_t i = slice; i < in.count; i += kSlices * kAhead) {
      A partial[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
        partial[j] = i + j * kSlices < in.count ? in.weight[(i + j * kSlices) * p.d + column] : A(0);
#pragma unroll
      for (int j = 0; j < kAhead; ++j) sum = hw::add(sum, partial[j]);
    }
  }
  slices[slice * kStripe + lane] = sum;
  hw::block_barrier();
  if (slice != 0) return;
  sum = 0;
  for (int i = 0; i < kSlices; ++i) sum = hw::add(sum, slices[i * kStripe + lane]);
  if (for_lam) {
    sum = butterfly(sum, 32);
    if (p.grad_lam && lane == 0) write(p.grad_lam, p.lam.dtype, 0, sum);
  } else if (p.grad_weight && column < p.d) {
    write(p.grad_weight, p.weight.dtype, column, sum);
  }
}

}  // namespace
}  // namespace bhyt::cuda
