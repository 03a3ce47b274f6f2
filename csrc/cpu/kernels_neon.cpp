// The rows in NEON, which every AArch64 CPU has.
#include "tier.h"

#if defined(__aarch64__)
namespace bhyt::cpu::neon {
namespace {
#define BHYT_NEON
#include "vec-inl.h"
#include "tanh-inl.h"
#include "rows-inl.h"
#include "table-inl.h"
}  // namespace

constinit const Kernels kernels = {"neon", kBfloatBlock, forward, backward, sum_weight, sum_lam, widen_values};
}  // namespace bhyt::cpu::neon
#endif  // __aarch64__
