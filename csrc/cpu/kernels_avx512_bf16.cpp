// The rows in AVX-512 with conversion to bfloat16 in hardware: those with bf16 branches, the rest is avx512's.
#include "tier.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c,prfchw,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,prfchw,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")
#endif

namespace bhyt::cpu::avx512_bf16 {
namespace {
#define BHYT_AVX512
#define BHYT_AVX512_BF16
#include "vec-inl.h"
#include "tanh-inl.h"
#include "rows-inl.h"

void forward(const ForwardParams& p, const void* weight, int64_t begin, int64_t end) {
  if (p.branch != DType::bf16 || p.stream == DType::f64) return avx512::kernels.forward(p, weight, begin, end);
  if (p.stream == DType::bf16) return forward_rows<Float, bf16, bf16, float>(p, weight, begin, end);
  return forward_rows<Float, bf16, float, float>(p, weight, begin, end);
}

void backward(const BackwardParams& p, const void* weight, const Partials& partials, int64_t begin, int64_t end) {
  if (p.branch != DType::bf16 || p.stream == DType::f64)
    return avx512::kernels.backward(p, weight, partials, begin, end);
  if (p.stream == DType::bf16) return backward_chunks<Float, bf16, bf16, float>(p, weight, partials, begin, end);
  return backward_chunks<Float, bf16, float, float>(p, weight, partials, begin, end);
}

void sum_weight(const BackwardParams& p, const Partials& partials, int64_t begin, int64_t end) {
  avx512::kernels.sum_weight(p, partials, begin, end);
}

void sum_lam(const BackwardParams& p, const Partials& partials) { avx512::kernels.sum_lam(p, partials); }

void widen_values(const Values& from, DType stream, const Quantization* quantization, int64_t n, void* to) {
  avx512::kernels.widen(from, stream, quantization, n, to);
}
}  // namespace

constinit const Kernels kernels = {"avx512_bf16", 1, forward, backward, sum_weight, sum_lam, widen_values};
}  // namespace bhyt::cpu::avx512_bf16

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
