// The functions of one table: here the dtypes of a call become template arguments. Included after rows-inl.h.

template <typename X>
using LanesOf = std::conditional_t<std::is_same_v<X, bf16>, Bfloat, Float>;

constexpr bool kBfloatInOrder = std::is_same_v<Own<Bfloat, float>, float>;
constexpr int64_t kBfloatBlock = kBfloatInOrder ? 1 : Bfloat::N;
static_assert(kColumnBlock % kBfloatBlock == 0);

// A float64 stream spends nearly all of its time in libm: one code for it, whatever the instruction set.
constexpr bool kBaseline = std::is_same_v<Float, Wide>;

void forward(const ForwardParams& p, const void* weight, int64_t begin, int64_t end) {
  if (p.stream == DType::f64 && !kBaseline) return baseline::kernels.forward(p, weight, begin, end);
  with_type(p.branch, [&](auto* branch) {
    using X = std::remove_const_t<std::remove_pointer_t<decltype(branch)>>;
    if constexpr (kBaseline)
      if (p.stream == DType::f64) return forward_rows<Wide, X, double, double>(p, weight, begin, end);
    if constexpr (!std::is_same_v<X, double>) {
      if (p.stream == p.branch) return forward_rows<LanesOf<X>, X, X, float>(p, weight, begin, end);
      return forward_rows<Float, X, float, float>(p, weight, begin, end);
    }
  });
}

void backward(const BackwardParams& p, const void* weight, const Scratch& scratch, int64_t begin, int64_t end) {
  if (p.stream == DType::f64 && !kBaseline) return baseline::kernels.backward(p, weight, scratch, begin, end);
  with_type(p.branch, [&](auto* branch) {
    using X = std::remove_const_t<std::remove_pointer_t<decltype(branch)>>;
    if constexpr (kBaseline)
      if (p.stream == DType::f64) return backward_chunks<Wide, X, double, double>(p, weight, scratch, begin, end);
    if constexpr (!std::is_same_v<X, double>) {
      if (p.stream == p.branch) return backward_chunks<LanesOf<X>, X, X, float>(p, weight, scratch, begin, end);
      return backward_chunks<Float, X, float, float>(p, weight, scratch, begin, end);
    }
  });
}

void sum_weight(const BackwardParams& p, const Scratch& scratch, int64_t begin, int64_t end) {
  with_type(p.weight.dtype, [&](auto* type) {
    using W = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    if (p.stream == DType::f64) return sum_columns<Wide, double, W>(p, scratch, begin, end);
    if constexpr (!kBfloatInOrder)
      if (p.stream == DType::bf16) return sum_columns<Bfloat, float, W>(p, scratch, begin, end);
    using V = std::conditional_t<std::is_same_v<W, double>, Wide, Float>;
    sum_columns<V, float, W>(p, scratch, begin, end);
  });
}

void sum_lam(const BackwardParams& p, const Scratch& scratch) {
  const double* chunks = scratch.lam;
  double total = 0;
  for (int64_t c = 0; c < chunks_of(p.rows).count; ++c) total += chunks[c];
  write(total, p.lam.dtype, p.grad_lam);
}

template <typename V, typename A>
void widen_as(const Values& from, const Quantization* quantization, int64_t n, A* to) {
  const double factor = quantization ? quantization->inverse_scale : 1;
  if (from.data == nullptr)
    return sweep<V>(0, n, [&](int64_t j, auto span) {
      for (int k = 0; k < span.count; ++k) span.template store<V>(to + j, k, V::set1(factor));
    });
  with_type(from.dtype, [&](auto* type) {
    const auto* p = static_cast<decltype(type)>(from.data);
    using L = std::conditional_t<sizeof(*p) == sizeof(double), Wide, V>;
    const double largest = sizeof(A) == sizeof(double) ? 0x1.fffffffffffffp1023 : 0x1.fffffep127;
    sweep<L>(0, n, [&](int64_t j, auto span) {
      for (int k = 0; k < span.count; ++k) {
        auto gain = span.template load<L>(p + j, k);
        if (quantization) {
          gain = L::mul(gain, L::set1(factor));
          gain = L::max_of(L::set1(-largest), L::min_of(L::set1(largest), gain));
          if (quantization->dtype != DType::f8) gain = L::zero_if_nan(gain);
        }
        span.template store<L>(to + j, k, gain);
      }
    });
  });
}

void widen_values(const Values& from, DType stream, const Quantization* quantization, int64_t n, void* to) {
  if (stream == DType::f64) return widen_as<Wide>(from, quantization, n, static_cast<double*>(to));
  float* gain = static_cast<float*>(to);
  widen_as<Float>(from, quantization, n, gain);
  if constexpr (!kBfloatInOrder)
    if (stream == DType::bf16) {
      for (int64_t j = 0; j < n; ++j) gain[j] = gain[j] == gain[j] ? gain[j] : std::numeric_limits<float>::quiet_NaN();
      for (int64_t j = 0; j + Bfloat::N <= n; j += Bfloat::N)
        Bfloat::store(static_cast<laned*>(to) + j, Bfloat::load(gain + j));
    }
}
