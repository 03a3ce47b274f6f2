// The functions of one table: the dtypes of a call become template arguments. Included after forward-inl.h and
// backward-inl.h. Rows of float64 are the baseline's (kernels.h), which has double lanes only.

template <typename X>
using LanesOf = std::conditional_t<std::is_same_v<X, bf16>, Bfloat, Float>;

constexpr bool kBaseline = std::is_same_v<Float, Double>;
constexpr bool kBfloatInOrder = std::is_same_v<Own<Bfloat, float>, float>;
constexpr int64_t kBfloatBlock = kBfloatInOrder ? 1 : Bfloat::N;
static_assert(kColumnBlock % kBfloatBlock == 0);

// The lanes, branch, stream and accumulate types of a call.
template <typename V_, typename X_, typename R_, typename A_>
struct Types {
  using V = V_;
  using X = X_;
  using R = R_;
  using A = A_;
};

// Calls f(Types).
template <typename F>
void with_types(const SiteParams& p, F f) {
  with_type(p.branch, [&](auto* branch) {
    using X = std::remove_const_t<std::remove_pointer_t<decltype(branch)>>;
    if constexpr (kBaseline)
      if (p.stream == DType::f64) return f(Types<Double, X, double, double>());
    if constexpr (!std::is_same_v<X, double>) {
      if (p.stream == p.branch) return f(Types<LanesOf<X>, X, X, float>());
      return f(Types<Float, X, float, float>());
    }
  });
}

void forward(const ForwardParams& p, PreparedWeight weight, int64_t begin, int64_t end) {
  with_types(p, [&]<typename T>(T) {
    forward_rows<typename T::V, typename T::X, typename T::R, typename T::A>(p, weight, begin, end);
  });
}

void backward(const BackwardParams& p, PreparedWeight weight, const Scratch& scratch, int64_t begin, int64_t end) {
  with_types(p, [&]<typename T>(T) {
    backward_chunks<typename T::V, typename T::X, typename T::R, typename T::A>(p, weight, scratch, begin, end);
  });
}

void sum_weight(const BackwardParams& p, const Scratch& scratch, int64_t begin, int64_t end) {
  with_type(p.weight.dtype, [&](auto* type) {
    using W = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    if constexpr (kBaseline)
      if (p.stream == DType::f64) return sum_columns<Double, double, W>(p, scratch, begin, end);
    if constexpr (!kBfloatInOrder)
      if (p.stream == DType::bf16) return sum_columns<Bfloat, float, W>(p, scratch, begin, end);
    using V = std::conditional_t<std::is_same_v<W, double>, Double, Float>;
    sum_columns<V, float, W>(p, scratch, begin, end);
  });
}

void sum_lam(const BackwardParams& p, const Scratch& scratch) {
  double total = 0;
  for (int64_t c = 0; c < chunks_of(p.rows).count; ++c) total += scratch.lam[c];
  write(total, p.lam.dtype, p.grad_lam);
}

// The largest lane. No lane is negative.
template <typename V, typename A>
A largest_of(typename V::F x) {
  A lanes[V::N], largest = 0;
  V::store(lanes, x);
  for (const A lane : lanes) largest = lane > largest ? lane : largest;
  return largest;
}

// Writes the weight in plain order. Returns its largest magnitude for quantised outputs.
template <typename V, typename A>
double convert_weight(const Values& from, const Quantization* quantization, int64_t n, A* to) {
  const double factor = quantization ? quantization->inverse_scale : 1;
  if (from.data == nullptr) {
    sweep<V>(0, n, [&](int64_t j, auto span) {
      for (int k = 0; k < span.count; ++k) span.template store<V>(to + j, k, V::set1(factor));
    });
    return factor;
  }
  double found = 0;
  with_type(from.dtype, [&](auto* type) {
    const auto* p = static_cast<decltype(type)>(from.data);
    using L = std::conditional_t<sizeof(*p) == sizeof(double), Double, V>;
    auto magnitude = L::set1(0);
    const double largest = sizeof(A) == sizeof(double) ? 0x1.fffffffffffffp1023 : 0x1.fffffep127;
    sweep<L>(0, n, [&](int64_t j, auto span) {
      for (int k = 0; k < span.count; ++k) {
        auto weight = span.template load<L>(p + j, k);
        if (quantization) {
          weight = L::mul(weight, L::set1(factor));
          weight = L::max_of(L::set1(-largest), L::min_of(L::set1(largest), weight));
          if (quantization->dtype != DType::f8) weight = L::zero_if_nan(weight);
          magnitude = L::max_of(magnitude, L::abs(weight));
        }
        span.template store<L>(to + j, k, weight);
      }
    });
    found = largest_of<L, A>(magnitude);
  });
  return found;
}

PreparedWeight prepare_weight(const SiteParams& p, const Quantization* quantization, void* memory) {
  if constexpr (kBaseline)
    if (p.stream == DType::f64)
      return {memory, convert_weight<Double>(p.weight, quantization, p.d, static_cast<double*>(memory))};
  float* weight = static_cast<float*>(memory);
  const double largest = convert_weight<Float>(p.weight, quantization, p.d, weight);
  if constexpr (!kBfloatInOrder)
    if (p.stream == DType::bf16) {
      for (int64_t j = 0; j < p.d; ++j)
        weight[j] = weight[j] == weight[j] ? weight[j] : std::numeric_limits<float>::quiet_NaN();
      for (int64_t j = 0; j + Bfloat::N <= p.d; j += Bfloat::N)
        Bfloat::store(static_cast<laned*>(memory) + j, Bfloat::load(weight + j));
    }
  return {memory, largest};
}
