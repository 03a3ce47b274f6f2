// The rows of any CPU: plain C++ for the compiler to vectorise.
#include "tier.h"

namespace bhyt::cpu::baseline {
namespace {
#include "vec-inl.h"
#include "tanh-inl.h"
#include "rows-inl.h"
#include "table-inl.h"
}  // namespace

constinit const Kernels kernels = {"default", kBfloatBlock, forward, backward, sum_weight, sum_lam, widen_values};
}  // namespace bhyt::cpu::baseline
