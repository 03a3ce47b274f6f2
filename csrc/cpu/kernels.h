// The CPU kernels as their binding sees them: one table of functions per instruction set. No torch headers.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "params.h"

namespace bhyt::cpu {

// A backward works on its rows in chunks. Sums for grad_weight and grad_lam are kept per chunk and added in the order
// of the chunks, so that neither depends on the number of threads.
struct Chunks {
  int64_t rows_per_chunk;
  int64_t count;
};

// At most 384 chunks. This number bounds the sums at 1.5 KB x d, and divides evenly among 48, 64, 96, 128 or 192
// threads. At least 8 rows in each chunk: writing and reading a row of sums then takes less than a tenth of the rows'
// own traffic.
constexpr Chunks chunks_of(int64_t rows) {
  const int64_t per_chunk = rows <= 8 * 384 ? 8 : (rows + 383) / 384;
  return {per_chunk, (rows + per_chunk - 1) / per_chunk};
}

// The weight in the form that the row kernels read, [d]: accumulate dtype, in the order of the lanes. Without a weight
// all ones, by which a product is exact.
struct PreparedWeight {
  const void* data = nullptr;
  // For quantised outputs: no |weight| is larger than this number. With infinity every q is clamped.
  double largest = std::numeric_limits<double>::infinity();
};

// Memory that a backward uses for itself, in the accumulate dtype and the order of the lanes. Null where the backward
// keeps nothing.
struct Scratch {
  void* weight = nullptr;  // [chunks, d]: the sums of each chunk, where grad_weight is wanted
  double* lam = nullptr;   // [chunks]: likewise, where grad_lam is wanted
  void* g = nullptr;       // [d], each thread's own: where grad_x of an exact site is wanted
};

// Columns of grad_weight are summed in blocks of this many. It is a multiple of every table's bfloat_block, and a block
// fills whole lines of memory, so that no two threads share a line.
constexpr int64_t kColumnBlock = 64;

struct Kernels {
  const char* name;
  // The order of the lanes for rows of bf16. A block of this many elements has its elements of even index first, then
  // its elements of odd index. A last block that is not whole is in plain order. With 1 everything is in plain order.
  int64_t bfloat_block;
  // Writes the weight to `memory` in the form that the row kernels read. For quantised outputs it is divided by the
  // scale and clamped to finite numbers; for integers a NaN becomes 0.
  PreparedWeight (*prepare_weight)(const SiteParams&, const Quantization*, void* memory);
  // Rows [begin, end).
  void (*forward)(const ForwardParams&, PreparedWeight, int64_t begin, int64_t end);
  // Chunks [begin, end). The weight may be null where needs_g() is false.
  void (*backward)(const BackwardParams&, PreparedWeight, const Scratch&, int64_t begin, int64_t end);
  // Columns [begin, end) of grad_weight, the sums of the chunks in order; begin is a multiple of kColumnBlock.
  void (*sum_weight)(const BackwardParams&, const Scratch&, int64_t begin, int64_t end);
  void (*sum_lam)(const BackwardParams&, const Scratch&);
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

// Whether the loops prefetch the next row. Intel's CPUs are faster then; AMD's are faster with lines close ahead.
bool fetches_next_row();

// The tables that this CPU can run for rows of a stream, plainest first. Rows of float64 spend nearly all of their time
// in libm, so the baseline alone has them.
std::vector<const Kernels*> runnable_kernels(DType stream = DType::f32);

// The best of `runnable` within a capability as at::get_cpu_capability() names it: "AVX512", "AVX2", anything else for
// the plainest. torch believes ATEN_CPU_CAPABILITY, so the capability may name more than the CPU has. On AArch64 torch
// says "DEFAULT" for NEON too. There the variable decides: NEON, unless it is "default".
const Kernels& kernels_for(const char* capability, const std::vector<const Kernels*>& runnable = runnable_kernels());

}  // namespace bhyt::cpu
