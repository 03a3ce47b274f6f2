// AVX-512: 16 float lanes. Included by vec-inl.h.

struct Float {
  using F = __m512;
  using Mask = __mmask16;
  static constexpr int N = 16, at_once = 4, at_once_backward = 4;
  static constexpr double last_place_1 = 0x1.8p23;

  static F set1(double x) { return _mm512_set1_ps(static_cast<float>(x)); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
  static F min_of(F limit, F x) { return _mm512_min_ps(limit, x); }
  static F max_of(F limit, F x) { return _mm512_max_ps(limit, x); }
  static F zero_if_nan(F x) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, x, _CMP_ORD_Q), x); }
  static F abs(F x) { return _mm512_abs_ps(x); }
  static F copy_sign(F magnitude, F sign) {
    const __m512i mask = _mm512_set1_epi32(static_cast<int>(0x80000000));  // 0xca: the second operand where set
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(mask, _mm512_castps_si512(sign),
                                                         _mm512_castps_si512(magnitude), 0xca));
  }
  static Mask not_below(F x, F limit) { return _mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ); }
  static bool any(Mask m) { return m != 0; }
  static F select(Mask m, F yes, F no) { return _mm512_mask_blend_ps(m, no, yes); }
  // The order of squares is the order of their bits. The bits of a NaN are above those of all numbers.
  template <int K>
  static bool any_from(const F (&squares)[K], F limit) {
    __m512i largest = _mm512_castps_si512(squares[0]);
    for (int k = 1; k < K; ++k) largest = _mm512_max_epu32(largest, _mm512_castps_si512(squares[k]));
    return any(not_below(_mm512_castsi512_ps(largest), limit));
  }
  static double sum(F x) { return _mm512_reduce_add_ps(x); }

  // 1 / x to 2^-14; a Newton step makes it 1 ulp.
  static F reciprocal_14bit(F x) { return _mm512_rcp14_ps(x); }
  static F reciprocal(F x) {
    const F r = _mm512_rcp14_ps(x);
    return _mm512_fmadd_ps(r, _mm512_fnmadd_ps(r, x, _mm512_set1_ps(1.0f)), r);
  }
  static F round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // x * 2^n for integer n, subnormal results included.
  static F scale(F x, F n) { return _mm512_scalef_ps(x, n); }

  static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load_part(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static void store_part(float* p, int n, F x) { _mm512_mask_storeu_ps(p, first(n), x); }

  static F from_bits(__m256i bits, const bf16*) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static F from_bits(__m256i bits, const f16*) { return _mm512_cvtph_ps(bits); }
  static __m256i to_bits(F x, const bf16*) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    // A NaN is not rounded: a carry could reach its exponent. Its upper half alone is a NaN, as is that of every NaN
    // that arithmetic makes.
    const __mmask16 ordered = _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_add_epi32(bits, ordered, bits, half), 16));
  }
  static __m256i to_bits(F x, const f16*) {
    return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  template <typename H>
  static F load(const H* p) {
    return from_bits(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), p);
  }
  template <typename H>
  static F load_part(const H* p, int n) {
    return from_bits(_mm256_maskz_loadu_epi16(first(n), p), p);
  }
  template <typename H>
  static void store(H* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bits(x, p));
  }
  template <typename H>
  static void store_part(H* p, int n, F x) {
    _mm256_mask_storeu_epi16(p, first(n), to_bits(x, p));
  }

  // 32 bits, of which the low byte is stored.
  static __m512i to_byte(F x, const integer8*) { return _mm512_castps_si512(x); }
  static __m512i to_byte(F x, const float8*) {
    const F size = _mm512_min_ps(_mm512_set1_ps(448.0f), abs(x));
    const __m512i bits = _mm512_min_epu32(_mm512_castps_si512(size), _mm512_set1_epi32(0x43f00000));  // NaN: 480
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 20), _mm512_set1_epi32(1));
    __m512i byte = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7ffff - (120 << 23))), odd);
    byte = _mm512_srli_epi32(byte, 20);
    const auto subnormal = _mm512_cmplt_epi32_mask(bits, _mm512_set1_epi32(121 << 23));  // below 2^-6: steps of 2^-9
    byte = _mm512_castps_si512(_mm512_mask_add_ps(_mm512_castsi512_ps(byte), subnormal, size, _mm512_set1_ps(0x1p14)));
    const __m512i sign = _mm512_srli_epi32(_mm512_castps_si512(x), 24);
    return _mm512_ternarylogic_epi32(byte, sign, _mm512_set1_epi32(0x80), 0xf8);  // byte | sign & 0x80
  }
  template <typename B>
    requires(sizeof(B) == 1)
  static void store(B* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(to_byte(x, p)));
  }
  template <typename B>
    requires(sizeof(B) == 1)
  static void store_part(B* p, int n, F x) {
    _mm_mask_storeu_epi8(p, first(n), _mm512_cvtepi32_epi8(to_byte(x, p)));
  }
};

#include "vec_pair-inl.h"

struct Bfloat : Pair<Bfloat, Float> {
  using Pair::load, Pair::store;
  static F load(const bf16* p) {
    const __m512i bits = _mm512_loadu_si512(p);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)), _mm512_castsi512_ps(_mm512_and_si512(bits, upper()))};
  }
  static void store(bf16* p, F x) { store_upper(p, rounded(x.even), rounded(x.odd)); }
  static void store_untied(bf16* p, F x) {
    const __m512i half = _mm512_set1_epi32(0x7fff);
    store_upper(p, _mm512_add_epi32(_mm512_castps_si512(x.even), half),
                _mm512_add_epi32(_mm512_castps_si512(x.odd), half));
  }

  template <typename B>
    requires(sizeof(B) == 1)
  static void store_bytes(B* p, const F (&x)[2]) {
    for (int k = 0; k < 2; ++k) {
      const __m512i odd = _mm512_slli_epi32(Float::to_byte(x[k].odd, p), 8);
      // 0xca takes the even element's byte where the mask is set. The upper half of each 32 bits is not stored.
      const __m512i words =
          _mm512_ternarylogic_epi32(_mm512_set1_epi32(0xff), Float::to_byte(x[k].even, p), odd, 0xca);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + k * N), _mm512_cvtepi32_epi16(words));
    }
  }

  static F in_order(F x) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    return {_mm512_permutex2var_ps(x.even, low, x.odd), _mm512_permutex2var_ps(x.even, high, x.odd)};
  }
  static F from_order(F x) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    return {_mm512_permutex2var_ps(x.even, even, x.odd), _mm512_permutex2var_ps(x.even, odd, x.odd)};
  }

 private:
  static __m512i upper() { return _mm512_set1_epi32(static_cast<int>(0xffff0000)); }
  static __m512i rounded(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  }
  // 0xca takes the odd element's half where `upper` is set, and the even element's elsewhere.
  static void store_upper(bf16* p, __m512i even, __m512i odd) {
    _mm512_storeu_si512(p, _mm512_ternarylogic_epi32(upper(), odd, _mm512_srli_epi32(even, 16), 0xca));
  }
};
