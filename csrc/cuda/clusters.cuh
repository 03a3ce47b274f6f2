// What hardware.cuh has for clusters of blocks, and for kernels that start before the one before them ends.
#pragma once

#include "hardware.cuh"

namespace bhyt::cuda::hw {

// Clusters are blocks that see each other's shared memory: sm_90 and later; the launcher asks for none elsewhere. To
// arrive orders no memory: what a block must see of another's memory comes with an Inbox.
BHYT_DEVICE void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

BHYT_DEVICE void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// An mbarrier. It counts the bytes that other blocks store beside it: a phase ends when as many have come as one thread
// expects.
struct Inbox {
  uint64_t state;

  BHYT_DEVICE uint32_t address() const { return static_cast<uint32_t>(__cvta_generic_to_shared(&state)); }

  // Called by one thread, before its cluster_arrive().
  BHYT_DEVICE void open() {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address()) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  }

  // Called by one thread, once per phase.
  BHYT_DEVICE void expect(uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()), "r"(bytes) : "memory");
#endif
  }

  // Waits until phase 0, 1, 2, .. has ended; `parity` is its lowest bit. try_wait acquires at block scope, and by the
  // letter it should be at cluster scope, as st.async releases there. That would add one instruction, CCTL.IVALL, in
  // every turn of a row loop: it empties the L1 cache of what other blocks may have written to global memory. None of
  // that is read here. What is read behind this wait is what st.async wrote: it lies in this block's own shared memory,
  // which no cache stands before, and the bytes that end a phase are counted once they have been stored.
  BHYT_DEVICE void wait(uint32_t parity) const {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(address()), "r"(parity) : "memory");
#endif
  }
};

// Stores v in block `target` of the cluster, where `mine` lies in this block, and counts it in that block's `inbox`.
BHYT_DEVICE void cluster_store(float* mine, Inbox& inbox, int target, float v) {
#if __CUDA_ARCH__ >= 900
  uint32_t to, counted;
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(mine));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(address), "r"(target));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(counted) : "r"(inbox.address()), "r"(target));
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(to),
               "r"(__float_as_uint(v)), "r"(counted)
               : "memory");
#endif
}

// Copies bytes, a multiple of 16 from an address that is one, into this block's shared memory, and counts them in
// `inbox`. One thread asks; the inbox must have been opened by it.
BHYT_DEVICE void load_bulk(void* to, const void* from, uint32_t bytes, Inbox& inbox) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(inbox.address())
               : "memory");
#endif
}

// Behind open(): load_bulk() counts in an inbox by another way than the block's own instructions.
BHYT_DEVICE void let_bulk_loads_see() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Programmatic dependent launch: the kernel may start early, and waits here for the work before it.
BHYT_DEVICE void wait_for_previous_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

BHYT_DEVICE void let_next_grid_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace bhyt::cuda::hw
