// Number formats and their conversion. A is the arithmetic type: float, or double for float64 streams.
#pragma once

#include "../params.h"
#include "hardware.cuh"

namespace bhyt::cuda {

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};
// Storage of quantised outputs, which is only written.
struct Byte {
  uint8_t bits;
};

template <class T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class A, class T>
BHYT_DEVICE A widen(T v) {
  if constexpr (std::is_same_v<T, bf16>) {
    return hw::bits_to_float(uint32_t(v.bits) << 16);
  } else if constexpr (std::is_same_v<T, f16>) {
    return hw::half_bits_to_float(v.bits);
  } else {
    return static_cast<A>(v);
  }
}

// Rounds once, to nearest, ties to even.
template <class T, class A>
BHYT_DEVICE T narrow(A v) {
  if constexpr (std::is_same_v<T, bf16>) {
    return {static_cast<uint16_t>(hw::to_bfloat_bits(v))};
  } else if constexpr (std::is_same_v<T, f16>) {
    return {static_cast<uint16_t>(hw::to_half_bits(v))};
  } else {
    return static_cast<T>(v);
  }
}

// float8_e4m3fn, saturating; every NaN is 0x7f. 3 bits of mantissa from 2^-6 on; steps of 2^-9 below. For GPUs without
// the instruction: cuda_fp8.h's way is by double arithmetic, which they have little of.
BHYT_DEVICE uint32_t round_to_float8(float v) {
  const uint32_t bits = hw::float_to_bits(v), magnitude = bits & 0x7fffffff;
  const uint32_t size = magnitude < 0x43e00000 ? magnitude : 0x43e00000;  // 448
  const uint32_t normal = ((size + 0x7ffff + (size >> 20 & 1)) >> 20) - (120 << 3);
  const uint32_t steps = hw::float_to_bits(hw::add(hw::bits_to_float(size), 0x1p14f)) & 0xff;
  return v != v ? 0x7f : (size < 0x3c800000 ? steps : normal) | (bits >> 24 & 0x80);
}

// Two numbers, `low` in the lower byte.
BHYT_DEVICE uint32_t to_float8_pair(float low, float high) {
  if (hw::has_float8()) return hw::to_float8_pair(low, high);
  return round_to_float8(low) | round_to_float8(high) << 8;
}

// Element i of a tensor whose dtype is known only at run time.
template <class A>
BHYT_DEVICE A read(const Values& t, int64_t i) {
  switch (t.dtype) {
    case DType::f16: return widen<A>(static_cast<const f16*>(t.data)[i]);
    case DType::bf16: return widen<A>(static_cast<const bf16*>(t.data)[i]);
    case DType::f32: return widen<A>(static_cast<const float*>(t.data)[i]);
    default: return static_cast<A>(static_cast<const double*>(t.data)[i]);
  }
}

template <class A>
BHYT_DEVICE void write(void* data, DType dtype, int64_t i, A v) {
  switch (dtype) {
    case DType::f16: static_cast<f16*>(data)[i] = narrow<f16>(v); return;
    case DType::bf16: static_cast<bf16*>(data)[i] = narrow<bf16>(v); return;
    case DType::f32: static_cast<float*>(data)[i] = static_cast<float>(v); return;
    default: static_cast<double*>(data)[i] = v;
  }
}

}  // namespace bhyt::cuda
