// tanh and its slope.
#pragma once

#include "formats.cuh"

namespace bhyt::cuda {

// tanh of a whole pack. Arguments below kSmall, which almost all are (4.5 standard deviations at lam = 2), take an odd
// polynomial; the others take 1 - 2r with r = 1 / (1 + exp(2|z|)). Each element chooses by its own argument; the second
// way is skipped where no element of the pack needs it. At most 2.5 ulp with the approximate instructions at their
// worst.
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

// The same for 16-bit results with two terms less: within a relative 2^-18.2 = 3.3e-6, a three-hundredth of their
// rounding. The argument is y = z / kUnit, so that one bit of s = y^2, the highest of its exponent, says whether |z| <
// kSmall.
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
  float largest = 0.f;  // max passes over a NaN; the polynomial keeps it
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

// t = tanh(a x) and u = 1 - t^2. The difference cancels for large t only; there u is 4 r (1 - r).
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
  hw::pin(a);  // z is computed again from here on: to keep it costs registers
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

// t = tanh(z) in the accuracy of the stream, so that add_forward gives the bits of an addition and a forward. For
// 16-bit streams the instruction's 1.1e-5 is 0.003 ulp of bf16 and 0.023 ulp of fp16, on top of the 0.5 of rounding.
// Float streams and quantised outputs, whose up to 255 steps are held to a ten-thousandth of a step, get the accurate
// one.
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
