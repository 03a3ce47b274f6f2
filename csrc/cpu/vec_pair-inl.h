// Two registers as one, for rows of bf16. `even` has the elements of even index, the lower half of each 32 bits in
// memory. `odd` has the elements of odd index, the upper half. So one shift and one mask widen two registers, and one
// shift and one blend narrow them.
//
// Arrays of `laned` are in the order of these lanes: of each whole register first the elements of even index, then the
// elements of odd index. The last part of a row is in plain order.
//
// store() needs no test for NaN: every NaN that reaches it has 0 in its 16 lowest bits, so that rounding cannot carry
// into the exponent. A NaN of bf16 has these zeros by its format. The NaN that arithmetic makes by default has them
// too, and arithmetic keeps the bits of a NaN that it is given. set1 and prepare_weight replace every other NaN.
//
// Self adds load and store of bf16, in_order (from the order of the lanes to plain order) and from_order (back).
template <typename Self, typename H>
struct Pair {
  struct F {
    typename H::F even, odd;
  };
  struct Mask {
    typename H::Mask even, odd;
  };
  static constexpr int N = 2 * H::N, at_once = H::at_once / 2, at_once_backward = H::at_once_backward / 2;
  static constexpr double last_place_1 = H::last_place_1;

  static F set1(double x) {
    const auto all = H::set1(x == x ? x : std::numeric_limits<double>::quiet_NaN());
    return {all, all};
  }
  static F add(F a, F b) { return {H::add(a.even, b.even), H::add(a.odd, b.odd)}; }
  static F sub(F a, F b) { return {H::sub(a.even, b.even), H::sub(a.odd, b.odd)}; }
  static F mul(F a, F b) { return {H::mul(a.even, b.even), H::mul(a.odd, b.odd)}; }
  static F fma(F a, F b, F c) { return {H::fma(a.even, b.even, c.even), H::fma(a.odd, b.odd, c.odd)}; }
  static F fnma(F a, F b, F c) { return {H::fnma(a.even, b.even, c.even), H::fnma(a.odd, b.odd, c.odd)}; }
  static F min_of(F limit, F x) { return {H::min_of(limit.even, x.even), H::min_of(limit.odd, x.odd)}; }
  static F max_of(F limit, F x) { return {H::max_of(limit.even, x.even), H::max_of(limit.odd, x.odd)}; }
  static F zero_if_nan(F x) { return {H::zero_if_nan(x.even), H::zero_if_nan(x.odd)}; }
  static F abs(F x) { return {H::abs(x.even), H::abs(x.odd)}; }
  static F copy_sign(F magnitude, F sign) {
    return {H::copy_sign(magnitude.even, sign.even), H::copy_sign(magnitude.odd, sign.odd)};
  }
  static Mask not_below(F x, F limit) {
    return {H::not_below(x.even, limit.even), H::not_below(x.odd, limit.odd)};
  }
  static F select(Mask m, F yes, F no) {
    return {H::select(m.even, yes.even, no.even), H::select(m.odd, yes.odd, no.odd)};
  }
  template <int K>
  static bool any_from(const F (&squares)[K], F limit) {
    typename H::F all[2 * K];
    for (int k = 0; k < K; ++k) all[2 * k] = squares[k].even, all[2 * k + 1] = squares[k].odd;
    return H::any_from(all, limit.even);
  }
  static double sum(F x) { return H::sum(H::add(x.even, x.odd)); }

  static F reciprocal_14bit(F x) { return {H::reciprocal_14bit(x.even), H::reciprocal_14bit(x.odd)}; }
  static F reciprocal(F x) { return {H::reciprocal(x.even), H::reciprocal(x.odd)}; }
  static F round(F x) { return {H::round(x.even), H::round(x.odd)}; }
  static F scale(F x, F n) { return {H::scale(x.even, n.even), H::scale(x.odd, n.odd)}; }

  static F load(const laned* p) { return {H::load(&p->value), H::load(&p[H::N].value)}; }
  static void store(laned* p, F x) { H::store(&p->value, x.even), H::store(&p[H::N].value, x.odd); }
  template <typename T>
  static F load(const T* p) {
    return Self::from_order({H::load(p), H::load(p + H::N)});
  }
  template <typename T>
  static void store(T* p, F x) {
    const F elements = Self::in_order(x);
    H::store(p, elements.even), H::store(p + H::N, elements.odd);
  }
  static void store(double* p, F x) {
    float all[N];
    store(all, x);
    for (int i = 0; i < N; ++i) p[i] = all[i];
  }

  template <typename T>
  static F load_part(const T* p, int n) {
    std::conditional_t<std::is_same_v<T, laned>, float, T> all[N] = {};
    std::memcpy(all, p, n * sizeof(T));
    return Self::load(all);
  }
  template <typename T>
  static void store_part(T* p, int n, F x) {
    std::conditional_t<std::is_same_v<T, laned>, float, T> all[N];
    Self::store(all, x);
    std::memcpy(p, all, n * sizeof(T));
  }
};
