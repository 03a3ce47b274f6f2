// AVX2: 8 float lanes. Included by vec-inl.h.

struct Float {
  using F = __m256;
  using Mask = __m256;
  static constexpr int N = 8, at_once = 4, at_once_backward = 2;
  static constexpr double last_place_1 = 0x1.8p23;

  static F set1(double x) { return _mm256_set1_ps(static_cast<float>(x)); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }
  static F min_of(F limit, F x) { return _mm256_min_ps(limit, x); }
  static F max_of(F limit, F x) { return _mm256_max_ps(limit, x); }
  static F zero_if_nan(F x) { return _mm256_and_ps(_mm256_cmp_ps(x, x, _CMP_ORD_Q), x); }
  static F sign_bit() { return _mm256_set1_ps(-0.0f); }
  static F abs(F x) { return _mm256_andnot_ps(sign_bit(), x); }
  static F copy_sign(F magnitude, F sign) {
    return _mm256_or_ps(_mm256_andnot_ps(sign_bit(), magnitude), _mm256_and_ps(sign_bit(), sign));
  }
  static Mask not_below(F x, F limit) { return _mm256_cmp_ps(x, limit, _CMP_NLT_UQ); }
  static bool any(Mask m) { return _mm256_movemask_ps(m) != 0; }
  static F select(Mask m, F yes, F no) { return _mm256_blendv_ps(no, yes, m); }
  // The order of squares is the order of their bits. The bits of a NaN are above those of all numbers.
  template <int K>
  static bool any_from(const F (&squares)[K], F limit) {
    __m256i largest = _mm256_castps_si256(squares[0]);
    for (int k = 1; k < K; ++k) largest = _mm256_max_epu32(largest, _mm256_castps_si256(squares[k]));
    return any(not_below(_mm256_castsi256_ps(largest), limit));
  }
  static double sum(F x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }

  // The divider works beside the FMA ports: a true division costs less than refining the 12-bit estimate.
  static F reciprocal_14bit(F x) { return reciprocal(x); }
  static F reciprocal(F x) { return _mm256_div_ps(_mm256_set1_ps(1.0f), x); }
  static F round(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F power_of_two(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  }
  // x * 2^n for integer |n| < 250, in two steps so that subnormal results are right.
  static F scale(F x, F n) {
    const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    return _mm256_mul_ps(_mm256_mul_ps(x, power_of_two(half)), power_of_two(_mm256_sub_epi32(whole, half)));
  }

  static __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static F load_part(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static void store_part(float* p, int n, F x) { _mm256_maskstore_ps(p, first(n), x); }

  static F from_bits(__m128i bits, const bf16*) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static F from_bits(__m128i bits, const f16*) { return _mm256_cvtph_ps(bits); }
  static __m128i to_bits(F x, const bf16*) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    rounded = _mm256_srli_epi32(rounded, 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  }
  static __m128i to_bits(F x, const f16*) {
    return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  template <typename H>
  static F load(const H* p) {
    return from_bits(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), p);
  }
  template <typename H>
  static F load_part(const H* p, int n) {
    H all[N] = {};
    std::memcpy(all, p, n * sizeof(H));
    return load(all);
  }
  template <typename H>
  static void store(H* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bits(x, p));
  }
  template <typename H>
  static void store_part(H* p, int n, F x) {
    H all[N];
    store(all, x);
    std::memcpy(p, all, n * sizeof(H));
  }

  // 32 bits, of which the low byte is stored.
  static __m256i to_byte(F x, const integer8*) { return _mm256_castps_si256(x); }
  static __m256i to_byte(F x, const float8*) {
    const F size = _mm256_min_ps(_mm256_set1_ps(448.0f), abs(x));
    const __m256i bits = _mm256_min_epi32(_mm256_castps_si256(size), _mm256_set1_epi32(0x43f00000));  // NaN: 480
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 20), _mm256_set1_epi32(1));
    __m256i byte = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7ffff - (120 << 23))), odd);
    byte = _mm256_srli_epi32(byte, 20);
    const __m256i subnormal = _mm256_cmpgt_epi32(_mm256_set1_epi32(121 << 23), bits);  // below 2^-6: steps of 2^-9
    const __m256i steps = _mm256_castps_si256(_mm256_add_ps(size, _mm256_set1_ps(0x1p14)));
    byte = _mm256_blendv_epi8(byte, steps, subnormal);
    const __m256i sign = _mm256_srli_epi32(_mm256_castps_si256(x), 24);
    return _mm256_or_si256(byte, _mm256_and_si256(sign, _mm256_set1_epi32(0x80)));
  }
  template <typename B>
    requires(sizeof(B) == 1)
  static void store(B* p, F x) {
    const __m256i low = _mm256_and_si256(to_byte(x, p), _mm256_set1_epi32(0xff));
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
  }
  template <typename B>
    requires(sizeof(B) == 1)
  static void store_bytes(B* p, const F (&x)[4]) {
    __m256i low[4];
    for (int k = 0; k < 4; ++k) low[k] = _mm256_and_si256(to_byte(x[k], p), _mm256_set1_epi32(0xff));
    const __m256i bytes = _mm256_packus_epi16(_mm256_packus_epi32(low[0], low[1]), _mm256_packus_epi32(low[2], low[3]));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packs work within halves
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permutevar8x32_epi32(bytes, order));
  }
};

#include "vec_pair-inl.h"

struct Bfloat : Pair<Bfloat, Float> {
  using Pair::load, Pair::store;
  static F load(const bf16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0xffff0000))))};
  }
  static void store(bf16* p, F x) { store_upper(p, rounded(x.even), rounded(x.odd)); }
  static void store_untied(bf16* p, F x) {
    const __m256i half = _mm256_set1_epi32(0x7fff);
    store_upper(p, _mm256_add_epi32(_mm256_castps_si256(x.even), half),
                _mm256_add_epi32(_mm256_castps_si256(x.odd), half));
  }

  template <typename B>
    requires(sizeof(B) == 1)
  static void store_bytes(B* p, const F (&x)[2]) {
    const __m256i words = _mm256_packus_epi32(words_of(x[0], p), words_of(x[1], p));
    const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);  // packs work within halves
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), ordered);
  }

  static F in_order(F x) {
    const __m256 low = _mm256_unpacklo_ps(x.even, x.odd), high = _mm256_unpackhi_ps(x.even, x.odd);
    return {_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)};
  }
  static F from_order(F x) {
    const __m256 low = _mm256_permute2f128_ps(x.even, x.odd, 0x20), high = _mm256_permute2f128_ps(x.even, x.odd, 0x31);
    return {_mm256_shuffle_ps(low, high, 0x88), _mm256_shuffle_ps(low, high, 0xdd)};
  }

 private:
  // Two bytes in the lower half of each 32 bits.
  template <typename B>
  static __m256i words_of(F x, const B* p) {
    const __m256i even = _mm256_and_si256(Float::to_byte(x.even, p), _mm256_set1_epi32(0xff));
    const __m256i odd = _mm256_and_si256(Float::to_byte(x.odd, p), _mm256_set1_epi32(0xff));
    return _mm256_or_si256(even, _mm256_slli_epi32(odd, 8));
  }
  static __m256i rounded(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  }
  static void store_upper(bf16* p, __m256i even, __m256i odd) {
    const __m256i words = _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), words);
  }
};
