// The arithmetic of formats.cuh, scalars.cuh, tanh.cuh and vec.cuh on the host, approximate instructions at their
// worst.
#include "scalars.cuh"
#include "tanh.cuh"

#include "rows.h"
#include "vec.cuh"

using namespace bhyt;
using namespace bhyt::cuda;
using rows::check;

namespace {

float from_bits(uint32_t bits) { return hw::bits_to_float(bits); }

// Every float of a regular sample, both signs: 2.5 ulp for tanh; for 1 - tanh^2 8e-6 relative, down to 1e-36.
void tanh_of_floats() {
  double worst = 0, worst_slope = 0, worst_short = 0;
  float at = 0;
  const uint32_t step = 401;  // of 2^31; every binade gets 20,000
  for (uint32_t bits = 0; bits <= 0x7f800000u - step; bits += step) {
    const float x = from_bits(bits);
    const float z[2] = {x, -x};
    float t[2], t_again[2], u[2];
    tanh_accurate(z, t);
    tanh_and_slope(1.f, z, t_again, u);
    const double right = std::tanh(double(x));
    const double error = std::fabs(t[0] - right) / rows::ulp(right, DType::f32);
    if (error > worst) worst = error, at = x;
    if (t[1] != -t[0] || t_again[0] != t[0] || t[0] > 1) check(false, "odd, bounded, the same twice");
    float t_short[2], u_short[2];
    tanh_and_slope<true>(1.f, z, t_short, u_short);
    if (right > 1e-30) worst_short = std::fmax(worst_short, std::fabs(t_short[0] - right) / right);
    if (u[0] > 1e-30) worst_short = std::fmax(worst_short, std::fabs(u_short[0] - u[0]) / u[0]);
    const double e = std::exp(-2. * x), slope = 4 * e / ((1 + e) * (1 + e));
    if (slope > 1e-36) worst_slope = std::fmax(worst_slope, std::fabs(u[0] - slope) / slope);
  }
  std::printf("tanh: %.2f ulp at %g; slope: %.2g relative\n", worst, at, worst_slope);
  std::printf("for 16-bit results: %.2g relative\n", worst_short);
  check(worst_short <= 8e-6, "the short tanh and its slope");
  check(worst <= 2.5, "tanh within 2.5 ulp");
  check(worst_slope <= 8e-6, "1 - tanh^2 without cancellation");
}

// Which way an element takes is its own affair: one beside a large one has the bits that it has alone.
template <bool to_16_bits>
void neighbours() {
  for (float small : {1e-4f, 0.01f, 0.3f, 0.89f}) {
    const float alone[2] = {small, 0.f}, beside[2] = {small, 3.f};
    float t_alone[2], u_alone[2], t[2], u[2];
    tanh_and_slope<to_16_bits>(1.f, alone, t_alone, u_alone);
    tanh_and_slope<to_16_bits>(1.f, beside, t, u);
    check(t[0] == t_alone[0] && u[0] == u_alone[0], "a small argument beside a large one");
  }
}

void special_values() {
  const float z[8] = {0.f, -0.f, INFINITY, -INFINITY, NAN, 1e-42f, 3e38f, 0.9f};
  float t[8], u[8];
  tanh_accurate(z, t);
  check(t[0] == 0 && !std::signbit(t[0]) && t[1] == 0 && std::signbit(t[1]), "tanh keeps the sign of zero");
  check(t[2] == 1 && t[3] == -1 && t[6] == 1, "tanh of infinities and large arguments");
  check(std::isnan(t[4]) && t[5] == z[5], "tanh of NaN and of subnormals");
  tanh_and_slope(1.f, z, t, u);
  check(u[0] == 1 && u[2] == 0 && u[3] == 0 && std::isnan(u[4]) && std::isnan(t[4]) && u[6] == 0, "slopes of the same");
  const double w[2] = {0.5, 400};
  double td[2], ud[2];
  tanh_and_slope(1., w, td, ud);
  const double slope = 1 / (std::cosh(.5) * std::cosh(.5));
  check(std::fabs(ud[0] - slope) < 1e-15 && ud[1] >= 0 && ud[1] < 1e-300, "float64 slope");
  const float small[2] = {NAN, 0.1f};
  float ts[2];
  tanh_accurate(small, ts);
  check(std::isnan(ts[0]) && std::isfinite(ts[1]), "a NaN among small arguments");
}

// Conversions of every 16-bit number there is, and of doubles between them.
template <class T>
void conversions(DType dtype) {
  rows::Tensor one(dtype, 1, 1);
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const T v = {static_cast<uint16_t>(bits)};
    const uint16_t raw = static_cast<uint16_t>(bits);
    std::memcpy(one.data(), &raw, 2);
    const double right = one.get(0, 0);
    const float wide = widen<float>(v);
    if (std::isnan(right)) {
      check(std::isnan(wide), "NaN stays NaN");
      continue;
    }
    check(wide == right && narrow<T>(wide).bits == bits, "16-bit numbers survive");
  }
  uint64_t random = 1;
  for (int i = 0; i < 20000; ++i) {
    random = random * 6364136223846793005u + 1442695040888963407u;
    const double v = std::ldexp(double(random >> 11), -53 + int(random % 60) - 40) * (random & 1024 ? -1 : 1);
    one.set(0, 0, v);
    check(widen<float>(narrow<T>(v)) == one.get(0, 0), "doubles are rounded once");
    const float f = static_cast<float>(v);
    one.set(0, 0, f);
    const float pair[2] = {f, -f};
    const auto pack = Pack<T, 2>::of(pair);
    check(pack.template get<float>(0) == one.get(0, 0) && pack.template get<float>(1) == -one.get(0, 0), "pairs too");
  }
}

// To float8_e4m3fn by integers, as older devices do it, and as the instruction: every number, every tie and the floats
// beside it, every binade.
void float8() {
  rows::Tensor one(DType::f8, 1, 1);
  const auto value = [&](uint32_t bits) {
    *static_cast<uint8_t*>(one.data()) = static_cast<uint8_t>(bits);
    return one.get(0, 0);
  };
  const auto expect = [&](float v, uint32_t bits) {
    const uint32_t by_integers = round_to_float8(v), negative = round_to_float8(-v);
    check(by_integers == bits && negative == (bits | 0x80), "float8 of " + std::to_string(v));
    for (bool instruction : {false, true}) {
      simt::machine().has_float8 = instruction;
      check(to_float8_pair(v, -v) == (bits | (bits | 0x80) << 8), "a pair of float8");
    }
  };
  for (uint32_t bits = 0; bits < 0x7e; ++bits) {
    const float v = static_cast<float>(value(bits)), tie = static_cast<float>((value(bits) + value(bits + 1)) / 2);
    expect(v, bits);
    expect(tie, bits + bits % 2);
    expect(std::nextafter(tie, 0.f), bits);
    expect(std::nextafter(tie, 1e9f), bits + 1);
  }
  for (float v : {448.f, 464.f, 1e9f, INFINITY}) expect(v, 0x7e);
  for (float v : {1e-42f, 1e-20f, 0x1p-11f}) expect(v, 0);
  for (float nan : {NAN, -NAN}) {
    check(round_to_float8(nan) == 0x7f, "NaN");
    for (bool instruction : {false, true}) {
      simt::machine().has_float8 = instruction;
      check(to_float8_pair(nan, 1.f) == (0x7f | 0x38 << 8), "NaN of a pair");
    }
  }
}

// Element-wise packs read what wide ones read, zeros beyond the row, and write nothing beyond it.
template <class T, int W>
void packs(DType dtype) {
  const int64_t d = 2 * W - 1;
  rows::Tensor row(dtype, 1, 2 * W), out(dtype, 1, d);
  for (int64_t i = 0; i < 2 * W; ++i) row.set(0, i, i + 0.5);
  const T* data = static_cast<const T*>(row.data());
  const auto narrow_pack = Pack<T, W>::template load<false>(data, W, d);
  const auto wide_pack = Pack<T, W>::template load<true>(data, W, d);
  for (int j = 0; j < W; ++j) {
    check(wide_pack.template get<double>(j) == W + j + 0.5, "wide load");
    check(narrow_pack.template get<double>(j) == (W + j < d ? W + j + 0.5 : 0), "element-wise load");
  }
  wide_pack.template store<false>(static_cast<T*>(out.data()), W, d);
  check(out.guards_hold() && (W == 1 || out.get(0, d - 1) == d - 0.5), "element-wise store");
}

Scale<float> scale_of(float v, double offset, double lam) {
  SiteParams p;
  const float lam_value = static_cast<float>(lam);
  p.lam = {&lam_value, DType::f32};
  p.offset = {&offset, DType::f64};
  p.d = 48;
  return Scales<float>(SiteScalars<float>(p, constants_of<float>(p)))(v);
}

void scales() {
  const auto exact = scale_of(0.5f, 0, 2);
  check(std::fabs(exact.a - 2 / (10 * std::sqrt(0.500001))) < 5e-8, "a = lam / (kappa sqrt(v + eps))");
  const auto off = scale_of(0.5f, 0.25, 0);
  check(off.a == 0 && off.per_lam > 0.115 && off.inverse < 1.34f, "lam = 0 leaves 1 / (kappa sqrt(..))");
  check(scale_of(INFINITY, 0, 2).a == 0, "an infinite variance leaves nothing");
  check(std::isnan(scale_of(NAN, 0, 2).a), "NaN stays");

  double worst = 0;
  for (uint32_t bits = 0x00800000; bits < 0x7f000000; bits += 4099) {
    const float s = hw::bits_to_float(bits);
    const double right = 1 / std::sqrt(static_cast<double>(s));
    worst = std::max(worst, std::fabs(reciprocal_sqrt(s) / right - 1));
  }
  check(worst < 1.1 * 0x1p-23, "1 / sqrt within 1.1 ulp");
  check(reciprocal_sqrt(0.f) == INFINITY && reciprocal_sqrt(INFINITY) == 0, "1 / sqrt of 0 and of infinity");

  SiteParams p;
  p.d = 48;
  const auto constants = constants_of<float>(p);
  for (float sum : {1.f, 47.999f, 3e38f, 1e-30f}) check(mean_of(sum, constants) == sum / 48, "a mean is rounded once");
  check(mean_of(INFINITY, constants) == INFINITY && mean_of(0.f, constants) == 0, "means of nothing and of too much");
}

}  // namespace

int main() {
  tanh_of_floats();
  neighbours<false>();
  neighbours<true>();
  special_values();
  conversions<f16>(DType::f16);
  conversions<bf16>(DType::bf16);
  packs<f16, 8>(DType::f16);
  packs<f16, 2>(DType::f16);
  packs<bf16, 8>(DType::bf16);
  packs<bf16, 4>(DType::bf16);
  packs<float, 4>(DType::f32);
  packs<float, 8>(DType::f32);
  packs<double, 2>(DType::f64);
  float8();
  scales();
  return rows::report("math");
}
