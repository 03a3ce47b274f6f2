// grad_weight and grad_lam from the partial sums of the row kernels.
#pragma once

#include "backward_formula.cuh"

namespace bhyt::cuda {
namespace {

// The order of the sums is fixed by their number: each of kSlices threads adds every kSlices-th partial sum of a
// column, then one thread adds the results. The last block sums grad_lam, every other one a stripe of grad_weight's
// columns. A thread asks for kAhead partial sums at once: with kSlices threads those of 144 blocks, more than most GPUs
// run. A block is small, 128 threads of 32 registers in fp32: it can wait beside one of the persistent kernel.
constexpr int kStripe = 8, kSlices = 16, kAhead = 9, kSumThreads = kStripe * kSlices;

// v where the mask is of ones, 0 where it is of zeros.
BHYT_DEVICE float masked(float v, int mask) { return hw::bits_to_float(hw::float_to_bits(v) & mask); }
BHYT_DEVICE double masked(double v, int mask) {
  return hw::bits_to_double(hw::low_bits(v) & mask, hw::high_bits(v) & mask);
}

// The sum of every `apart`-th number from number `first` on. Beyond the end the last one is loaded again, and not
// added: ptxas would let loads under conditions wait for one another, and has too few predicates to select nine numbers
// behind them. So each has a bit.
template <int apart, class A>
BHYT_DEVICE A sum_apart(const A* numbers, int first, int64_t step, int64_t count) {
  const A* from = numbers + first * step;
  A sum = 0;
#pragma unroll 1
  for (int left = static_cast<int>((count - first + apart - 1) / apart); left > 0; left -= kAhead) {
    const uint32_t counted = (1u << (left < kAhead ? left : 31)) - 1;
    A loaded[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      loaded[j] = *from;
      from += apart * step & (j + 1 - left) >> 31;
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      sum = hw::add(sum, masked(loaded[j], static_cast<int>(counted << (31 - j)) >> 31));
  }
  return sum;
}

// One stripe of columns, or lam, by kSumThreads threads: `sums` is theirs, and wait() waits for them. start() comes
// before anything is read.
template <class A, class Start, class Wait>
BHYT_DEVICE void sum_stripe(const BackwardParams& p, const Partials<A>& in, int64_t stripe, bool for_lam, int lane,
                            int slice, A* sums, Start&& start, Wait&& wait) {
  const int thread = slice * kStripe + lane;
  const int64_t column = stripe * kStripe + lane;
  const bool for_column = !for_lam && column < p.d;
  start();
  A sum = 0;
  if (for_column) sum = sum_apart<kSlices>(in.weight + column, slice, p.d, in.count);
  if (for_lam && p.grad_lam) sum = sum_apart<kSumThreads>(in.lam, thread, 1, in.lam_count);
  sums[thread] = sum;
  wait();
  if (thread >= 32) return;
  sum = 0;
  if (for_lam) {
    for (int i = thread; i < kSumThreads; i += 32) sum = hw::add(sum, sums[i]);
    sum = butterfly(sum, 32);
    if (p.grad_lam && thread == 0) write(p.grad_lam, p.lam.dtype, 0, sum);
  } else if (for_column && slice == 0) {
    for (int i = 0; i < kSlices; ++i) sum = hw::add(sum, sums[i * kStripe + lane]);
    write(p.grad_weight, p.weight.dtype, column, sum);
  }
}

template <class A>
BHYT_KERNEL_SHARING(kSumThreads, (hw::kArch < 90 || sizeof(A) == 8 ? 8 : 16))
sum_partials(const BackwardParams p, const Partials<A> in) {
  A* const sums = reinterpret_cast<A*>(hw::shared());  // [kSumThreads]
  const bool for_lam = hw::block_x() == hw::blocks_x() - 1;
  sum_stripe(
      p, in, hw::block_x(), for_lam, hw::thread_x(), hw::thread_y(), sums, [] { hw::wait_for_previous_grid(); },
      [] { hw::block_barrier(); });
}

}  // namespace
}  // namespace bhyt::cuda
