// The backward of rows, written once over a vector type. Included after loops-inl.h, once per instruction set.
//
//   t = tanh(a x),  g = grad_y weight (1 - t^2),  S = sum_i g_i x_i
//   exact       grad_x = a g + x (2 grad_v / d - a S / (d (v + eps))) [+ grad_sum]
//   approximate grad_x = a g [+ grad_sum],  grad_v = -a S / (2 (v + offset + eps))
//   both        grad_lam = sum over rows of (a / lam) S,  grad_weight = sum over rows of grad_y t

// One row of a backward. X, R: storage types of branch and stream; A: the accumulate type; adds: grad_sum is given.
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

  // The row whose memory is prefetched in the first pass: `next`, or lines ahead.
  BackwardRow fetched(const BackwardRow& next) const {
    BackwardRow row = next;
    if (Wanted::grad_x != GradX::after_sum && !fetches_next_row()) {
      row.x = ahead(x, kReadAhead), row.grad_y = ahead(grad_y, kReadAhead);
      row.grad_sum = ahead(grad_sum, kReadAhead), row.grad_x = ahead(grad_x, kWriteAhead);
    }
    return row;
  }
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

  // Returns S and adds to grad_weight. At an approximate site it also writes grad_x; at an exact site S enters grad_x,
  // so g is kept for the second pass. This pass computes for longer than the second, so all prefetches stand here.
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
void backward_chunks_as(const BackwardParams& p, PreparedWeight prepared, const Scratch& scratch, int64_t begin,
                        int64_t end) {
  using Sums = typename Row::Sums;
  using Wanted = typename Row::Wanted;
  const auto* weight = static_cast<const Sums*>(prepared.data);
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
      const Row row(p, i), next = row.fetched(Row(p, i + 1 < last ? i + 1 : i));
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
void backward_chunks(const BackwardParams& p, PreparedWeight weight, const Scratch& scratch, int64_t begin,
                     int64_t end) {
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

// Columns [begin, end) of grad_weight, of storage type W.
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
