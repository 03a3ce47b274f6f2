// The storage types of rows, and conversions of single values. Conversions of vectors are in vec-inl.h.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "params.h"

namespace bhyt::cpu {

struct bf16 {
  uint16_t bits;
};
#if defined(__aarch64__)
using Half = __fp16;  // GCC has _Float16 there from 13 on
#else
using Half = _Float16;
#endif
struct f16 {
  Half value;
};

// A float32 of an array in the order of the lanes of bf16 (vec_pair-inl.h).
struct laned {
  float value;
};

// Storage of quantised outputs. Kernels write it and never read it. A number for integer8 is an integer plus
// last_place_1 (vec-inl.h), and its lowest bits are stored. float8 is float8_e4m3fn.
struct integer8 {
  uint8_t bits;
};
struct float8 {
  uint8_t bits;
};

// Round to nearest, ties to even; every NaN becomes the quiet one.
inline uint16_t round_to_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline double widen(double x) { return x; }
inline double widen(float x) { return x; }
inline double widen(f16 x) { return static_cast<double>(x.value); }
inline double widen(bf16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

// 16-bit types are rounded to float first: the arithmetic of their rows is float.
inline void narrow(double x, double* to) { *to = x; }
inline void narrow(double x, float* to) { *to = static_cast<float>(x); }
inline void narrow(double x, f16* to) { to->value = static_cast<Half>(static_cast<float>(x)); }
inline void narrow(double x, bf16* to) { to->bits = round_to_bf16(static_cast<float>(x)); }
inline void narrow(double x, integer8* to) { to->bits = static_cast<uint8_t>(std::bit_cast<uint64_t>(x)); }

// 3 bits of mantissa from 2^-6 on; steps of 2^-9 below. Saturates at 448; a NaN is 0x7f.
inline void narrow(double x, float8* to) {
  const double size = std::fabs(x) > 448 ? 448 : std::fabs(x);
  const uint64_t bits = std::bit_cast<uint64_t>(size), odd = bits >> 49 & 1;
  const uint64_t normal = ((bits + (uint64_t{1} << 48) - 1 + odd) >> 49) - (1016 << 3);
  const uint64_t steps = std::bit_cast<uint64_t>(size + 0x1p43);
  to->bits = x != x ? 0x7f : static_cast<uint8_t>((size < 0x1p-6 ? steps : normal) | (std::signbit(x) ? 0x80 : 0));
}

// Calls f with a null pointer to the storage type: so a dtype becomes a template argument.
template <typename F>
inline void with_type(DType t, F f) {
  switch (t) {
    case DType::f16: return f(static_cast<const f16*>(nullptr));
    case DType::bf16: return f(static_cast<const bf16*>(nullptr));
    case DType::f32: return f(static_cast<const float*>(nullptr));
    case DType::f64: return f(static_cast<const double*>(nullptr));
    default: return;  // nothing reads eight bits
  }
}

// The same for y: its storage type is X unless it is quantised.
template <typename X, typename F>
inline void with_output_type(const ForwardParams& p, F f) {
  if (!p.quantization) return f(static_cast<X*>(nullptr));
  if (p.quantization->dtype == DType::f8) return f(static_cast<float8*>(nullptr));
  return f(static_cast<integer8*>(nullptr));
}

inline double read(const Values& v, int64_t i = 0) {
  double out = 0;
  with_type(v.dtype, [&](auto* type) { out = widen(static_cast<decltype(type)>(v.data)[i]); });
  return out;
}

inline void write(double x, DType t, void* to, int64_t i = 0) {
  with_type(t, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    narrow(x, static_cast<T*>(to) + i);
  });
}

}  // namespace bhyt::cpu
