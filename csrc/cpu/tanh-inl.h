// The vector tanh and its slope. Included after vec-inl.h, once per instruction set.
//
//   |z| < 1    t = z + z^3 P(z^2)              minimax, relative; z = a x, a in the coefficients
//   |z| >= 1   t = sign(z) (1 - 2 / (1 + E))   E ~ exp(2|z|), a power of a polynomial; fitted for the absolute error
//                                              of t, in which a relative error of E fades with 1/E
//   slope      1 - t^2 = s (2 - s), s = 2 e / (1 + e), e = exp(-2|z|): does not cancel
//
// A group of registers whose arguments are all below 1 takes the first line only, at a third of the cost. In rows of a
// normal distribution at lam = 2, kappa = 10 all but 6e-7 of the arguments are. The choice depends on nothing but the
// values of the row and where they stand in it.
//
// Contract, for outputs rounded to:
//   float     at most 2.5 ulp over all floats
//   f16       relative error at most 2^-16, a thirtieth of an ulp of the result
//   bf16      relative error at most 2^-13, a thirtieth of an ulp of the result
//   double    the error of libm
//   integer8, float8     an error of q's argument below 1e-4 of a step
// tanh(+-0) = +-0, tanh(+-inf) = +-1, tanh(NaN) = NaN, |t| <= 1 always. tests/cpp/tanh_sweep.cpp checks all floats.

// Coefficients by output type: `small` of powers of z^2, `large` of powers of |z|. E is the polynomial `large`, squared
// `squarings` times.
template <typename T>
struct TanhOf;

// Relative 2^-23.6, absolute 2^-27.2; `large` is moved by single ulps for the least error after rounding.
template <>
struct TanhOf<float> {
  static constexpr double small[] = {-0.3333298677986719,  0.13326408879088514,   -0.05349870775341638,
                                     0.020359759510049612, -0.006259339355589533, 0.001058264623937163};
  static constexpr double large[] = {0x1.ffe98ap-1, 0x1.005ea6p-1,  0x1.fac8bcp-4,   0x1.69592p-6,
                                     0x1.f51548p-10, 0x1.03d128p-11, -0x1.91e498p-16, 0x1.8b561p-18};
  static constexpr int squarings = 2;
  static constexpr double largest = 9.2;  // from 9.01 on tanh is rounded to 1
};

template <>
struct TanhOf<f16> {  // relative 2^-16.9, absolute 2^-16.8
  static constexpr double small[] = {-0.33307729623767585, 0.1307217063950768, -0.045292484018810725,
                                     0.009248321240333082};
  static constexpr double large[] = {0.9979959451218875, 0.25500257142898564, 0.02685942893078124,
                                     0.00416108866220701};
  static constexpr int squarings = 3;
  static constexpr double largest = 7.0;
};

template <>
struct TanhOf<bf16> : TanhOf<f16> {  // relative 2^-13.3
  static constexpr double small[] = {-0.33133202694824126, 0.12027153968939856, -0.027419843886004918};
};

// A relative error of 2^-20 moves q by a ten-thousandth of a step where there are 127 steps.
template <>
struct TanhOf<integer8> : TanhOf<float> {};

// The errors of single values do not average out in sums over rows. So the backward of 16-bit rows takes a finer t,
// which keeps the gradients of weight and lam within 1e-5.
struct SummedNarrow;

template <>
struct TanhOf<SummedNarrow> {  // relative 2^-20.5
  static constexpr double small[] = {-0.33330279672150587, 0.13288490370431338, -0.05176829022413501,
                                     0.01690641583674156, -0.003126581037590383};
};

// float8 has 16 steps to a power of two: this accuracy is enough.
template <>
struct TanhOf<float8> : TanhOf<float> {
  static constexpr auto& small = TanhOf<SummedNarrow>::small;
};

template <typename T>
using Summed = std::conditional_t<sizeof(T) == 2, SummedNarrow, T>;

template <typename V, size_t n>
inline typename V::F horner(const double (&c)[n], typename V::F x) {
  auto p = V::set1(c[n - 1]);
  for (size_t i = n - 1; i-- > 0;) p = V::fma(p, x, V::set1(c[i]));
  return p;
}

template <typename V, typename T>
inline typename V::F tanh_from_1(typename V::F z) {
  auto E = horner<V>(TanhOf<T>::large, V::min_of(V::set1(TanhOf<T>::largest), V::abs(z)));
  for (int i = 0; i < TanhOf<T>::squarings; ++i) E = V::mul(E, E);
  const auto denominator = V::fma(E, V::set1(0.5), V::set1(0.5));
  const auto s = sizeof(T) == 2 ? V::reciprocal_14bit(denominator) : V::reciprocal(denominator);
  return V::copy_sign(V::sub(V::set1(1), s), z);
}

// exp(-2 a) for a >= 0, with a relative error of 2e-7 down to the subnormals. 0x1.62e4p-1 is ln 2 with so few bits that
// its product with n is exact.
template <typename V>
inline typename V::F exp_of_minus_twice(typename V::F a) {
  static constexpr double c[] = {1.0,
                                 1.000000037716214,
                                 0.5000000047117757,
                                 0.16666415514653277,
                                 0.04166635289677516,
                                 0.008375126398153335,
                                 0.0013941108433972674};
  const auto x = V::mul(V::min_of(V::set1(52), a), V::set1(-2));
  const auto n = V::round(V::mul(x, V::set1(1.4426950408889634)));
  auto r = V::fnma(n, V::set1(0x1.62e4p-1), x);
  r = V::fnma(n, V::set1(0x1.7f7d1cf79abcap-20), r);
  return V::scale(horner<V>(c, r), n);
}

// tanh(a x) for the elements x of one row. The row's a is part of the coefficients: t = x (a + x^2 Q(x^2)) with
// Q(u) = a^3 P(a^2 u) takes a product less than z = a x. The form x (..) keeps the sign of -0; a x + .. would lose it.
// takes(a) says whether the powers of a are normal floats. Where they are not, x is scaled first: folds is false.
template <typename V, typename T, bool folds = true>
class RowTanh {
  using F = typename V::F;
  static constexpr auto& c = TanhOf<T>::small;
  static constexpr int n = sizeof(c) / sizeof(c[0]);

 public:
  static bool takes(double a) {
    double last = std::fabs(a);
    for (int i = 0; i < n; ++i) last *= a * a;
    return last > 0x1p-110 && last < 0x1p110;
  }

  explicit RowTanh(double of) : scale_(V::set1(of)) {
    const double a = folds ? of : 1;
    a_ = V::set1(a), limit_ = V::set1(1 / (a * a));
    double power = a * a * a;
    for (int i = 0; i < n; ++i, power *= a * a) q_[i] = V::set1(c[i] * power);
  }

  // t[k] = tanh(a x[k]). Returns false if all arguments are small. A NaN is not small.
  template <int K>
  [[gnu::always_inline]] bool operator()(const F (&given)[K], F (&t)[K]) const {
    F x[K], squared[K];
    for (int k = 0; k < K; ++k) x[k] = argument(given[k]), squared[k] = V::mul(x[k], x[k]);
    if (V::any_from(squared, limit_)) [[unlikely]] {
      F z[K], any_t[K];  // copies, so that given and t need no addresses and stay in registers
      for (int k = 0; k < K; ++k) z[k] = V::mul(a_, x[k]);
      any(z, any_t);
      for (int k = 0; k < K; ++k) t[k] = any_t[k];
      return true;
    }
    for (int k = 0; k < K; ++k) t[k] = below_1(x[k], squared[k]);
    return false;
  }

  // t[k] = tanh(a x[k]) and slope[k] = 1 - t[k]^2.
  template <int K>
  [[gnu::always_inline]] void operator()(const F (&given)[K], F (&t)[K], F (&slope)[K]) const {
    F x[K], squared[K];
    for (int k = 0; k < K; ++k) x[k] = argument(given[k]), squared[k] = V::mul(x[k], x[k]);
    if (V::any_from(squared, limit_)) [[unlikely]] {
      F z[K], any_t[K], any_slope[K];
      for (int k = 0; k < K; ++k) z[k] = V::mul(a_, x[k]);
      any(z, any_t, any_slope);
      for (int k = 0; k < K; ++k) t[k] = any_t[k], slope[k] = any_slope[k];
      return;
    }
    for (int k = 0; k < K; ++k) {
      t[k] = below_1(x[k], squared[k]);
      slope[k] = V::fnma(t[k], t[k], V::set1(1));
    }
  }

 private:
  [[gnu::always_inline]] F argument(F x) const {
    if constexpr (folds)
      return x;
    else
      return V::mul(scale_, x);
  }

  [[gnu::always_inline]] F below_1(F x, F squared) const {
    F p = q_[n - 1];
    for (int i = n - 1; i-- > 0;) p = V::fma(p, squared, q_[i]);
    return V::mul(x, V::fma(p, squared, a_));
  }

  // The rare groups with a large argument. These are calls, so that the loops around them keep their registers.
  template <int K>
  [[gnu::noinline]] static void any(const F (&z)[K], F (&t)[K]) {
    const RowTanh unscaled(1);
    F squared[K];
    for (int k = 0; k < K; ++k) squared[k] = V::mul(z[k], z[k]);
    for (int k = 0; k < K; ++k) t[k] = unscaled.below_1(z[k], squared[k]);
    if (!V::any_from(squared, V::set1(1))) return;
    for (int k = 0; k < K; ++k)
      t[k] = V::select(V::not_below(squared[k], V::set1(1)), tanh_from_1<V, T>(z[k]), t[k]);
  }

  template <int K>
  [[gnu::noinline]] static void any(const F (&z)[K], F (&t)[K], F (&slope)[K]) {
    const RowTanh unscaled(1);
    const auto one = V::set1(1), two = V::set1(2);
    F squared[K];
    for (int k = 0; k < K; ++k) {
      squared[k] = V::mul(z[k], z[k]);
      t[k] = unscaled.below_1(z[k], squared[k]);
      slope[k] = V::fnma(t[k], t[k], one);
    }
    if (!V::any_from(squared, one)) return;
    for (int k = 0; k < K; ++k) {
      const auto large = V::not_below(squared[k], one);
      const auto e = exp_of_minus_twice<V>(V::abs(z[k]));
      const auto s = V::mul(V::mul(two, e), V::reciprocal(V::add(one, e)));
      t[k] = V::select(large, V::copy_sign(V::sub(one, s), z[k]), t[k]);
      slope[k] = V::select(large, V::mul(s, V::sub(two, s)), slope[k]);
    }
  }

  F scale_, a_, limit_, q_[n];
};

// Double lanes: tanh and exp of libm.
template <typename V>
class RowTanh<V, double, true> {
  using F = typename V::F;

 public:
  explicit RowTanh(double a) : a_(V::set1(a)) {}

  template <int K>
  bool operator()(const F (&x)[K], F (&t)[K]) const {
    for (int k = 0; k < K; ++k) t[k] = V::each(V::mul(a_, x[k]), std::tanh);
    return true;
  }

  template <int K>
  void operator()(const F (&x)[K], F (&t)[K], F (&slope)[K]) const {
    const auto one = V::set1(1);
    for (int k = 0; k < K; ++k) {
      const auto z = V::mul(a_, x[k]);
      t[k] = V::each(z, std::tanh);
      const auto e = V::each(V::mul(V::abs(z), V::set1(-2)), std::exp);
      const auto r = V::mul(e, V::reciprocal(V::add(one, e)));
      slope[k] = V::mul(V::mul(V::set1(4), r), V::sub(one, r));
    }
  }

 private:
  F a_;
};

// Calls f with the RowTanh that suits a row's a. Double lanes always scale x first: they spend longer on conversions
// than on one more product.
template <typename V, typename T, typename Body>
inline auto with_tanh_of(double a, Body f) {
  if constexpr (std::is_same_v<T, double>) {
    return f(RowTanh<V, T>(a));
  } else {
    if constexpr (!std::is_same_v<V, Double>)
      if (RowTanh<V, T>::takes(a)) return f(RowTanh<V, T>(a));
    return f(RowTanh<V, T, false>(a));
  }
}
