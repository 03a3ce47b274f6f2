// Vector types of one instruction set; included once per set, inside its namespace and under its target pragma.
//
//   Float   float lanes for f32, bf16 and f16 rows (sets with such lanes: BHYT_AVX512, BHYT_AVX2)
//   Wide    double lanes for f64 rows, in every set; in the baseline for all rows
//
// Each is a set of static functions over a register type F:
//   load / store          whole registers, any storage type; *_part: the first n lanes, the others read as 0
//   fma(a, b, c) = a b + c, fnma(a, b, c) = c - a b
//   min_of, max_of(limit, x)      NaN if x is NaN
//   zero_if_nan(x)        x elsewhere
//   not_below(x, limit)   lanes with !(x < limit), NaN included, as a Mask
//   sum(x)                of the lanes, in a fixed order
//   last_place_1          added to a small number it rounds it to an integer, which is then the sum's lowest bits
// Storage of one byte is only written: integer8 takes the lowest bits, float8 any number.

#if defined(BHYT_AVX512)

struct Float {
  using F = __m512;
  using Mask = __mmask16;
  using Scalar = float;
  static constexpr int N = 16;
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
    const __m512i mask = _mm512_set1_epi32(static_cast<int>(0x80000000));  // 0xca: where set, the second operand
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(mask, _mm512_castps_si512(sign),
                                                         _mm512_castps_si512(magnitude), 0xca));
  }
  static Mask not_below(F x, F limit) { return _mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ); }
  static Mask either(Mask a, Mask b) { return static_cast<Mask>(a | b); }
  static bool any(Mask m) { return m != 0; }
  static F select(Mask m, F yes, F no) { return _mm512_mask_blend_ps(m, no, yes); }
  static double sum(F x) { return _mm512_reduce_add_ps(x); }

  // 1 / x to 2^-14, and by one Newton step to 1 ulp.
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
#if defined(BHYT_AVX512_BF16)
    // Two instructions for ten, but they flush subnormals to zero: those take the long way.
    if (__builtin_expect(_mm512_fpclass_ps_mask(x, 0x20) == 0, 1))
      return (__m256i)_mm512_cvtneps_pbh(x);  // a cast of vectors: no value changes
#endif
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    rounded = _mm512_srli_epi32(rounded, 16);
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    return _mm512_cvtepi32_epi16(rounded);
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

  // 32 bits whose low byte is what is stored.
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

#elif defined(BHYT_AVX2)

struct Float {
  using F = __m256;
  using Mask = __m256;
  using Scalar = float;
  static constexpr int N = 8;
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
  static Mask either(Mask a, Mask b) { return _mm256_or_ps(a, b); }
  static bool any(Mask m) { return _mm256_movemask_ps(m) != 0; }
  static F select(Mask m, F yes, F no) { return _mm256_blendv_ps(no, yes, m); }
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

  // 32 bits whose low byte is what is stored.
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
};

#endif

struct Wide {
  static constexpr int N = 4;
  static constexpr double last_place_1 = 0x1.8p52;
  typedef double F __attribute__((vector_size(N * sizeof(double))));
  typedef int64_t Mask __attribute__((vector_size(N * sizeof(int64_t))));
  using Scalar = double;

  static F set1(double x) { return F{x, x, x, x}; }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F fma(F a, F b, F c) { return a * b + c; }
  static F fnma(F a, F b, F c) { return c - a * b; }
  static F min_of(F limit, F x) { return limit < x ? limit : x; }
  static F max_of(F limit, F x) { return limit > x ? limit : x; }
  static F zero_if_nan(F x) { return x == x ? x : set1(0); }
  static F abs(F x) { return reinterpret_cast<F>(reinterpret_cast<Mask>(x) & ~sign_bit()); }
  static F copy_sign(F magnitude, F sign) {
    return reinterpret_cast<F>((reinterpret_cast<Mask>(magnitude) & ~sign_bit()) |
                               (reinterpret_cast<Mask>(sign) & sign_bit()));
  }
  static Mask sign_bit() { return Mask{INT64_MIN, INT64_MIN, INT64_MIN, INT64_MIN}; }
  static Mask not_below(F x, F limit) { return ~(x < limit); }
  static Mask either(Mask a, Mask b) { return a | b; }
  static bool any(Mask m) { return (m[0] | m[1] | m[2] | m[3]) != 0; }
  static F select(Mask m, F yes, F no) { return m ? yes : no; }
  static double sum(F x) { return (x[0] + x[1]) + (x[2] + x[3]); }

  static F reciprocal_14bit(F x) { return 1.0 / x; }
  static F reciprocal(F x) { return 1.0 / x; }
  static F each(F x, double (*f)(double)) { return F{f(x[0]), f(x[1]), f(x[2]), f(x[3])}; }
  static F round(F x) { return each(x, std::nearbyint); }
  static F scale(F x, F n) {
    for (int i = 0; i < N; ++i) x[i] = std::ldexp(x[i], n[i] == n[i] ? static_cast<int>(n[i]) : 0);
    return x;
  }

  template <typename T>
  static F load(const T* p) {
    return F{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
  }
  template <typename T>
  static F load_part(const T* p, int n) {
    F x = set1(0);
    for (int i = 0; i < n; ++i) x[i] = widen(p[i]);
    return x;
  }
  template <typename T>
  static void store(T* p, F x) {
    for (int i = 0; i < N; ++i) narrow(x[i], p + i);
  }
  template <typename T>
  static void store_part(T* p, int n, F x) {
    for (int i = 0; i < n; ++i) narrow(x[i], p + i);
  }
};

#if !defined(BHYT_AVX512) && !defined(BHYT_AVX2)
using Float = Wide;
#endif
