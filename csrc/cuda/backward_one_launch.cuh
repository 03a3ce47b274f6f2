// The backward in one launch: the persistent kernel, whose blocks add the partial sums themselves.
#pragma once

#include "backward_persistent.cuh"
#include "sum_partials.cuh"
#include "tickets.h"

namespace bhyt::cuda {
namespace {

// Who adds what. The stripes of columns are cut into shares, and one share more is lam's. Which block adds a share
// changes nothing in its sum: that is sum_partials'.
//
// A block that has written its partial sums counts itself as arrived. Then it looks a while whether all have arrived.
// Whoever sees it takes shares by number until none is left: the last block certainly, so every share is added; and
// those that wait beside it, so that not one multiprocessor has to read all partial sums. No block waits for long, and
// none for a block that may not run yet: other grids can take what room they like.
struct Finish {
  int ticket = 0;
  uint32_t shares = 0;
  int64_t stripes = 0;  // of a share
};

// The counters of all calls. They belong to this translation unit's kernels alone.
BHYT_DEVICE_MEMORY Tickets all_tickets[kTickets];

// Looks: 10 to 25 us. The blocks of a GPU that has nothing else to do end within a few microseconds of each other.
constexpr int kPatience = 64;

// A block leaves `taken` by a number behind the last share, or, out of patience, by a count in the upper half. There
// are fewer than 2^14 blocks, and one share more than blocks at most. Who sees that all have left sets the counters to
// zero for the next call: nobody reads them any more.
constexpr uint32_t kGaveUp = 1 << 16;

BHYT_DEVICE bool all_have_left(uint32_t taken, uint32_t shares, uint32_t blocks) {
  return (taken & (kGaveUp - 1)) + taken / kGaveUp == shares + blocks;
}

// Whether all blocks have arrived. One thread calls this, behind a barrier of its block.
BHYT_DEVICE bool arrive(Tickets& tickets, uint32_t blocks) {
  bool all = hw::add_acq_rel(&tickets.arrived, 1) == blocks - 1;
  for (int look = 0; !all && look < kPatience; ++look) all = hw::load_acquire(&tickets.arrived) == blocks;
  return all;
}

// The number of a share, or of none if it is not below finish.shares. Called by one thread until it gets none.
BHYT_DEVICE uint32_t take(Tickets& tickets, const Finish& finish, uint32_t blocks, bool all) {
  const uint32_t count = all ? 1 : kGaveUp, before = hw::add_relaxed(&tickets.taken, count);
  if (all_have_left(before + count, finish.shares, blocks)) tickets.arrived = tickets.taken = 0;
  return all ? before & (kGaveUp - 1) : finish.shares;
}

// `shared` is free: [kSumThreads] for each team, and two numbers.
BHYT_DEVICE void add_partials(const BackwardParams& p, const Partials<float>& in, const Place& at, const Ladder& ladder,
                              const Finish& finish, float* shared) {
  const int threads = ladder.threads * ladder.groups, thread = at.group * ladder.threads + at.lane;
  // A block has more than half of kMaxThreads, so two teams at least.
  const int teams = threads / kSumThreads, team = thread / kSumThreads, member = thread % kSumThreads;
  const uint32_t blocks = static_cast<uint32_t>(hw::blocks_x()) * hw::blocks_y();
  float* const sums = shared + team * kSumThreads;
  auto* const numbers = reinterpret_cast<uint32_t*>(shared + teams * kSumThreads);
  Tickets& tickets = all_tickets[finish.ticket];
  bool all = false;
  hw::block_barrier();  // the partial sums are written
  if (thread == 0) {
    all = arrive(tickets, blocks);
    numbers[0] = take(tickets, finish, blocks, all);
  }
  for (int turn = 0;; ++turn) {
    hw::block_barrier();
    const uint32_t share = numbers[turn & 1];
    if (share >= finish.shares) return;
    // On its way while the share is added.
    if (thread == 0) numbers[(turn + 1) & 1] = take(tickets, finish, blocks, all);
    const bool for_lam = share == finish.shares - 1;
    const int64_t first = share * finish.stripes, end = first + (for_lam ? 1 : finish.stripes);
    const auto wait = [&] { hw::barrier(1 + team, kSumThreads); };
    for (int64_t stripe = first + team; team < teams && stripe < end; stripe += teams) {
      wait();  // the sums of the stripe before have been read
      sum_stripe(p, in, stripe, for_lam, member % kStripe, member / kStripe, sums, [] {}, wait);
    }
  }
}

template <class Branch, class Stream, class Wanted, bool summed>
BHYT_KERNEL_WITHIN(kMaxThreads, kRowRegisters)
backward_rows_one_launch(const BackwardParams p, const Constants<float> constants, const Ladder ladder,
                         const Course course, const Partials<float> out, const Finish finish) {
  block_rows<Branch, Stream, Wanted, summed>(p, constants, ladder, course, out);
  add_partials(p, out, Place(), ladder, finish,
               reinterpret_cast<float*>(hw::shared() + sizeof(SumSlots<float>)));
}

}  // namespace
}  // namespace bhyt::cuda
