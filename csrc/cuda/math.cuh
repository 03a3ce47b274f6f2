// Number formats and the functions of the formula. A is the arithmetic type: float, or double for float64 streams.
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

// Rounds once, to nearest even.
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

// Element i of a tensor whose dtype is known at run time only.
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

// A row's scalars. `shifted` = v + offset + eps;  `per_lam` = 1 / (kappa sqrt(shifted));  a = lam per_lam.
template <class A>
struct Scale {
  A shifted, per_lam, a;
};

// The one place where a is made, from the variance as stored: an approximate forward given the variance of an exact
// one has the same bits. Adding an absent offset as 0 changes none.
template <class A>
BHYT_DEVICE Scale<A> scale_of(A v, A offset, A lam, A kappa, A eps) {
  Scale<A> s;
  s.shifted = hw::add(hw::add(v, offset), eps);
  s.per_lam = hw::div(A(1), hw::mul(kappa, hw::sqrt(s.shifted)));
  s.a = hw::mul(lam, s.per_lam);
  hw::pin(s.shifted);
  hw::pin(s.per_lam);
  hw::pin(s.a);
  return s;
}

// A call's numbers in the arithmetic type, converted on the host: a conversion from 64 bits is slow on many chips.
template <class A>
struct Constants {
  A kappa, eps, d;
};

template <class A>
Constants<A> constants_of(const SiteParams& p) {
  return {static_cast<A>(p.kappa), static_cast<A>(p.eps), static_cast<A>(p.d)};
}

// The scalars of a call, the same for every row.
template <class A>
struct SiteScalars {
  Constants<A> constants;
  A lam, offset;

  BHYT_DEVICE SiteScalars(const SiteParams& p, const Constants<A>& constants)
      : constants(constants), lam(read<A>(p.lam, 0)), offset(p.offset.data ? read<A>(p.offset, 0) : A(0)) {}

  BHYT_DEVICE Scale<A> operator()(A v) const { return scale_of(v, offset, lam, constants.kappa, constants.eps); }
};

// tanh of a whole pack. Arguments below kSmall, almost all in this layer (4.5 standard deviations at lam = 2),
// take an odd polynomial; the rest 1 - 2r with r = 1 / (1 + exp(2|z|)). Which one an element takes is its own affair;
// the second is skipped where no element of the pack needs it. At most 2.5 ulp with the approximate instructions at
// their worst.
constexpr float kSmall = 0.9f;

// z + z s P(s), s = z^2, minimax for |z| < kSmall: within 1.1 ulp (2^-25.9 before rounding), or with two terms less
// within a relative 2^-18.2 = 3.3e-6, a three-hundredth of what rounding to 16 bits costs.
template <bool to_16_bits = false>
BHYT_DEVICE float tanh_small(float z) {
  const float s = hw::mul(z, z);
  float p;
  if constexpr (to_16_bits) {
    p = 0.010711031034588814f;
    p = hw::fma(p, s, -0.047523919492959976f);
    p = hw::fma(p, s, 0.13173407316207886f);
    p = hw::fma(p, s, -0.3332051932811737f);
  } else {
    p = 0.0013039589393883944f;
    p = hw::fma(p, s, -0.006860054098069668f);
    p = hw::fma(p, s, 0.02090412564575672f);
    p = hw::fma(p, s, -0.05372149124741554f);
    p = hw::fma(p, s, 0.13330359756946564f);
    p = hw::fma(p, s, -0.3333321213722229f);
  }
  return hw::fma(hw::mul(z, s), p, z);
}

BHYT_DEVICE float half_complement(float z) {  // r = 1 / (1 + exp(2|z|)) = (1 - tanh|z|) / 2
  const float twice_log2e = 2.885390081777927f;
  return hw::reciprocal_approx(hw::add(1.f, hw::exp2_approx(hw::mul(hw::abs(z), twice_log2e))));
}

template <int W>
BHYT_DEVICE bool all_small(const float (&z)[W]) {
  float largest = 0.f;  // a NaN is passed over here and kept by the polynomial
#pragma unroll
  for (int j = 0; j < W; ++j) largest = hw::max(largest, hw::abs(z[j]));
  return largest < kSmall;
}

// t = tanh(z), with the sign of z also for zeros
template <int W>
BHYT_DEVICE void tanh_accurate(const float (&z)[W], float (&t)[W]) {
#pragma unroll
  for (int j = 0; j < W; ++j) t[j] = hw::copysign(tanh_small(z[j]), z[j]);
  if (all_small(z)) return;
#pragma unroll
  for (int j = 0; j < W; ++j)
    if (!(hw::abs(z[j]) < kSmall)) t[j] = hw::copysign(hw::fma(-2.f, half_complement(z[j]), 1.f), z[j]);
}

// t = tanh(z), u = 1 - t^2, which cancels for large t only: there it is 4 r (1 - r).
template <bool to_16_bits = false, int W>
BHYT_DEVICE void tanh_and_slope(const float (&z)[W], float (&t)[W], float (&u)[W]) {
#pragma unroll
  for (int j = 0; j < W; ++j) {
    t[j] = tanh_small<to_16_bits>(z[j]);
    u[j] = hw::fma(-t[j], t[j], 1.f);
  }
  if (all_small(z)) return;
#pragma unroll
  for (int j = 0; j < W; ++j)
    if (!(hw::abs(z[j]) < kSmall)) {
      const float r = half_complement(z[j]);
      t[j] = hw::copysign(hw::fma(-2.f, r, 1.f), z[j]);
      u[j] = hw::mul(hw::mul(4.f, r), hw::add(1.f, -r));
    }
}

template <int W>
BHYT_DEVICE void tanh_accurate(const double (&z)[W], double (&t)[W]) {
#pragma unroll
  for (int j = 0; j < W; ++j) t[j] = hw::tanh(z[j]);
}

template <bool = false, int W>
BHYT_DEVICE void tanh_and_slope(const double (&z)[W], double (&t)[W], double (&u)[W]) {
#pragma unroll
  for (int j = 0; j < W; ++j) {
    t[j] = hw::tanh(z[j]);
    const double r = hw::div(1., hw::add(1., hw::exp(hw::mul(2., hw::abs(z[j])))));
    u[j] = hw::mul(hw::mul(4., r), hw::add(1., -r));
  }
}

// t = tanh(z) as exactly as the stream asks: a narrow branch on a wide stream gets what add-then-forward would give it,
// y of the sum, rounded. For 16-bit streams the instruction's 1.1e-5 is 0.003 ulp of bf16 and 0.023 ulp of fp16 on top
// of the 0.5 of rounding; a float stream gets the accurate one.
template <class Stream, class A, int W>
BHYT_DEVICE void tanh_for(const A (&z)[W], A (&t)[W]) {
  if constexpr (sizeof(Stream) == 2 && std::is_same_v<A, float>) {
#pragma unroll
    for (int j = 0; j < W; ++j) t[j] = hw::tanh_approx(z[j]);
  } else {
    tanh_accurate(z, t);
  }
}

}  // namespace bhyt::cuda
