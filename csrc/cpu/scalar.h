// Storage types of the rows and their conversion one by one. Vector conversions are in vec-inl.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "params.h"

namespace bhyt::cpu {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  _Float16 value;
};

template <typename To, typename From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Round to nearest, ties to even; every NaN becomes the quiet one.
inline uint16_t round_to_bf16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if (x != x) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline double widen(double x) { return x; }
inline double widen(float x) { return x; }
inline double widen(f16 x) { return static_cast<double>(x.value); }
inline double widen(bf16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

// Through float for the 16-bit types, as the arithmetic they belong to is float.
inline void narrow(double x, double* to) { *to = x; }
inline void narrow(double x, float* to) { *to = static_cast<float>(x); }
inline void narrow(double x, f16* to) { to->value = static_cast<_Float16>(static_cast<float>(x)); }
inline void narrow(double x, bf16* to) { to->bits = round_to_bf16(static_cast<float>(x)); }

// Calls f with a null pointer of the storage type, the way a dtype becomes a template argument.
template <typename F>
inline void with_type(DType t, F f) {
  switch (t) {
    case DType::f16: return f(static_cast<const f16*>(nullptr));
    case DType::bf16: return f(static_cast<const bf16*>(nullptr));
    case DType::f32: return f(static_cast<const float*>(nullptr));
    case DType::f64: return f(static_cast<const double*>(nullptr));
  }
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
