// The kernels for any CPU: plain C++ for the compiler to vectorise. They alone have rows of float64.
#include "tier.h"

namespace bhyt::cpu::baseline {
namespace {
#include "vec-inl.h"
#include "tanh-inl.h"
#include "loops-inl.h"
#include "forward-inl.h"
#include "backward-inl.h"
#include "table-inl.h"
}  // namespace

constinit const Kernels kernels = {"default", kBfloatBlock, prepare_weight, forward, backward, sum_weight, sum_lam};
}  // namespace bhyt::cpu::baseline
