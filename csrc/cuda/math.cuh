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
// Of quantised outputs, which nothing reads.
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

// float8_e4m3fn, saturating; every NaN is 0x7f. Steps of 2^-9 below 2^-6, else 3 bits of mantissa.
BHYT_DEVICE uint32_t round_to_float8(float v) {
  const uint32_t bits = hw::float_to_bits(v), magnitude = bits & 0x7fffffff;
  const uint32_t size = magnitude < 0x43e00000 ? magnitude : 0x43e00000;  // 448
  const uint32_t normal = ((size + 0x7ffff + (size >> 20 & 1)) >> 20) - (120 << 3);
  const uint32_t steps = hw::float_to_bits(hw::add(hw::bits_to_float(size), 0x1p14f)) & 0xff;
  return v != v ? 0x7f : (size < 0x3c800000 ? steps : normal) | (bits >> 24 & 0x80);
}

// Two, `low` in the lower byte.
BHYT_DEVICE uint32_t to_float8_pair(float low, float high) {
  if (hw::has_float8()) return hw::to_float8_pair(low, high);
  return round_to_float8(low) | round_to_float8(high) << 8;
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

// 1 / sqrt(s): 0 of infinity, infinity of 0.
BHYT_DEVICE double reciprocal_sqrt(double s) { return hw::div(1., hw::sqrt(s)); }

// One step of Newton's on the approximate instruction: within 1.1 ulp, in a fifth of the time of a root and a division.
BHYT_DEVICE float reciprocal_sqrt(float s) {
  const float r = hw::reciprocal_sqrt_approx(s);
  const float step = hw::mul(hw::mul(0.5f, r), hw::fma(-hw::mul(s, r), r, 1.f));
  return step == step ? hw::add(r, step) : r;
}

// A call's numbers in the arithmetic type, made on the host: conversions and divisions are slow on the device.
template <class A>
struct Constants {
  A per_kappa, eps, d, per_d;
};

template <class A>
Constants<A> constants_of(const SiteParams& p) {
  return {static_cast<A>(1 / p.kappa), static_cast<A>(p.eps), static_cast<A>(p.d), static_cast<A>(1. / p.d)};
}

// sum / d
template <class A>
BHYT_DEVICE A mean_of(A sum, const Constants<A>& constants) {
  const A q = hw::mul(sum, constants.per_d);
  const A rest = hw::fma(-q, constants.d, sum);  // NaN where the sum is infinite
  return rest == rest ? hw::fma(rest, constants.per_d, q) : q;
}

// A row's scalars: with s = v + offset + eps,  `inverse` = 1 / s,  `per_lam` = 1 / (kappa sqrt(s)),  a = lam per_lam.
template <class A>
struct Scale {
  A inverse, per_lam, a;
};

// One number, 0 where none is given. Its load goes out when it is made; the dtype's branches wait until it is asked for.
struct Scalar {
  uint32_t low = 0, high = 0;
  DType dtype;

  BHYT_DEVICE explicit Scalar(const Values& t, bool given) : dtype(t.dtype) {
    const int bytes = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
    if (given) hw::load_scalar(t.data, bytes, low, high);
  }

  template <class A>
  BHYT_DEVICE A value() const {
    switch (dtype) {
      case DType::f16: return static_cast<A>(hw::half_bits_to_float(low));
      case DType::bf16: return static_cast<A>(hw::bits_to_float(low << 16));
      case DType::f32: return static_cast<A>(hw::bits_to_float(low));
      default: return static_cast<A>(hw::bits_to_double(low, high));
    }
  }
};

// The scalars of a call, the same for every row, on their way.
template <class A>
struct SiteScalars {
  Constants<A> constants;
  Scalar lam, offset;

  // Exact sites have no offset: to say so here saves asking.
  BHYT_DEVICE SiteScalars(const SiteParams& p, const Constants<A>& constants, bool exact = false)
      : constants(constants), lam(p.lam, true), offset(p.offset, !exact && p.offset.data) {}
};

// The one place where a is made, from the variance as stored: an approximate forward given the variance of an exact
// one has the same bits. Adding an absent offset as 0 changes none.
template <class A>
struct Scales {
  Constants<A> constants;
  A lam, offset;

  BHYT_DEVICE explicit Scales(const SiteScalars<A>& site)
      : constants(site.constants),
        lam(site.lam.template value<A>()),
        offset(site.offset.template value<A>()) {}

  BHYT_DEVICE Scale<A> operator()(A v) const {
    const A root = reciprocal_sqrt(hw::add(hw::add(v, offset), constants.eps));
    Scale<A> scale;
    scale.inverse = hw::mul(root, root);
    scale.per_lam = hw::mul(constants.per_kappa, root);
    scale.a = hw::mul(lam, scale.per_lam);
    hw::pin(scale.a);
    return scale;
  }
};

// tanh of a whole pack. Arguments below kSmall, almost all in this layer (4.5 standard deviations at lam = 2),
// take an odd polynomial; the rest 1 - 2r with r = 1 / (1 + exp(2|z|)). Which one an element takes is its own affair;
// the second is skipped where no element of the pack needs it. At most 2.5 ulp with the approximate instructions at
// their worst.
constexpr float kSmall = 0.9f;

// z (1 + s P(s)), s = z^2, minimax for |z| < kSmall: within 1.1 ulp (2^-25.9 before rounding).
BHYT_DEVICE float tanh_small(float z) {
  const float s = hw::mul(z, z);
  float p = 0.0013039589393883944f;
  p = hw::fma(p, s, -0.006860054098069668f);
  p = hw::fma(p, s, 0.02090412564575672f);
  p = hw::fma(p, s, -0.05372149124741554f);
  p = hw::fma(p, s, 0.13330359756946564f);
  p = hw::fma(p, s, -0.3333321213722229f);
  return hw::mul(z, hw::fma(s, p, 1.f));  // keeps the sign of -0
}

// The same for 16-bit results, with two terms less: within a relative 2^-18.2 = 3.3e-6, a three-hundredth of what their
// rounding costs. Of y = z / kUnit: whether |z| < kSmall is then a bit of s = y^2, the highest of its exponent.
constexpr float kUnit = 0.6363961f;  // kSmall / sqrt(2)
BHYT_DEVICE float tanh_small(float y, float s) {
  float p = 0.00018339134112466127f;
  p = hw::fma(p, s, -0.0020091149490326643f);
  p = hw::fma(p, s, 0.013751043006777763f);
  p = hw::fma(p, s, -0.08588044345378876f);
  p = hw::fma(p, s, kUnit);
  return hw::mul(p, y);
}

BHYT_DEVICE float half_complement(float z, float unit = 1) {  // r = 1 / (1 + exp(2|z unit|)) = (1 - tanh|z unit|) / 2
  const float twice_log2e = 2.885390081777927f;
  return hw::reciprocal_approx(hw::add(1.f, hw::exp2_approx(hw::mul(hw::abs(z), twice_log2e * unit))));
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
  for (int j = 0; j < W; ++j) t[j] = tanh_small(z[j]);
  if (all_small(z)) return;
#pragma unroll
  for (int j = 0; j < W; ++j)
    if (!(hw::abs(z[j]) < kSmall)) t[j] = hw::copysign(hw::fma(-2.f, half_complement(z[j]), 1.f), z[j]);
}

// t = tanh(a x), u = 1 - t^2, which cancels for large t only: there it is 4 r (1 - r).
template <bool to_16_bits = false, int W>
BHYT_DEVICE void tanh_and_slope(float a, const float (&x)[W], float (&t)[W], float (&u)[W]) {
  constexpr float unit = to_16_bits ? kUnit : 1.f;
  if constexpr (to_16_bits) a = hw::mul(a, 1 / kUnit);
  float z[W];
  uint32_t squares = 0;
#pragma unroll
  for (int j = 0; j < W; ++j) {
    z[j] = hw::mul(a, x[j]);
    if constexpr (to_16_bits) {
      const float s = hw::mul(z[j], z[j]);
      squares |= hw::float_to_bits(s);
      t[j] = tanh_small(z[j], s);
    } else {
      t[j] = tanh_small(z[j]);
    }
    u[j] = hw::fma(-t[j], t[j], 1.f);
  }
  if (to_16_bits ? squares < hw::float_to_bits(2.f) : all_small(z)) return;
  hw::pin(a);  // for z is made anew here: kept until now it costs registers
#pragma unroll
  for (int j = 0; j < W; ++j) {
    const float large = hw::mul(a, x[j]);
    if (to_16_bits ? hw::mul(large, large) < 2.f : hw::abs(large) < kSmall) continue;
    const float r = half_complement(large, unit);
    t[j] = hw::copysign(hw::fma(-2.f, r, 1.f), large);
    u[j] = hw::mul(hw::mul(4.f, r), hw::add(1.f, -r));
  }
}

template <int W>
BHYT_DEVICE void tanh_accurate(const double (&z)[W], double (&t)[W]) {
#pragma unroll
  for (int j = 0; j < W; ++j) t[j] = hw::tanh(z[j]);
}

template <bool = false, int W>
BHYT_DEVICE void tanh_and_slope(double a, const double (&x)[W], double (&t)[W], double (&u)[W]) {
#pragma unroll
  for (int j = 0; j < W; ++j) {
    const double z = hw::mul(a, x[j]);
    t[j] = hw::tanh(z);
    const double r = hw::div(1., hw::add(1., hw::exp(hw::mul(2., hw::abs(z)))));
    u[j] = hw::mul(hw::mul(4., r), hw::add(1., -r));
  }
}

// t = tanh(z) as exactly as the stream asks: a narrow branch on a wide stream gets what add-then-forward would give it,
// y of the sum, rounded. For 16-bit streams the instruction's 1.1e-5 is 0.003 ulp of bf16 and 0.023 ulp of fp16 on top
// of the 0.5 of rounding; a float stream gets the accurate one, and so do eight bits: up to 255 steps to the
// ten-thousandth.
template <class Stream, class Y, class A, int W>
BHYT_DEVICE void tanh_for(const A (&z)[W], A (&t)[W]) {
  if constexpr (sizeof(Stream) == 2 && sizeof(Y) == 2) {
#pragma unroll
    for (int j = 0; j < W; ++j) t[j] = hw::tanh_approx(z[j]);
  } else {
    tanh_accurate(z, t);
  }
}

}  // namespace bhyt::cuda
