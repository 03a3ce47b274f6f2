// The kernels in NEON, which every AArch64 CPU has.
#include "tier.h"

#if defined(__aarch64__)
namespace bhyt::cpu::neon {
namespace {
#define BHYT_NEON
#include "vec-inl.h"
#include "tanh-inl.h"
#include "loops-inl.h"
#include "forward-inl.h"
#include "backward-inl.h"
#include "table-inl.h"
}  // namespace

constinit const Kernels kernels = {"neon", kBfloatBlock, prepare_weight, forward, backward, sum_weight, sum_lam};
}  // namespace bhyt::cpu::neon
#endif  // __aarch64__
