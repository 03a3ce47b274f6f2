// The kernels in AVX-512.
#include "tier.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,prfchw,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,prfchw,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif

namespace bhyt::cpu::avx512 {
namespace {
#define BHYT_AVX512
#include "vec-inl.h"
#include "tanh-inl.h"
#include "loops-inl.h"
#include "forward-inl.h"
#include "backward-inl.h"
#include "table-inl.h"
}  // namespace

constinit const Kernels kernels = {"avx512", kBfloatBlock, prepare_weight, forward, backward, sum_weight, sum_lam};
}  // namespace bhyt::cpu::avx512

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
