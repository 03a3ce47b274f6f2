// Row kernels over a vector type, written once. Included after tanh-inl.h, once per instruction set.
//
//   forward     v = mean(x^2) (exact) or given;  a = lam / (kappa sqrt(v + offset + eps));  y = weight tanh(a x)
//   backward    t = tanh(a x),  g = grad_y weight (1 - t^2),  S = sum_i g_i x_i
//     exact       grad_x = a g + x (2 grad_v / d - a S / (d (v + eps))) [+ grad_sum]
//     approximate grad_x = a g [+ grad_sum],  grad_v = -a S / (2 (v + offset + eps))
//     both        grad_lam = sum over rows of (a / lam) S,  grad_weight = sum over rows of grad_y t

// Whole registers, K at a time, or the first n lanes of one.
template <int K>
struct Whole {
  static constexpr int count = K;
  template <typename V, typename T>
  typename V::F load(const T* p, int k) const {
    return V::load(p + k * V::N);
  }
  template <typename V, typename T>
  void store(T* p, int k, typename V::F x) const {
    V::store(p + k * V::N, x);
  }
  template <typename V, typename T>
  void store_untied(T* p, int k, typename V::F x) const {
    if constexpr (requires { V::store_untied(p, x); })
      V::store_untied(p + k * V::N, x);
    else
      V::store(p + k * V::N, x);
  }
};

struct Part {
  static constexpr int count = 1;
  int n;
  template <typename V, typename T>
  typename V::F load(const T* p, int) const {
    return V::load_part(p, n);
  }
  template <typename V, typename T>
  void store(T* p, int, typename V::F x) const {
    V::store_part(p, n, x);
  }
  template <typename V, typename T>
  void store_untied(T* p, int, typename V::F x) const {
    V::store_part(p, n, x);
  }
};

// body(i, span) over the elements [begin, end), in an order that depends on them alone.
template <typename V, int K = V::at_once, typename Body>
inline void sweep(int64_t begin, int64_t end, Body body) {
  int64_t i = begin;
  for (; i + K * V::N <= end; i += K * V::N) body(i, Whole<K>{});
  for (; i + V::N <= end; i += V::N) body(i, Whole<1>{});
  if (i < end) body(i, Part{static_cast<int>(end - i)});
}

// The sum of products over a row: registers over 1024 elements (16 additions deep with 16 lanes), double beyond.
template <typename V, int K = V::at_once>
struct RowSum {
  typename V::F lanes[K];
  double total = 0;

  void add(int k, typename V::F a, typename V::F b) { lanes[k] = V::fma(a, b, lanes[k]); }

  template <typename Body>
  void over(int64_t d, Body body) {
    for (int64_t begin = 0; begin < d; begin += 1024) {
      for (auto& lane : lanes) lane = V::set1(0);
      sweep<V, K>(begin, begin + 1024 < d ? begin + 1024 : d, body);
      for (int n = K / 2; n > 0; n /= 2)
        for (int k = 0; k < n; ++k) lanes[k] = V::add(lanes[2 * k], lanes[2 * k + 1]);
      total += V::sum(lanes[0]);
    }
  }
};

template <typename T>
inline const T* row_of(const Rows& rows, int64_t i) {
  return rows.data == nullptr ? nullptr : static_cast<const T*>(rows.data) + i * rows.stride;
}
template <typename T>
inline T* row_of(void* data, int64_t i, int64_t d) {
  return data == nullptr ? nullptr : static_cast<T*>(data) + i * d;
}

// A choice made once, outside the loops: f(std::true_type) or f(std::false_type).
template <typename F>
inline void choose(bool flag, F f) {
  if (flag)
    f(std::true_type{});
  else
    f(std::false_type{});
}

// While a row is written, the lines of a later one are asked for, both those to be read and those to be written, so that
// both directions of the memory are busy all the time; benchmarks/README.md has what that brings. Tensors that together
// stay within this size are taken to lie in a core's own caches, where asking ahead is only work; so it is beside double
// lanes, which compute for longer than they wait. A narrow branch on a wide stream always asks. f as of choose.
constexpr int64_t kCachedBytes = 3 << 19;

template <typename V, typename X, typename R, typename F>
inline void choose_prefetch(const SiteParams& p, int tensors, F f) {
  if constexpr (std::is_same_v<V, Wide>)
    f(std::false_type{});
  else if constexpr (!std::is_same_v<X, R>)
    f(std::true_type{});
  else
    choose(tensors * p.rows * p.d * int64_t{sizeof(R)} > kCachedBytes, f);
}

// Register k of a span at row + j: once for each line of 64 bytes.
template <typename V, typename T>
inline void prefetch(const T* row, int64_t j, int k) {
  if (k * V::N * sizeof(T) % 64 == 0)
    __builtin_prefetch(row + j + k * V::N, 0, 2);  // not into the first level, which the row at hand needs
}
template <typename V, typename T>
inline void prefetch_to_write(T* row, int64_t j, int k) {
  if (k * V::N * sizeof(T) % 64 == 0) __builtin_prefetch(row + j + k * V::N, 1);
}

// What is stored for y, given t = tanh(a x) and the gain; with eight bits the gain over the scale, finite.
template <typename V, typename Y>
struct Output {
  using F = typename V::F;
  explicit Output(const ForwardParams&) {}
  F operator()(F t, F weight) const { return V::mul(t, weight); }
};

// One addition rounds, and adds the even part of the zero point, which leaves ties where they are.
template <typename V>
struct Output<V, integer8> {
  using F = typename V::F;
  F even, odd, lowest, highest;
  bool within;  // the limits whatever t is

  explicit Output(const ForwardParams& p) {
    const Quantization& q = *p.quantization;
    const int rest = q.zero_point & 1;
    even = V::set1(V::last_place_1 + q.zero_point - rest), odd = V::set1(rest);
    lowest = V::set1(V::last_place_1 + q.lowest() - rest), highest = V::set1(V::last_place_1 + q.highest() - rest);
    within = p.weight.data == nullptr && rest == 0 && q.inverse_scale <= q.highest() - q.zero_point &&
             q.inverse_scale <= q.zero_point - q.lowest();
  }
  F operator()(F t, F weight) const {
    const F rounded = V::fma(t, weight, even);
    return within ? rounded : V::add(V::max_of(lowest, V::min_of(highest, rounded)), odd);
  }
};

// X: branch, R: stream, Y: of y, A: accumulate type in memory (the weight as Own). tanh is as accurate as the stream
// asks, so that a narrow branch on a wide stream gets what the two steps would give it: y of the sum, rounded; or as
// eight bits ask, whatever the stream.
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

  // Register k of a span of the stream. A sum is stored first and read back as rounded.
  template <typename Span>
  F stream(int64_t j, Span span, int k) const {
    if constexpr (adds) {
      const F added = V::add(span.template load<V>(x + j, k), span.template load<V>(residual + j, k));
      span.template store<V>(sum + j, k, added);
    }
    return stored(j, span, k);
  }

  // The same once the sum stands in memory.
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

  // load(j, span, k): as stream or stored. later: the row to ask memory for meanwhile.
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
        for (int k = 0; k < span.count; ++k)
          span.template store_untied<V>(y + j, k, output(t[k], span.template load<V>(weight + j, k)));
      });
    });
  }
};

// Statistics first, for as many rows as stay in the nearest cache: the sums, roots and divisions of short rows overlap.
constexpr int64_t kRowsAtOnce = 8, kElementsAtOnce = 4096;

template <typename A, typename Row, typename Output>
void forward_rows_as(const ForwardParams& p, const Output& output, const void* weight_data, int64_t begin,
                     int64_t end) {
  const auto* weight = static_cast<const typename Row::Weight*>(weight_data);
  const double lam = read(p.lam), offset = p.offset.data ? read(p.offset) : 0;
  const int64_t fitting = kElementsAtOnce / (p.d > 0 ? p.d : 1);
  const int64_t at_once = !p.exact || fitting < 1 ? 1 : fitting < kRowsAtOnce ? fitting : kRowsAtOnce;

  for (int64_t first = begin; first < end; first += at_once) {
    const int64_t last = first + at_once < end ? first + at_once : end;
    double a[kRowsAtOnce];
    for (int64_t i = first; i < last; ++i) {
      if (p.exact) static_cast<A*>(p.variance_out)[i] = static_cast<A>(Row(p, i).mean_square(p.d));
      // The variance as rounded: forward_approx given this variance gives the same bits.
      const double v = p.exact ? static_cast<A*>(p.variance_out)[i] : static_cast<const A*>(p.variance)[i];
      a[i - first] = lam / (p.kappa * std::sqrt(v + offset + p.eps));
    }
    for (int64_t i = first; i < last; ++i) {
      const Row row(p, i), later(p, i + at_once < end ? i + at_once : i);
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
void forward_rows(const ForwardParams& p, const void* weight, int64_t begin, int64_t end) {
  const bool given_residual = p.residual.data != nullptr;
  choose_prefetch<V, X, R>(p, given_residual ? 4 : 2, [&](auto prefetches) {
    choose(given_residual, [&](auto adds) {
      if constexpr (adds || std::is_same_v<X, R>)  // branch and stream differ with a residual only
        with_output_type<X>(p, [&](auto* y) {
          using Y = std::remove_pointer_t<decltype(y)>;
          using Row = ForwardRow<V, X, R, Y, A, adds, prefetches>;
          forward_rows_as<A, Row>(p, Output<V, Y>(p), weight, begin, end);
        });
    });
  });
}

template <typename V, typename X, typename R, typename A, bool adds, bool prefetches, typename Wanted_>
struct BackwardRow {
  using F = typename V::F;
  using Wanted = Wanted_;
  using Sums = Own<V, A>;
  const X* grad_y;
  const R* grad_sum;
  const R* x;
  R* grad_x;

  BackwardRow(const BackwardParams& p, int64_t i)
      : grad_y(row_of<X>(p.grad_y, i)),
        grad_sum(row_of<R>(p.grad_sum, i)),
        x(row_of<R>(p.x, i)),
        grad_x(row_of<R>(p.grad_x, i, p.d)) {}

  void fetch(int64_t j, int k) const {
    if constexpr (prefetches) {
      prefetch<V>(x, j, k);
      prefetch<V>(grad_y, j, k);
    }
    if constexpr (prefetches && adds) prefetch<V>(grad_sum, j, k);
  }
  void fetch_to_write(int64_t j, int k) const {
    if constexpr (prefetches) prefetch_to_write<V>(grad_x, j, k);
  }

  template <typename Span>
  void store(int64_t j, Span span, int k, F dx) const {
    if constexpr (adds) dx = V::add(dx, span.template load<V>(grad_sum + j, k));
    span.template store_untied<V>(grad_x + j, k, dx);
  }

  // Returns S and adds to grad_weight. An approximate site's grad_x is made here; an exact one keeps g for its second
  // pass, as S enters every grad_x. All memory is asked for here, which computes for longer: lines of the next row, and
  // to be written the next row's or, at an exact site, this one's.
  double first_pass(int64_t d, double a, const Sums* weight, Sums* grad_weight, Sums* g_row,
                    const BackwardRow& next) const {
    const F scale = V::set1(a);
    return with_tanh_of<V, Summed<R>>(a, [&](const auto& tanh) {
      RowSum<V, V::at_once_backward> S;
      S.over(d, [&](int64_t j, auto span) {
        F xs[span.count], t[span.count], slope[span.count];
        for (int k = 0; k < span.count; ++k) xs[k] = span.template load<V>(x + j, k);
        tanh(xs, t, slope);
        for (int k = 0; k < span.count; ++k) {
          const F upstream = span.template load<V>(grad_y + j, k);
          F g;
          if constexpr (Wanted::g) g = V::mul(V::mul(upstream, slope[k]), span.template load<V>(weight + j, k));
          if constexpr (Wanted::sum) S.add(k, g, xs[k]);
          if constexpr (Wanted::grad_weight) {
            const F so_far = span.template load<V>(grad_weight + j, k);
            span.template store<V>(grad_weight + j, k, V::fma(upstream, t[k], so_far));
          }
          next.fetch(j, k);
          if constexpr (Wanted::grad_x == GradX::at_once) {
            next.fetch_to_write(j, k);
            store(j, span, k, V::mul(scale, g));
          } else if constexpr (Wanted::grad_x == GradX::after_sum) {
            fetch_to_write(j, k);
            span.template store<V>(g_row + j, k, g);
          }
        }
      });
      return S.total;
    });
  }

  void second_pass(int64_t d, double a, double along_x, const Sums* g_row) const {
    const F scale = V::set1(a), slope = V::set1(along_x);
    sweep<V>(0, d, [&](int64_t j, auto span) {
      for (int k = 0; k < span.count; ++k) {
        const F along_g = V::mul(scale, span.template load<V>(g_row + j, k));
        store(j, span, k, V::fma(slope, span.template load<V>(x + j, k), along_g));
      }
    });
  }
};

template <typename A, typename Row>
void backward_chunks_as(const BackwardParams& p, const void* weight_data, const Scratch& scratch, int64_t begin,
                        int64_t end) {
  using Sums = typename Row::Sums;
  using Wanted = typename Row::Wanted;
  const auto* weight = static_cast<const Sums*>(weight_data);
  const double lam = read(p.lam), offset = p.offset.data ? read(p.offset) : 0;
  const double d = static_cast<double>(p.d);
  const auto chunks = chunks_of(p.rows);
  auto* g_row = static_cast<Sums*>(scratch.g);

  for (int64_t chunk = begin; chunk < end; ++chunk) {
    Sums* grad_weight = row_of<Sums>(scratch.weight, chunk, p.d);
    if constexpr (Wanted::grad_weight) std::memset(grad_weight, 0, p.d * sizeof(Sums));
    double grad_lam = 0;
    const int64_t first = chunk * chunks.rows_per_chunk;
    const int64_t last = first + chunks.rows_per_chunk < p.rows ? first + chunks.rows_per_chunk : p.rows;
    for (int64_t i = first; i < last; ++i) {
      const Row row(p, i), next(p, i + 1 < last ? i + 1 : i);
      const double shifted = static_cast<const A*>(p.variance)[i] + offset + p.eps;
      const double a_over_lam = 1 / (p.kappa * std::sqrt(shifted)), a = lam * a_over_lam;
      const double S = row.first_pass(p.d, a, weight, grad_weight, g_row, next);
      if constexpr (Wanted::grad_x == GradX::after_sum) {
        const double from_v = p.grad_variance ? 2 * static_cast<const A*>(p.grad_variance)[i] / d : 0;
        row.second_pass(p.d, a, from_v - a * S / (d * shifted), g_row);
      }
      if (p.grad_variance_out) static_cast<A*>(p.grad_variance_out)[i] = static_cast<A>(-a * S / (2 * shifted));
      grad_lam += a_over_lam * S;
    }
    if (scratch.lam) scratch.lam[chunk] = grad_lam;
  }
}

template <typename V, typename X, typename R, typename A>
void backward_chunks(const BackwardParams& p, const void* weight, const Scratch& scratch, int64_t begin, int64_t end) {
  with_wanted(p, [&]<typename Wanted>(Wanted) {
    const bool given_grad_sum = Wanted::writes && p.grad_sum.data != nullptr;
    choose_prefetch<V, X, R>(p, given_grad_sum ? 4 : Wanted::writes ? 3 : 2, [&](auto prefetches) {
      choose(given_grad_sum, [&](auto adds) {
        if constexpr (Wanted::writes || !adds)
          backward_chunks_as<A, BackwardRow<V, X, R, A, adds, prefetches, Wanted>>(p, weight, scratch, begin, end);
      });
    });
  });
}

template <typename V, typename A, typename W>
void sum_columns(const BackwardParams& p, const Scratch& scratch, int64_t begin, int64_t end) {
  const auto count = chunks_of(p.rows).count;
  const auto* rows = static_cast<const Own<V, A>*>(scratch.weight);
  W* out = static_cast<W*>(p.grad_weight);
  sweep<V>(begin, end, [&](int64_t j, auto span) {
    for (int k = 0; k < span.count; ++k) {
      auto total = V::set1(0);
      for (int64_t c = 0; c < count; ++c) total = V::add(total, span.template load<V>(rows + c * p.d + j, k));
      span.template store<V>(out + j, k, total);
    }
  });
}
