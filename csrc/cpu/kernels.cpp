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
#include <vector>

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
#include "table-inl.h"
#undef BHYT_TIER_NAME
}  // namespace
}  // namespace baseline

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,prfchw"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,prfchw")
#endif
namespace avx2 {
namespace {
#define BHYT_TIER_NAME "avx2"
#define BHYT_AVX2
#include "vec-inl.h"
#include "tanh-inl.h"
#include "rows-inl.h"
#include "table-inl.h"
#undef BHYT_AVX2
#undef BHYT_TIER_NAME
}  // namespace
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,prfchw,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,prfchw,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
namespace avx512 {
namespace {
#define BHYT_TIER_NAME "avx512"
#define BHYT_AVX512
#include "vec-inl.h"
#include "tanh-inl.h"
#include "rows-inl.h"
#include "table-inl.h"
#undef BHYT_AVX512
#undef BHYT_TIER_NAME
}  // namespace
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c,prfchw,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,prfchw,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")
#endif
// AVX-512 with conversion to bfloat16 in hardware: rows with bf16 branches only, the rest is avx512's.
namespace avx512_bf16 {
namespace {
#define BHYT_AVX512
#define BHYT_AVX512_BF16
#include "vec-inl.h"
#include "tanh-inl.h"
#include "rows-inl.h"
#undef BHYT_AVX512_BF16
#undef BHYT_AVX512

void forward(const ForwardParams& p, const void* weight, int64_t begin, int64_t end) {
  if (p.branch != DType::bf16 || p.stream == DType::f64) return avx512::forward(p, weight, begin, end);
  if (p.stream == DType::bf16) return forward_rows<Float, bf16, bf16, float>(p, weight, begin, end);
  return forward_rows<Float, bf16, float, float>(p, weight, begin, end);
}

void backward(const BackwardParams& p, const void* weight, const Partials& partials, int64_t begin, int64_t end) {
  if (p.branch != DType::bf16 || p.stream == DType::f64) return avx512::backward(p, weight, partials, begin, end);
  if (p.stream == DType::bf16) return backward_chunks<Float, bf16, bf16, float>(p, weight, partials, begin, end);
  return backward_chunks<Float, bf16, float, float>(p, weight, partials, begin, end);
}

constexpr Kernels kernels = {"avx512_bf16",      forward,         backward,
                             avx512::sum_weight, avx512::sum_lam, avx512::widen_values};
}  // namespace
}  // namespace avx512_bf16
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__

std::vector<const Kernels*> runnable_kernels() {
  std::vector<const Kernels*> tables = {&baseline::kernels};
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
    return tables;
  tables.push_back(&avx2::kernels);
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return tables;
  tables.push_back(&avx512::kernels);
  if (__builtin_cpu_supports("avx512bf16")) tables.push_back(&avx512_bf16::kernels);
#endif
  return tables;
}

const Kernels& kernels_for(const char* capability) {
  const char* tier = std::strncmp(capability, "AVX512", 6) == 0 ? "avx512"
                     : std::strncmp(capability, "AVX2", 4) == 0 ? "avx2"
                                                                : "default";
  const Kernels* best = &baseline::kernels;
  for (const Kernels* table : runnable_kernels())
    if (std::strncmp(table->name, tier, std::strlen(tier)) == 0) best = table;
  return *best;
}

}  // namespace bhyt::cpu
