// The forward of rows, written once over a vector type. Included after loops-inl.h, once per instruction set.
//
//   v = mean(x^2) (exact) or given;  a = lam / (kappa sqrt(v + offset + eps));  y = weight tanh(a x)

// Makes the value stored for y from t = tanh(a x) and the weight. For eight bits the weight has been divided by the
// scale and clamped to finite numbers.
template <typename V, typename Y>
struct Output {
  using F = typename V::F;
  Output(const ForwardParams&, PreparedWeight) {}
  F operator()(F t, F weight) const { return V::mul(t, weight); }
};

// Integers. One addition rounds and adds the even part of the zero point; an odd number would move the ties.
template <typename V>
struct Output<V, integer8> {
  using F = typename V::F;
  F even, odd, lowest, highest;
  bool within;  // q cannot pass a limit, whatever t is

  Output(const ForwardParams& p, PreparedWeight weight) {
    const Quantization& q = *p.quantization;
    const int rest = q.zero_point & 1;
    even = V::set1(V::last_place_1 + q.zero_point - rest), odd = V::set1(rest);
    lowest = V::set1(V::last_place_1 + q.lowest() - rest), highest = V::set1(V::last_place_1 + q.highest() - rest);
    within = rest == 0 && weight.largest <= q.highest() - q.zero_point && weight.largest <= q.zero_point - q.lowest();
  }
  F operator()(F t, F weight) const {
    const F rounded = V::fma(t, weight, even);
    return within ? rounded : V::add(V::max_of(lowest, V::min_of(highest, rounded)), odd);
  }
};

// One row of a forward. X, R, Y: storage types of branch, stream and y; A: the accumulate type. The accuracy of tanh
// follows the stream, so that add_forward gives the bits of an addition and a forward. Quantised outputs have an
// accuracy of their own.
template <typename V, typename X, typename R, typename Y, typename A, bool adds, bool prefetches>
struct ForwardRow {
  using T = std::conditional_t<sizeof(Y) == 1 && sizeof(R) < sizeof(double), Y, R>;
  using F = typename V::F;
  using Weight = Own<V, A>;
  const X* x;
  const R* residual;
  R* sum;
  Y* y;

  ForwardRow(const ForwardParams& p, int64_t i)
      : x(row_of<X>(p.x, i)),
        residual(row_of<R>(p.residual, i)),
        sum(row_of<R>(p.sum, i, p.d)),
        y(row_of<Y>(p.y, i, p.d)) {}

  // The row whose memory is prefetched while this one is made: `next`, or lines ahead.
  ForwardRow fetched(const ForwardRow& next, bool read_twice) const {
    ForwardRow row = next;
    if (!fetches_next_row()) {
      row.y = ahead(y, kWriteAhead);
      if (!read_twice) row.x = ahead(x, kReadAhead), row.residual = ahead(residual, kReadAhead);
      if (!read_twice) row.sum = ahead(sum, kWriteAhead);
    }
    return row;
  }
  void fetch(int64_t j, int k) const {
    if constexpr (prefetches) {
      prefetch<V>(x, j, k);
      prefetch_to_write<V>(y, j, k);
    }
    if constexpr (prefetches && adds) {
      prefetch<V>(residual, j, k);
      prefetch_to_write<V>(sum, j, k);
    }
  }

  // Register k of a span of the row. A sum is stored first and read back, so that it is used as rounded.
  template <typename Span>
  F stream(int64_t j, Span span, int k) const {
    if constexpr (adds) {
      const F added = V::add(span.template load<V>(x + j, k), span.template load<V>(residual + j, k));
      span.template store<V>(sum + j, k, added);
    }
    return stored(j, span, k);
  }

  // The register that stream() returned, once the sum has been stored.
  template <typename Span>
  F stored(int64_t j, Span span, int k) const {
    if constexpr (adds)
      return span.template load<V>(sum + j, k);
    else
      return span.template load<V>(x + j, k);
  }

  double mean_square(int64_t d) const {
    RowSum<V> squares;
    squares.over(d, [&](int64_t j, auto span) {
      for (int k = 0; k < span.count; ++k) {
        const F s = stream(j, span, k);
        squares.add(k, s, s);
      }
    });
    return squares.total / static_cast<double>(d);
  }

  // Makes y. load(j, span, k) is stream() or stored(); the memory of the row `later` is prefetched meanwhile.
  template <typename Load>
  void apply(int64_t d, double a, const Weight* weight, const Output<V, Y>& output, const ForwardRow& later,
             Load load) const {
    with_tanh_of<V, T>(a, [&](const auto& tanh) {
      sweep<V>(0, d, [&](int64_t j, auto span) {
        F xs[span.count], t[span.count];
        for (int k = 0; k < span.count; ++k) {
          later.fetch(j, k);
          xs[k] = load(j, span, k);
        }
        const bool any_large = tanh(xs, t);
        if constexpr (std::is_same_v<Y, integer8>)
          for (int k = 0; any_large && k < span.count; ++k) t[k] = V::zero_if_nan(t[k]);
        for (int k = 0; k < span.count; ++k) t[k] = output(t[k], span.template load<V>(weight + j, k));
        span.template store_all<V>(y + j, t);
      });
    });
  }
};

// Several short rows are worked on together, as many as fit the first-level cache: first the statistics of all, then y
// of all. Their sums, roots and divisions overlap.
constexpr int64_t kRowsAtOnce = 8, kElementsAtOnce = 4096;

template <typename A, typename Row, typename Output>
void forward_rows_as(const ForwardParams& p, const Output& output, PreparedWeight prepared, int64_t begin,
                     int64_t end) {
  const auto* weight = static_cast<const typename Row::Weight*>(prepared.data);
  const double lam = read(p.lam), offset = p.offset.data ? read(p.offset) : 0;
  const int64_t fitting = kElementsAtOnce / (p.d > 0 ? p.d : 1);
  const int64_t at_once = !p.exact || fitting < 1 ? 1 : fitting < kRowsAtOnce ? fitting : kRowsAtOnce;

  for (int64_t first = begin; first < end; first += at_once) {
    const int64_t last = first + at_once < end ? first + at_once : end;
    double a[kRowsAtOnce];
    for (int64_t i = first; i < last; ++i) {
      if (p.exact) static_cast<A*>(p.variance_out)[i] = static_cast<A>(Row(p, i).mean_square(p.d));
      // The variance as stored: forward_approx gives the same bits when it is given this variance.
      const double v = p.exact ? static_cast<A*>(p.variance_out)[i] : static_cast<const A*>(p.variance)[i];
      a[i - first] = lam / (p.kappa * std::sqrt(v + offset + p.eps));
    }
    for (int64_t i = first; i < last; ++i) {
      const Row row(p, i), later = row.fetched(Row(p, i + at_once < end ? i + at_once : i), p.exact);
      if (p.exact)
        row.apply(p.d, a[i - first], weight, output, later,
                  [&](int64_t j, auto span, int k) { return row.stored(j, span, k); });
      else
        row.apply(p.d, a[i - first], weight, output, later,
                  [&](int64_t j, auto span, int k) { return row.stream(j, span, k); });
    }
  }
}

template <typename V, typename X, typename R, typename A>
void forward_rows(const ForwardParams& p, PreparedWeight weight, int64_t begin, int64_t end) {
  const bool given_residual = p.residual.data != nullptr;
  choose_prefetch<V, X, R>(p, given_residual ? 4 : 2, [&](auto prefetches) {
    choose(given_residual, [&](auto adds) {
      if constexpr (adds || std::is_same_v<X, R>)  // the dtypes of branch and stream differ only with a residual
        with_output_type<X>(p, [&](auto* y) {
          using Y = std::remove_pointer_t<decltype(y)>;
          using Row = ForwardRow<V, X, R, Y, A, adds, prefetches>;
          forward_rows_as<A, Row>(p, Output<V, Y>(p, weight), weight, begin, end);
        });
    });
  });
}
