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
};

// body(i, span) over the elements [begin, end), in an order that depends on them alone.
template <typename V, typename Body>
inline void sweep(int64_t begin, int64_t end, Body body) {
  int64_t i = begin;
  for (; i + 4 * V::N <= end; i += 4 * V::N) body(i, Whole<4>{});
  for (; i + V::N <= end; i += V::N) body(i, Whole<1>{});
  if (i < end) body(i, Part{static_cast<int>(end - i)});
}

// The sum of products over a row: registers over 1024 elements (16 additions deep with 16 lanes), double beyond.
template <typename V>
struct RowSum {
  typename V::F lanes[4];
  double total = 0;

  void add(int k, typename V::F a, typename V::F b) { lanes[k] = V::fma(a, b, lanes[k]); }

  template <typename Body>
  void over(int64_t d, Body body) {
    for (int64_t begin = 0; begin < d; begin += 1024) {
      for (auto& lane : lanes) lane = V::set1(0);
      sweep<V>(begin, begin + 1024 < d ? begin + 1024 : d, body);
      total += V::sum(V::add(V::add(lanes[0], lanes[1]), V::add(lanes[2], lanes[3])));
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

// An exact site reads a row in its first pass and writes in its second. Where rows come from memory, each pass asks for
// what the other one needs: the second for later rows, the first for the lines that will be written. Both directions
// of the memory are then busy all the time; benchmarks/README.md has what that brings.
template <typename V, typename T>
inline void prefetch(const T* row, int64_t j, int k) {
  if (row != nullptr) __builtin_prefetch(row + j + k * V::N);
}
template <typename V, typename T>
inline void prefetch_to_write(T* row, int64_t j, int k) {
  if (row != nullptr) __builtin_prefetch(row + j + k * V::N, 1);
}

// X: branch, R: stream, A: accumulate type in memory (weight, variances). tanh is as accurate as the stream
// asks, so that a narrow branch on a wide stream gets what the two steps would give it: y of the sum, rounded.
template <typename V, typename X, typename R, typename A>
struct ForwardRow {
  using F = typename V::F;
  const X* x;
  const R* residual;  // null: nothing to add
  R* sum;
  X* y;

  ForwardRow(const ForwardParams& p, int64_t i)
      : x(row_of<X>(p.x, i)),
        residual(row_of<R>(p.residual, i)),
        sum(row_of<R>(p.sum, i, p.d)),
        y(row_of<X>(p.y, i, p.d)) {}

  // Register k of a span of the stream. A sum is stored first and read back as rounded.
  template <typename Span>
  F stream(int64_t j, Span span, int k) const {
    if (residual == nullptr) return span.template load<V>(x + j, k);
    const F added = V::add(span.template load<V>(x + j, k), span.template load<V>(residual + j, k));
    span.template store<V>(sum + j, k, added);
    return span.template load<V>(sum + j, k);
  }

  // written: the row of y that will be written next, null if not worth asking for.
  double mean_square(int64_t d, X* written) const {
    RowSum<V> squares;
    squares.over(d, [&](int64_t j, auto span) {
      for (int k = 0; k < span.count; ++k) {
        prefetch_to_write<V>(written, j, k);
        const F s = stream(j, span, k);
        squares.add(k, s, s);
      }
    });
    return squares.total / static_cast<double>(d);
  }

  // load: as stream, or of what the first pass left. later: the row to ask memory for meanwhile, null pointers if none.
  template <typename Load>
  void apply(int64_t d, double a, const A* weight, const ForwardRow& later, Load load) const {
    const F scale = V::set1(a);
    sweep<V>(0, d, [&](int64_t j, auto span) {
      F z[span.count], t[span.count];
      for (int k = 0; k < span.count; ++k) {
        prefetch<V>(later.x, j, k);
        prefetch<V>(later.residual, j, k);
        prefetch_to_write<V>(later.sum, j, k);
        z[k] = V::mul(scale, load(j, span, k));
      }
      tanh_group<V, R>(z, t);
      for (int k = 0; k < span.count; ++k)
        span.template store<V>(y + j, k, weight ? V::mul(t[k], span.template load<V>(weight + j, k)) : t[k]);
    });
  }
};

// Statistics first, for as many rows as stay in the nearest cache: the sums, roots and divisions of short rows overlap.
constexpr int64_t kRowsAtOnce = 8, kElementsAtOnce = 4096;
// Tensors up to this size are taken to lie in a core's own caches, where asking ahead is only work.
constexpr int64_t kCachedBytes = 1 << 19;

template <typename V, typename X, typename R, typename A>
void forward_rows(const ForwardParams& p, const void* weight_data, int64_t begin, int64_t end) {
  using Row = ForwardRow<V, X, R, A>;
  const A* weight = static_cast<const A*>(weight_data);
  const double lam = read(p.lam), offset = p.offset.data ? read(p.offset) : 0;
  const int64_t fitting = kElementsAtOnce / (p.d > 0 ? p.d : 1);
  const int64_t at_once = !p.exact || fitting < 1 ? 1 : fitting < kRowsAtOnce ? fitting : kRowsAtOnce;
  const Row none(ForwardParams{}, 0);
  const bool from_memory = p.exact && p.rows * p.d * int64_t{sizeof(R)} > kCachedBytes;

  for (int64_t first = begin; first < end; first += at_once) {
    const int64_t last = first + at_once < end ? first + at_once : end;
    double a[kRowsAtOnce];
    for (int64_t i = first; i < last; ++i) {
      if (p.exact) {
        const Row row(p, i);
        static_cast<A*>(p.variance_out)[i] = static_cast<A>(row.mean_square(p.d, from_memory ? row.y : nullptr));
      }
      // The variance as rounded: forward_approx given this variance gives the same bits.
      const double v = p.exact ? static_cast<A*>(p.variance_out)[i] : static_cast<const A*>(p.variance)[i];
      a[i - first] = lam / (p.kappa * std::sqrt(v + offset + p.eps));
    }
    for (int64_t i = first; i < last; ++i) {
      const Row row(p, i);
      const Row later = from_memory && i + at_once < end ? Row(p, i + at_once) : none;
      if (!p.exact)
        row.apply(p.d, a[i - first], weight, later,
                  [&](int64_t j, auto span, int k) { return row.stream(j, span, k); });
      else if (row.residual)
        row.apply(p.d, a[i - first], weight, later,
                  [&](int64_t j, auto span, int k) { return span.template load<V>(row.sum + j, k); });
      else
        row.apply(p.d, a[i - first], weight, later,
                  [&](int64_t j, auto span, int k) { return span.template load<V>(row.x + j, k); });
    }
  }
}

template <typename V, typename X, typename R, typename A>
void backward_chunks(const BackwardParams& p, const void* weight_data, const Partials& partials, int64_t begin,
                     int64_t end) {
  using F = typename V::F;
  const A* weight = static_cast<const A*>(weight_data);
  const double lam = read(p.lam), offset = p.offset.data ? read(p.offset) : 0;
  const double d = static_cast<double>(p.d);
  const auto chunks = chunks_of(p.rows);
  const bool from_memory = p.exact && p.rows * p.d * int64_t{sizeof(R)} > kCachedBytes;
  // g of one row, between the two passes of an exact site
  std::unique_ptr<A[]> g_row(p.exact && p.grad_x ? new A[p.d] : nullptr);

  for (int64_t chunk = begin; chunk < end; ++chunk) {
    A* grad_weight = row_of<A>(partials.weight, chunk, p.d);
    if (grad_weight) std::memset(grad_weight, 0, p.d * sizeof(A));
    double grad_lam = 0;
    const int64_t first = chunk * chunks.rows_per_chunk;
    const int64_t last = first + chunks.rows_per_chunk < p.rows ? first + chunks.rows_per_chunk : p.rows;
    for (int64_t i = first; i < last; ++i) {
      const X* grad_y = row_of<X>(p.grad_y, i);
      const R* grad_sum = row_of<R>(p.grad_sum, i);
      const R* x = row_of<R>(p.x, i);
      R* grad_x = row_of<R>(p.grad_x, i, p.d);
      R* written = from_memory ? grad_x : nullptr;
      const R* grad_sum_read = from_memory ? grad_sum : nullptr;
      const double shifted = static_cast<const A*>(p.variance)[i] + offset + p.eps;
      const double a_over_lam = 1 / (p.kappa * std::sqrt(shifted));
      const F a = V::set1(lam * a_over_lam);

      RowSum<V> S;
      S.over(p.d, [&](int64_t j, auto span) {
        F xs[span.count], z[span.count], t[span.count], slope[span.count];
        for (int k = 0; k < span.count; ++k) {
          prefetch_to_write<V>(written, j, k);
          prefetch<V>(grad_sum_read, j, k);
          xs[k] = span.template load<V>(x + j, k);
          z[k] = V::mul(a, xs[k]);
        }
        tanh_and_slope_group<V, R>(z, t, slope);
        for (int k = 0; k < span.count; ++k) {
          const F upstream = span.template load<V>(grad_y + j, k);
          F g = V::mul(upstream, slope[k]);
          if (weight) g = V::mul(g, span.template load<V>(weight + j, k));
          S.add(k, g, xs[k]);
          if (grad_weight)
            span.template store<V>(grad_weight + j, k,
                                   V::fma(upstream, t[k], span.template load<V>(grad_weight + j, k)));
          if (!grad_x) continue;
          if (p.exact) {
            span.template store<V>(g_row.get() + j, k, g);
          } else {
            F dx = V::mul(a, g);
            if (grad_sum) dx = V::add(dx, span.template load<V>(grad_sum + j, k));
            span.template store<V>(grad_x + j, k, dx);
          }
        }
      });
      grad_lam += a_over_lam * S.total;
      const double a_S = lam * a_over_lam * S.total;
      if (p.grad_variance_out)
        static_cast<A*>(p.grad_variance_out)[i] = static_cast<A>(-a_S / (2 * shifted));
      if (p.exact && grad_x) {
        const double from_v = p.grad_variance ? 2 * static_cast<const A*>(p.grad_variance)[i] / d : 0;
        const F along_x = V::set1(from_v - a_S / (d * shifted));
        const bool fetches_next = from_memory && i + 1 < last;
        const R* next_x = fetches_next ? row_of<R>(p.x, i + 1) : nullptr;
        const X* next_grad_y = fetches_next ? row_of<X>(p.grad_y, i + 1) : nullptr;
        sweep<V>(0, p.d, [&](int64_t j, auto span) {
          for (int k = 0; k < span.count; ++k) {
            prefetch<V>(next_x, j, k);
            prefetch<V>(next_grad_y, j, k);
            F dx = V::mul(a, span.template load<V>(g_row.get() + j, k));
            dx = V::fma(along_x, span.template load<V>(x + j, k), dx);
            if (grad_sum) dx = V::add(dx, span.template load<V>(grad_sum + j, k));
            span.template store<V>(grad_x + j, k, dx);
          }
        });
      }
    }
    if (partials.lam) static_cast<double*>(partials.lam)[chunk] = grad_lam;
  }
}

template <typename V, typename A, typename W>
void sum_columns(const BackwardParams& p, const Partials& partials, int64_t begin, int64_t end) {
  const auto count = chunks_of(p.rows).count;
  const A* rows = static_cast<const A*>(partials.weight);
  W* out = static_cast<W*>(p.grad_weight);
  sweep<V>(begin, end, [&](int64_t j, auto span) {
    for (int k = 0; k < span.count; ++k) {
      auto total = V::set1(0);
      for (int64_t c = 0; c < count; ++c) total = V::add(total, span.template load<V>(rows + c * p.d + j, k));
      span.template store<V>(out + j, k, total);
    }
  });
}
