// The twins of csrc/cuda/clusters.cuh and counters.cuh: what threads know of other blocks; and the indices.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "simt_machine.h"

namespace bhyt::cuda::hw {

constexpr int kArch = 0;

inline int thread_x() { return simt::machine().current->x; }
inline int thread_y() { return simt::machine().current->y; }
inline int threads_x() { return simt::machine().threads_x; }
inline int64_t block_x() { return simt::machine().current->block->x; }
inline int block_y() { return simt::machine().current->block->y; }
inline int64_t blocks_x() { return simt::machine().blocks_x; }
inline int blocks_y() { return simt::machine().blocks_y; }
inline unsigned char* shared() { return simt::machine().current->block->shared; }

inline void cluster_arrive() {
  simt::Machine& m = simt::machine();
  if (m.current->cluster_generation >= 0) simt::fail("arrived twice at the cluster's barrier");
  simt::Barrier& barrier = m.current->block->in_cluster(0).cluster_barrier;
  m.current->cluster_generation = barrier.arrive(m.block_threads() * m.cluster);
}

inline void cluster_wait() {
  simt::Thread& me = *simt::machine().current;
  simt::Barrier& barrier = me.block->in_cluster(0).cluster_barrier;
  if (me.cluster_generation < 0) simt::fail("waits for a cluster barrier without having arrived");
  const int generation = me.cluster_generation;
  me.cluster_generation = -1;
  me.knows_cluster_runs = true;
  if (barrier.generation != generation) return;
  me.waits_for = &barrier;
  me.generation = generation;
  simt::yield();
}

// As the mbarrier: one arrival and a balance of bytes end a phase; bytes may come before they are expected.
struct Inbox {
  int32_t missing;
  int16_t arrivals;
  uint16_t phases;

  void open() { *this = {0, 0, 0}; }
  void expect(uint32_t bytes) {
    if (arrivals++) simt::fail("an inbox is asked to expect twice in a phase");
    add(static_cast<int32_t>(bytes));
  }
  void add(int32_t bytes) {
    missing += bytes;
    if (arrivals == 0 || missing != 0) return;
    arrivals = 0;
    ++phases;
  }
  void wait(uint32_t parity) const {
    for (int turns = 0; (phases & 1) == parity; ++turns) {
      if (turns > 0) bring();
      if (turns > 100000) simt::fail("deadlock: an inbox waits for what never comes");
      simt::yield();
    }
  }

 private:
  void bring() const {  // what load_bulk() was asked for
    std::vector<simt::BulkLoad>& loads = simt::machine().loads;
    for (size_t i = 0; i < loads.size();) {
      if (loads[i].inbox != this) {
        ++i;
        continue;
      }
      const simt::BulkLoad load = loads[i];
      loads.erase(loads.begin() + i);
      std::memcpy(load.to, load.from, load.bytes);
      const_cast<Inbox*>(this)->add(-static_cast<int32_t>(load.bytes));
    }
  }
};
static_assert(sizeof(Inbox) == 8);

inline void cluster_store(float* mine, Inbox& inbox, int target, float v) {
  const simt::Machine& m = simt::machine();
  if (!m.current->knows_cluster_runs) simt::fail("a store to a block that may not run yet");
  if (target >= m.cluster) simt::fail("a store to a block that is not in the cluster");
  unsigned char* const theirs = m.current->block->in_cluster(target).shared;
  const auto offset = [](const void* at) { return static_cast<const unsigned char*>(at) - shared(); };
  *reinterpret_cast<float*>(theirs + offset(mine)) = v;
  reinterpret_cast<Inbox*>(theirs + offset(&inbox))->add(-4);
}

// The bytes come when somebody waits for them, and not at once. Until then there are NaNs.
inline void load_bulk(void* to, const void* from, uint32_t bytes, Inbox& inbox) {
  simt::touch();
  if (bytes == 0 || bytes % 16 || reinterpret_cast<uintptr_t>(from) % 16 || reinterpret_cast<uintptr_t>(to) % 16)
    simt::fail("a bulk load takes a multiple of 16 bytes, aligned to 16");
  std::memset(to, 0xff, bytes);
  simt::machine().bulk_loaded += bytes;
  simt::machine().loads.push_back({to, from, bytes, &inbox});
}
inline void let_bulk_loads_see() {}

// Counters in device memory. Other blocks may run before a thread counts, and while it looks.
inline uint32_t add_relaxed(uint32_t* counter, uint32_t v) {
  simt::touch();
  simt::yield();
  ++simt::machine().counted[block_x() * blocks_y() + block_y()];
  return std::exchange(*counter, *counter + v);
}
inline uint32_t add_acq_rel(uint32_t* counter, uint32_t v) { return add_relaxed(counter, v); }
inline uint32_t load_acquire(const uint32_t* counter) {
  simt::touch();
  simt::yield();
  return *counter;
}

inline void wait_for_previous_grid() { simt::machine().current->waited = true; }
inline void let_next_grid_start() {}

}  // namespace bhyt::cuda::hw
