// The CPU kernel layer as its binding sees it: one table of functions per instruction set. No torch headers.
#pragma once

#include <cstdint>
#include <vector>

#include "params.h"

namespace bhyt::cpu {

// Rows of a backward are worked in fixed chunks: partial sums for grad_weight and grad_lam are per chunk and added in
// chunk order, so that neither depends on the number of threads.
struct Chunks {
  int64_t rows_per_chunk;
  int64_t count;
};

// At most 384 chunks bound the partials at 1.5 KB x d, and share out among 48, 64, 96, 128 or 192 threads; at least 8
// rows keep a partial row's own traffic, one write and one read, under a tenth of the rows'.
constexpr Chunks chunks_of(int64_t rows) {
  const int64_t per_chunk = rows <= 8 * 384 ? 8 : (rows + 383) / 384;
  return {per_chunk, (rows + per_chunk - 1) / per_chunk};
}

// What a backward writes for itself; null where nothing is kept there. Of numbers for rows: the accumulate dtype.
struct Scratch {
  void* weight = nullptr;  // [chunks, d], a sum per chunk: where grad_weight is wanted
  double* lam = nullptr;   // [chunks], likewise: where grad_lam is
  void* g = nullptr;       // [d], of one thread: at an exact site where grad_x is
};

// Of the columns of grad_weight: a multiple of every table's bfloat_block, and lines of memory to themselves.
constexpr int64_t kColumnBlock = 64;

struct Kernels {
  const char* name;
  // Rows of bf16 take the gain, and keep the partial sums, in blocks of so many elements: first those of even index,
  // then those of odd; a last block that is not whole, and blocks of 1, are in plain order.
  int64_t bfloat_block;
  // weight [d] as `widen` makes it; null for a backward that needs no g. Rows [begin, end).
  void (*forward)(const ForwardParams&, const void* weight, int64_t begin, int64_t end);
  // Chunks [begin, end).
  void (*backward)(const BackwardParams&, const void* weight, const Scratch&, int64_t begin, int64_t end);
  // Columns [begin, end) of grad_weight from the partials, in chunk order; begin is a multiple of kColumnBlock.
  void (*sum_weight)(const BackwardParams&, const Scratch&, int64_t begin, int64_t end);
  void (*sum_lam)(const BackwardParams&, const Scratch&);
  // A gain of any dtype, ones if it has no data, in the accumulate dtype and the order of rows of `stream`; for eight
  // bits over their scale and without infinities, for integers without NaN.
  void (*widen)(const Values& from, DType stream, const Quantization*, int64_t n, void* to);
};

// One table per instruction set, each from the kernels_*.cpp of its name.
namespace baseline {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace neon {
extern const Kernels kernels;
}

// Tables this CPU can run, plainest first.
std::vector<const Kernels*> runnable_kernels();

// The best of `runnable` within a capability as at::get_cpu_capability() names it: "AVX512", "AVX2", anything else for
// the plainest. It may name more than the CPU has: torch believes ATEN_CPU_CAPABILITY. On AArch64 it says "DEFAULT" of
// NEON too, so there that variable decides: NEON unless "default".
const Kernels& kernels_for(const char* capability, const std::vector<const Kernels*>& runnable = runnable_kernels());

}  // namespace bhyt::cpu
