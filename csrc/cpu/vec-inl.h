// Vector types of one instruction set. Included once per set, inside its namespace and under its target pragma.
//
//   Float    float lanes, for rows of f32, f16 and bf16 (where BHYT_AVX512, BHYT_AVX2 or BHYT_NEON is defined)
//   Bfloat   lanes for rows of bf16 alone; the same as Float where the set has none
//   Double   double lanes: for all rows of the baseline, and in every set for weights of f64
//
// Each is a set of static functions over a register type F:
//   at_once, at_once_backward     registers that a loop takes in one turn: as many as fit the set's register file
//   load / store          whole registers of any storage type; *_part: the first n lanes, the others are read as 0
//   store_untied          as store, but ties may be rounded either way; only some types have it
//   fma(a, b, c) = a b + c, fnma(a, b, c) = c - a b
//   min_of, max_of(limit, x)      NaN if x is NaN
//   zero_if_nan(x)        0 in lanes that are NaN
//   not_below(x, limit)   lanes with !(x < limit), NaN included, as a Mask
//   any_from(squares, limit)      whether any of several registers of squares has such a lane
//   sum(x)                the sum of the lanes, in a fixed order
//   last_place_1          a number so large that its sum with a small one is rounded to an integer, in the lowest bits
// Storage of one byte is only written: integer8 takes the lowest bits of a lane, float8 takes a number.
//
// Why not Highway or at::vec: which operand's NaN a minimum returns, how ties are rounded, and single instructions per
// element are what these kernels promise (docs/numbers.md, benchmarks/README.md). A portable layer promises none
// of the three, and would still leave the pairs of vec_pair-inl.h to be written here. To be looked at again for SVE or
// RVV.

#if defined(BHYT_AVX512)
#include "vec_avx512-inl.h"
#elif defined(BHYT_AVX2)
#include "vec_avx2-inl.h"
#elif defined(BHYT_NEON)
#include "vec_neon-inl.h"
#endif

struct Double {
  static constexpr int N = 4, at_once = 4, at_once_backward = 4;
  static constexpr double last_place_1 = 0x1.8p52;
  typedef double F __attribute__((vector_size(N * sizeof(double))));
  typedef int64_t Mask __attribute__((vector_size(N * sizeof(int64_t))));

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
  static bool any(Mask m) { return (m[0] | m[1] | m[2] | m[3]) != 0; }
  static F select(Mask m, F yes, F no) { return m ? yes : no; }
  template <int K>
  static bool any_from(const F (&squares)[K], F limit) {
    Mask found = not_below(squares[0], limit);
    for (int k = 1; k < K; ++k) found |= not_below(squares[k], limit);
    return any(found);
  }
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

#if !defined(BHYT_AVX512) && !defined(BHYT_AVX2) && !defined(BHYT_NEON)
using Float = Double;
using Bfloat = Double;
#endif

// The storage type of the row kernels' own arrays: the prepared weight, g and the sums over rows.
template <typename V, typename A>
using Own = std::conditional_t<std::is_same_v<V, Bfloat> && !std::is_same_v<V, Float>, laned, A>;
