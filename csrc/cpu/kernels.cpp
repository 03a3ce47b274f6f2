// Compiles the row kernels once per instruction set and picks a table.
//
// Every include stands before the target pragmas: a std:: template instantiated under one of them would be emitted with
// AVX-512 code and could be the copy the linker keeps for baseline callers.
#include "kernels.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>

#include "scalar.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace bhyt::cpu {

namespace baseline {
namespace {
#define BHYT_TIER_NAME "default"
#include "vec-inl.h"
#include "tanh-inl.h"
#include "rows-inl.h"
#undef BHYT_TIER_NAME
}  // namespace
}  // namespace baseline

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace avx2 {
namespace {
#define BHYT_TIER_NAME "avx2"
#define BHYT_AVX2
#include "vec-inl.h"
#include "tanh-inl.h"
#include "rows-inl.h"
#undef BHYT_AVX2
#undef BHYT_TIER_NAME
}  // namespace
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
namespace avx512 {
namespace {
#define BHYT_TIER_NAME "avx512"
#define BHYT_AVX512
#include "vec-inl.h"
#include "tanh-inl.h"
#include "rows-inl.h"
#undef BHYT_AVX512
#undef BHYT_TIER_NAME
}  // namespace
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__

const Kernels& kernels_for(const char* capability) {
#if defined(__x86_64__)
  if (std::strncmp(capability, "AVX512", 6) == 0) return avx512::kernels;
  if (std::strncmp(capability, "AVX2", 4) == 0) return avx2::kernels;
#endif
  (void)capability;
  return baseline::kernels;
}

}  // namespace bhyt::cpu
