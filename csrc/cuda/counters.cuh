// What hardware.cuh has for counters in device memory, by which the blocks of a grid find each other.
#pragma once

#include "hardware.cuh"

namespace bhyt::cuda::hw {

// Adds, and gives what the counter was. acq_rel: what this thread, and behind a barrier its block, wrote before is seen
// by whoever reads the sum and acquires; and the other way round.
BHYT_DEVICE uint32_t add_acq_rel(uint32_t* counter, uint32_t v) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(v) : "memory");
  return before;
}

// Orders nothing else.
BHYT_DEVICE uint32_t add_relaxed(uint32_t* counter, uint32_t v) {
  uint32_t before;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(v) : "memory");
  return before;
}

BHYT_DEVICE uint32_t load_acquire(const uint32_t* counter) {
  uint32_t v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(counter) : "memory");
  return v;
}

}  // namespace bhyt::cuda::hw
