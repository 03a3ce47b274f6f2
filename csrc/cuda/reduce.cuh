// Sums over a row, in an order that depends on d and the stream's dtype alone (ladder.h): first the packs of a thread
// in turn, then the lanes of a warp and the warps of a group, each by a butterfly, then the parts of the row in turn.
#pragma once

#include "ladder.h"
#include "vec.cuh"

namespace bhyt::cuda {

// Where a thread stands. A group is the threads that share a part of a row: a power of two of them within a warp, or
// whole warps.
struct Place {
  int lane = hw::thread_x();   // within the group
  int group = hw::thread_y();  // within the block
  int part = hw::block_y();    // of the row
};

// Shared memory of a block for its sums. With two buffers one barrier per sum is enough: a thread that has passed the
// barrier of the next sum knows that all have read this one.
template <class A>
struct SumSlots {
  A warp[2][kMaxThreads / 32];
  A part[2][kMaxClusterParts];
  hw::Inbox inbox[2];  // of `part`
};

// Opens the inboxes of a cluster's block. A cluster_wait() must stand between this and cluster_sum: a block's shared
// memory can be written to only once the block runs.
template <class A>
BHYT_DEVICE void open_cluster(const Place& place, SumSlots<A>& slots) {
  if (place.lane == 0)
    for (hw::Inbox& inbox : slots.inbox) inbox.open();
  hw::cluster_arrive();
}

template <class A>
BHYT_DEVICE A butterfly(A v, int lanes) {
  if (lanes >= 32) {  // needs no test for each step
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) v = hw::add(v, hw::shuffle_xor(v, mask));
    return v;
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2)
    if (mask < lanes) v = hw::add(v, hw::shuffle_xor(v, mask));
  return v;
}

// The sum over the group, given to all its threads. `turn` alternates between calls. groups_apart: each group waits for
// its own threads alone. Else all groups of the block wait together: a kernel that names one barrier takes all sixteen,
// which does not pay everywhere.
template <bool groups_apart = false, class A>
BHYT_DEVICE A group_sum(A v, const Ladder& ladder, const Place& place, SumSlots<A>& slots, int turn) {
  v = butterfly(v, ladder.threads);
  if (ladder.threads <= 32) return v;
  const unsigned warps = ladder.threads / 32u, warp = place.lane / 32u, lane = place.lane % 32u;
  A* const sums = slots.warp[turn & 1] + place.group * warps;
  if (lane == 0) sums[warp] = v;
  if constexpr (groups_apart)
    hw::barrier(1 + place.group, ladder.threads);
  else
    hw::block_barrier();
  // As many lanes as a block can have warps take part; both halves of this warp do the same.
  return butterfly(lane % 16 < warps ? sums[lane % 16] : A(0), kMaxThreads / 32);
}

// The sum over the parts, one per block of a cluster, given to all their threads. `turn` counts the calls. There is no
// barrier: each block waits for its inbox. A buffer is written again two turns later. That is safe: the writer has
// every block's sum of the turn between, and a block sends that after all its threads have read the buffer.
BHYT_DEVICE float cluster_sum(float v, const Ladder& ladder, const Place& place, SumSlots<float>& slots, int turn) {
  float* const sums = slots.part[turn & 1];
  hw::Inbox& inbox = slots.inbox[turn & 1];
  if (place.lane == 0) inbox.expect(static_cast<uint32_t>(ladder.parts * sizeof(float)));
  if (place.lane < ladder.parts) hw::cluster_store(sums + place.part, inbox, place.lane, v);
  inbox.wait(turn >> 1 & 1);
  float total = 0;
  for (int i = 0; i < ladder.parts; ++i) total = hw::add(total, sums[i]);
  return total;
}

// The sum of products over a pack, in two chains.
template <class A, int W>
BHYT_DEVICE A dot(const A (&x)[W], const A (&y)[W]) {
  A even = hw::mul(x[0], y[0]), odd = hw::mul(x[1], y[1]);
#pragma unroll
  for (int j = 2; j < W; j += 2) {
    even = hw::fma(x[j], y[j], even);
    odd = hw::fma(x[j + 1], y[j + 1], odd);
  }
  return hw::add(even, odd);
}

}  // namespace bhyt::cuda
