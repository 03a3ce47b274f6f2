// NEON of AArch64: 4 float lanes. Included by vec-inl.h.

struct Float {
  using F = float32x4_t;
  using Mask = uint32x4_t;
  static constexpr int N = 4, at_once = 4, at_once_backward = 4;
  static constexpr double last_place_1 = 0x1.8p23;

  static uint32x4_t bits(F x) { return vreinterpretq_u32_f32(x); }
  static F set1(double x) { return vdupq_n_f32(static_cast<float>(x)); }
  static F add(F a, F b) { return vaddq_f32(a, b); }
  static F sub(F a, F b) { return vsubq_f32(a, b); }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F fnma(F a, F b, F c) { return vfmsq_f32(c, a, b); }
  static F min_of(F limit, F x) { return vminq_f32(limit, x); }
  static F max_of(F limit, F x) { return vmaxq_f32(limit, x); }
  static F zero_if_nan(F x) { return vreinterpretq_f32_u32(vandq_u32(vceqq_f32(x, x), bits(x))); }
  static F abs(F x) { return vabsq_f32(x); }
  static F copy_sign(F magnitude, F sign) { return vbslq_f32(vdupq_n_u32(0x80000000), sign, magnitude); }
  static Mask not_below(F x, F limit) { return vmvnq_u32(vcltq_f32(x, limit)); }
  static bool any(Mask m) { return vmaxvq_u32(m) != 0; }
  static F select(Mask m, F yes, F no) { return vbslq_f32(m, yes, no); }
  // The order of squares is the order of their bits. The bits of a NaN are above those of all numbers.
  template <int K>
  static bool any_from(const F (&squares)[K], F limit) {
    uint32x4_t largest = bits(squares[0]);
    for (int k = 1; k < K; ++k) largest = vmaxq_u32(largest, bits(squares[k]));
    return any(not_below(vreinterpretq_f32_u32(largest), limit));
  }
  static double sum(F x) { return vaddvq_f32(x); }

  static F reciprocal_14bit(F x) { return reciprocal(x); }
  static F reciprocal(F x) { return vdivq_f32(set1(1), x); }
  static F round(F x) { return vrndnq_f32(x); }
  static F power_of_two(int32x4_t n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23));
  }
  // x * 2^n for integer |n| < 250, in two steps so that subnormal results are right.
  static F scale(F x, F n) {
    const int32x4_t whole = vcvtnq_s32_f32(n), half = vshrq_n_s32(whole, 1);
    return vmulq_f32(vmulq_f32(x, power_of_two(half)), power_of_two(vsubq_s32(whole, half)));
  }

  static F load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, F x) { vst1q_f32(p, x); }
  static F load(const bf16* p) { return vreinterpretq_f32_u32(vshll_n_u16(words(p), 16)); }
  static F load(const f16* p) { return vcvt_f32_f16(vreinterpret_f16_u16(words(p))); }
  static void store(bf16* p, F x) {
    const uint32x4_t number = vbslq_u32(vceqq_f32(x, x), bits(x), vdupq_n_u32(0x7fc00000));
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(number, 16), vdupq_n_u32(1));
    const uint16x4_t rounded = vaddhn_u32(vaddq_u32(number, odd), vdupq_n_u32(0x7fff));
    std::memcpy(p, &rounded, sizeof rounded);
  }
  static void store(f16* p, F x) {
    const float16x4_t rounded = vcvt_f16_f32(x);
    std::memcpy(p, &rounded, sizeof rounded);
  }
  // Stores the low byte of each 32 bits.
  template <typename B>
    requires(sizeof(B) == 1)
  static void store(B* p, F x) {
    const uint16x4_t low = vmovn_u32(to_byte(x, p));
    const uint8x8_t bytes = vmovn_u16(vcombine_u16(low, low));
    std::memcpy(p, &bytes, N);
  }

  template <typename T>
  static F load_part(const T* p, int n) {
    T all[N] = {};
    std::memcpy(all, p, n * sizeof(T));
    return load(all);
  }
  template <typename T>
  static void store_part(T* p, int n, F x) {
    T all[N];
    store(all, x);
    std::memcpy(p, all, n * sizeof(T));
  }

 private:
  template <typename H>
  static uint16x4_t words(const H* p) {
    uint16x4_t all;
    std::memcpy(&all, p, sizeof all);
    return all;
  }
  static uint32x4_t to_byte(F x, const integer8*) { return bits(x); }
  static uint32x4_t to_byte(F x, const float8*) {
    const F size = vminq_f32(set1(448), abs(x));
    const uint32x4_t number = vminq_u32(bits(size), vdupq_n_u32(0x43f00000));  // NaN: 480
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(number, 20), vdupq_n_u32(1));
    const uint32x4_t rebiased = vaddq_u32(number, vdupq_n_u32(0x7ffffu - (120u << 23)));
    const uint32x4_t normal = vshrq_n_u32(vaddq_u32(rebiased, odd), 20);
    const uint32x4_t subnormal = vcltq_u32(number, vdupq_n_u32(121 << 23));  // below 2^-6: steps of 2^-9
    const uint32x4_t byte = vbslq_u32(subnormal, bits(add(size, set1(0x1p14))), normal);
    return vorrq_u32(byte, vandq_u32(vshrq_n_u32(bits(x), 24), vdupq_n_u32(0x80)));
  }
};

#include "vec_pair-inl.h"

struct Bfloat : Pair<Bfloat, Float> {
  using Pair::load, Pair::store;
  static F load(const bf16* p) {
    uint32x4_t both;
    std::memcpy(&both, p, sizeof both);
    return {vreinterpretq_f32_u32(vshlq_n_u32(both, 16)),
            vreinterpretq_f32_u32(vandq_u32(both, vdupq_n_u32(0xffff0000)))};
  }
  static void store(bf16* p, F x) { store_upper(p, rounded(Float::bits(x.even)), rounded(Float::bits(x.odd))); }
  static void store_untied(bf16* p, F x) {
    const uint32x4_t half = vdupq_n_u32(0x7fff);
    store_upper(p, vaddq_u32(Float::bits(x.even), half), vaddq_u32(Float::bits(x.odd), half));
  }
  static F in_order(F x) { return {vzip1q_f32(x.even, x.odd), vzip2q_f32(x.even, x.odd)}; }
  static F from_order(F x) { return {vuzp1q_f32(x.even, x.odd), vuzp2q_f32(x.even, x.odd)}; }

 private:
  static uint32x4_t rounded(uint32x4_t x) {
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(x, 16), vdupq_n_u32(1));
    return vaddq_u32(vaddq_u32(x, vdupq_n_u32(0x7fff)), odd);
  }
  static void store_upper(bf16* p, uint32x4_t even, uint32x4_t odd) {
    const uint32x4_t both = vsriq_n_u32(odd, even, 16);
    std::memcpy(p, &both, sizeof both);
  }
};
