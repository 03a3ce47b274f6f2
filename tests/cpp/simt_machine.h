// A GPU for tests, its threads and blocks: runs a kernel some clusters of blocks at a time. Each thread is a fiber that
// runs until it waits at a barrier, a shuffle or a cluster barrier, or looks at what other blocks count. The order in
// which fibers and clusters get their turn can be varied, so that a missing barrier shows. Shared memory starts as NaNs
// and is as long as the launch asked for. A deadlock ends the program.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define BHYT_DEVICE inline
#define BHYT_DEVICE_MEMORY inline
#define BHYT_KERNEL(max_threads) void
#define BHYT_KERNEL_WITHIN(max_threads, registers) void
#define BHYT_KERNEL_SHARING(max_threads, blocks) void

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration };

inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}

namespace simt {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "simt: %s\n", what);
  std::abort();
}

// Stack switching --------------------------------------------------------------------------------------------------

#if defined(__x86_64__)
extern "C" void simt_switch(void** from, void* to);
asm(R"(
.text
.weak simt_switch
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

struct Context {
  void* stack_pointer = nullptr;

  void start(char* stack, size_t bytes, void (*entry)()) {
    auto* top = reinterpret_cast<uint64_t*>((reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t(15));
    *--top = 0;  // where entry would return to; it does not
    *--top = reinterpret_cast<uint64_t>(entry);
    for (int i = 0; i < 6; ++i) *--top = 0;
    stack_pointer = top;
  }
  static void change(Context& from, Context& to) { simt_switch(&from.stack_pointer, to.stack_pointer); }
};
#else
struct Context {
  ucontext_t context;

  void start(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack = {.ss_sp = stack, .ss_flags = 0, .ss_size = bytes};
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void change(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

// A cluster and its threads ----------------------------------------------------------------------------------------

struct Barrier {
  int arrived = 0, expected = 0, generation = 0;

  int arrive(int threads) {  // the generation to wait for the end of
    if (arrived == 0) expected = threads;
    if (expected != threads) fail("a barrier is given different numbers of threads");
    const int mine = generation;
    if (++arrived == expected) arrived = 0, ++generation;
    return mine;
  }
};

struct Block {
  std::unique_ptr<unsigned char[]> memory;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  int64_t x = 0;
  int y = 0, rank = 0;  // of its cluster, whose blocks stand in a row
  Barrier barriers[16], cluster_barrier;

  Block& in_cluster(int other) { return *(this - rank + other); }
  std::vector<Barrier> warps;
  std::vector<uint64_t> lanes;  // what each thread holds out to its warp
};

struct Thread {
  Context context;
  Block* block = nullptr;
  int x = 0, y = 0, id = 0;
  Barrier* waits_for = nullptr;
  int generation = 0, cluster_generation = -1;
  bool knows_cluster_runs = false, waited = false, done = false;
};

struct BulkLoad {
  void* to;
  const void* from;
  uint32_t bytes;
  const void* inbox;
};

enum class Order { ascending, descending, shuffled };

struct Machine {
  Order order = Order::ascending, block_order = Order::ascending;
  int at_once = 1;  // clusters
  int64_t most_shared = 48 << 10, asked_shared = 0, bulk_loaded = 0;
  bool has_float8 = true, has_bulk_prefetch = true, overlaps_last = false;
  int threads_x = 1, threads_y = 1, blocks_y = 1, cluster = 1;
  int64_t blocks_x = 1, launches = 0, products = 0, shuffles = 0, prefetched = 0;
  std::vector<int> counted;   // by block, the ones along y beside each other: how often it has added to a counter
  std::vector<Block> blocks;  // of the clusters that run
  std::vector<Thread> threads;
  std::vector<BulkLoad> loads;  // on their way
  Thread* current = nullptr;
  Context scheduler;
  std::function<void()> body;
  std::vector<char> stacks;
  uint64_t random = 1;

  int block_threads() const { return threads_x * threads_y; }

  void shuffle(std::vector<int>& numbers) {
    for (size_t i = numbers.size(); i-- > 1;) {
      random = random * 6364136223846793005u + 1442695040888963407u;
      std::swap(numbers[i], numbers[(random >> 33) % (i + 1)]);
    }
  }
};

inline Machine& machine() {
  static Machine m;
  return m;
}

inline void yield() { Context::change(machine().current->context, machine().scheduler); }

inline void wait(Barrier& barrier, int threads) {
  Thread& me = *machine().current;
  const int generation = barrier.arrive(threads);
  if (barrier.generation != generation) return;
  me.waits_for = &barrier;
  me.generation = generation;
  yield();
}

// Memory is touched: that of the grid before may not be there yet.
inline void touch() {
  if (machine().overlaps_last && !machine().current->waited) fail("memory is touched before the grid before has ended");
}

inline void entry() {
  machine().body();
  if (machine().overlaps_last && !machine().current->waited) fail("a thread does not wait for the grid before");
  machine().current->done = true;
  yield();
  fail("a finished thread was resumed");
}

inline void run_clusters() {
  Machine& m = machine();
  constexpr size_t kStack = 20480 + 320;  // not a power of two: the stacks' tops fall into different cache sets
  if (m.stacks.size() < m.threads.size() * kStack) m.stacks.resize(m.threads.size() * kStack);
  for (size_t i = 0; i < m.threads.size(); ++i) m.threads[i].context.start(m.stacks.data() + i * kStack, kStack, entry);

  std::vector<int> turns(m.threads.size());
  for (size_t i = 0; i < turns.size(); ++i) turns[i] = m.order == Order::descending ? turns.size() - 1 - i : i;
  bool everybody = false;
  for (size_t left = turns.size(), pass = 0; left > 0; ++pass) {
    if (m.order == Order::shuffled) m.shuffle(turns);
    // Shuffled is unfair too: a quarter of the warps sleeps for 64 passes, while others run ahead as far as they can.
    // They fall asleep at different times: in the middle of what they do between two barriers, too.
    const auto asleep = [&](int i) {
      const uint32_t hash = (i / 32 + 1) * 2654435761u ^ uint32_t((pass + i / 32 * 11) / 64 + 1) * 2246822519u;
      return m.order == Order::shuffled && !everybody && (hash >> 13 & 3) == 0;
    };
    bool moved = false;
    for (int i : turns) {
      if (asleep(i)) continue;
      Thread& thread = m.threads[i];
      if (thread.done || (thread.waits_for && thread.waits_for->generation == thread.generation)) continue;
      thread.waits_for = nullptr;
      m.current = &thread;
      Context::change(m.scheduler, thread.context);
      moved = true;
      if (thread.done) --left;
    }
    const bool nobody_slept = everybody || m.order != Order::shuffled;
    if (!moved && nobody_slept) fail("deadlock: some threads wait where others never come");
    everybody = !moved;
  }
  if (!m.loads.empty()) fail("a bulk load that nobody waits for");
  for (const Block& block : m.blocks)
    for (int i = 0; i < 64; ++i)
      if (block.shared[block.shared_bytes + i] != 0xa5) fail("a write behind the end of shared memory");
}

template <class Grid>
cudaError_t run(const Grid& grid, std::function<void()> body) {
  Machine& m = machine();
  m.threads_x = grid.threads_x, m.threads_y = grid.threads_y;
  m.blocks_x = grid.blocks_x, m.blocks_y = grid.blocks_y;
  m.cluster = grid.cluster, m.overlaps_last = grid.overlaps_last;
  m.body = std::move(body);
  ++m.launches;
  const int threads = m.block_threads();
  const bool legal = grid.blocks_x >= 1 && grid.blocks_x <= 0x7fffffff && grid.blocks_y >= 1 &&
                     grid.blocks_y <= 65535 && threads >= 1 && threads <= 512 && grid.shared_bytes <= m.most_shared &&
                     grid.cluster >= 1 && grid.cluster <= 16 && grid.blocks_y % grid.cluster == 0;
  m.asked_shared = std::max<int64_t>(m.asked_shared, grid.shared_bytes);
  if (!legal) return cudaErrorInvalidConfiguration;

  m.counted.assign(m.blocks_x * m.blocks_y, 0);
  const int across = m.blocks_y / m.cluster;
  std::vector<int> clusters(m.blocks_x * across);
  for (size_t i = 0; i < clusters.size(); ++i)
    clusters[i] = static_cast<int>(m.block_order == Order::descending ? clusters.size() - 1 - i : i);
  if (m.block_order == Order::shuffled) m.shuffle(clusters);
  for (size_t first = 0; first < clusters.size(); first += m.at_once) {
    const size_t count = std::min<size_t>(m.at_once, clusters.size() - first) * m.cluster;
    m.blocks.clear();
    m.blocks.resize(count);
    m.threads.assign(threads * count, Thread());
    for (size_t b = 0; b < count; ++b) {
      Block& block = m.blocks[b];
      const int cluster = clusters[first + b / m.cluster];
      block.rank = b % m.cluster;
      block.x = cluster / across, block.y = cluster % across * m.cluster + block.rank;
      block.shared_bytes = grid.shared_bytes;
      block.memory = std::make_unique<unsigned char[]>(grid.shared_bytes + 128);
      const auto memory = reinterpret_cast<uintptr_t>(block.memory.get());
      block.shared = reinterpret_cast<unsigned char*>((memory + 15) & ~uintptr_t(15));
      std::memset(block.shared, 0xff, grid.shared_bytes);
      std::memset(block.shared + grid.shared_bytes, 0xa5, 64);
      block.warps.resize((threads + 31) / 32);
      block.lanes.resize(threads);
      for (int i = 0; i < threads; ++i) {
        Thread& thread = m.threads[b * threads + i];
        thread.block = &block;
        thread.id = i;
        thread.x = i % m.threads_x, thread.y = i / m.threads_x;
      }
    }
    run_clusters();
  }
  return cudaSuccess;
}

}  // namespace simt
