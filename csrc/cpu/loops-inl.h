// Spans of registers, sums and prefetches for the loops over a row. Included after tanh-inl.h, once per instruction
// set.

// Part of a row that one turn of a loop takes: K whole registers, or the first n lanes of one.
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
  // All registers of the span. Bytes of several registers are packed together where V can.
  template <typename V, typename T>
  void store_all(T* p, const typename V::F (&x)[K]) const {
    if constexpr (requires { V::store_bytes(p, x); })
      V::store_bytes(p, x);
    else
      for (int k = 0; k < K; ++k) store_untied<V>(p, k, x[k]);
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
  template <typename V, typename T>
  void store_all(T* p, const typename V::F (&x)[1]) const {
    V::store_part(p, n, x[0]);
  }
};

// Calls body(i, span) for the elements [begin, end). The spans depend on begin and end alone.
template <typename V, int K = V::at_once, typename Body>
inline void sweep(int64_t begin, int64_t end, Body body) {
  int64_t i = begin;
  for (; i + K * V::N <= end; i += K * V::N) body(i, Whole<K>{});
  for (; i + V::N <= end; i += V::N) body(i, Whole<1>{});
  if (i < end) body(i, Part{static_cast<int>(end - i)});
}

// The sum of products over a row. Registers add up 1024 elements (16 additions in a chain with 16 lanes); a double adds
// up their totals.
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

// Calls f(std::true_type) or f(std::false_type): a choice made once, outside the loops.
template <typename F>
inline void choose(bool flag, F f) {
  if (flag)
    f(std::true_type{});
  else
    f(std::false_type{});
}

// While a row is written, lines to be read and lines to be written are prefetched, so that both directions of the
// memory stay busy; benchmarks/README.md has the gain. Tensors that are together no larger than this are assumed to lie
// in a core's own caches, where a prefetch gains nothing.
constexpr int64_t kCachedBytes = 3 << 19;

// Calls f(std::true_type) where the loops shall prefetch. Double lanes never prefetch: they compute for longer than
// they wait for memory. A 16-bit branch beside a float32 stream always does.
template <typename V, typename X, typename R, typename F>
inline void choose_prefetch(const SiteParams& p, int tensors, F f) {
  if constexpr (std::is_same_v<V, Double>)
    f(std::false_type{});
  else if constexpr (!std::is_same_v<X, R>)
    f(std::true_type{});
  else
    choose(tensors * p.rows * p.d * int64_t{sizeof(R)} > kCachedBytes, f);
}

// On Intel's CPUs the loops prefetch the lines of the next row. On other CPUs they prefetch lines so many bytes ahead,
// since lines that are held for writing a row long push others out of the first level. A row that is read twice has the
// next row prefetched for reading everywhere.
constexpr int64_t kReadAhead = 1024, kWriteAhead = 256;

template <typename T>
inline T* ahead(T* row, int64_t bytes) {
  return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(row) + bytes);
}

// Prefetches for register k of the span at row + j, once for each line of 64 bytes.
template <typename V, typename T>
inline void prefetch(const T* row, int64_t j, int k) {
  if (k * V::N * sizeof(T) % 64 == 0)
    __builtin_prefetch(row + j + k * V::N, 0, 2);  // into the second level: the current row needs the first
}
template <typename V, typename T>
inline void prefetch_to_write(T* row, int64_t j, int k) {
  if (k * V::N * sizeof(T) % 64 == 0) __builtin_prefetch(row + j + k * V::N, 1);
}
