// Fuzzes the CPU kernels: bytes become a forward or backward call on buffers of exactly its size, which every
// instruction set of this CPU answers. Each answer must lie within bounds of a plain loop in double, a call in two
// threads must have the bits of the call in one, and nothing but the outputs may change. Sanitizers watch the memory.
//
//   clang++ -fsanitize=fuzzer,address ...     libFuzzer
//   g++ -DBHYT_FUZZ_SECONDS=60 ...            random bytes for so long; [SEED] as argument
//
// sanitizers.sh builds both.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/cpu/kernels.h"
#include "../../csrc/cpu/scalar.h"

using namespace bhyt;

namespace {

void check(bool holds, const char* what, const char* table, int64_t row = 0, int64_t column = 0) {
  if (holds) return;
  std::fprintf(stderr, "%s: %s at row %lld, column %lld\n", table, what, static_cast<long long>(row),
               static_cast<long long>(column));
  std::abort();
}

struct Bytes {
  const uint8_t* data;
  size_t size;

  // A number below limit; 0 when the bytes have run out.
  int64_t below(int64_t limit) {
    uint32_t value = 0;
    for (int i = 0; i < 2 && size > 0; ++i, ++data, --size) value = value << 8 | *data;
    return value % limit;
  }
  template <typename T, size_t n>
  T one_of(const T (&choices)[n]) {
    return choices[below(n)];
  }
};

// n elements `offset` elements into a heap block that ends with the last of them; at first every byte is 0xff, a NaN.
class Buffer {
 public:
  Buffer() = default;
  Buffer(DType t, int64_t n, int64_t offset = 0)
      : dtype_(t), bytes_((offset + n) * size_of(t)), offset_(offset * size_of(t)), block_(new char[bytes_]) {
    std::memset(block_.get(), 0xff, bytes_);
  }
  char* data() const { return block_ ? block_.get() + offset_ : nullptr; }
  Values values() const { return {data(), dtype_}; }
  double get(int64_t i) const { return cpu::read(values(), i); }
  void set(int64_t i, double x) { cpu::write(x, dtype_, data(), i); }
  void set_bits(int64_t i) { std::memset(data() + i * size_of(dtype_), 0xff, size_of(dtype_)); }
  std::vector<char> bytes() const { return {block_.get(), block_.get() + bytes_}; }

 private:
  DType dtype_ = DType::f32;
  int64_t bytes_ = 0, offset_ = 0;
  std::unique_ptr<char[]> block_;
};

struct Format {
  int digits, smallest_exponent;
  double largest;
};
Format format(DType t) {
  switch (t) {
    case DType::f16: return {11, -14, 65504};
    case DType::bf16: return {8, -126, 0x1.fep127};
    case DType::f32: return {24, -126, 0x1.fffffep127};
    default: return {53, -1022, std::numeric_limits<double>::max()};
  }
}
double ulp(double x, DType t) {
  int exponent = -2000;
  if (x != 0 && std::isfinite(x)) std::frexp(x, &exponent);
  return std::ldexp(1.0, std::max(exponent - 1, format(t).smallest_exponent) - format(t).digits + 1);
}
// In units of one rounding of the arithmetic.
double rounding(DType accumulate) { return std::ldexp(1.0, -format(accumulate).digits); }

// Within `error` before the rounding to t; a value that t may not hold can be infinite.
bool near(double given, double exact, double error, DType t) {
  if (std::fabs(exact) + error + ulp(exact, t) > format(t).largest) return true;
  return std::fabs(given - exact) <= error + 0.5001 * ulp(std::fabs(exact) + error, t);
}

// A row tensor of an input: any stride and offset.
struct Input {
  Buffer buffer;
  int64_t stride = 0;
  std::vector<char> before;
  double get(int64_t row, int64_t j) const { return buffer.get(row * stride + j); }
  Rows rows() const { return {buffer.data(), stride}; }
  bool unchanged() const { return buffer.bytes() == before; }
};

class Source {
 public:
  explicit Source(Bytes& in) : in_(in), random_(in.below(1 << 16)) {}

  double uniform() { return std::ldexp(static_cast<double>(random_() >> 11), -53); }
  double scale(DType t) { return std::ldexp(1.0, in_.below(t == DType::f16 ? 16 : 25) - 12); }
  double value(double scale) { return scale * 2 * (uniform() + uniform() + uniform() - 1.5); }

  Buffer vector(DType t, int64_t n, double scale, bool positive = false) {
    Buffer b(t, n, in_.below(8));
    for (int64_t i = 0; i < n; ++i) b.set(i, positive ? scale * (uniform() + 0.01) : value(scale));
    return b;
  }

  // May hold a row of zeros and a few NaN and infinities.
  Input input(DType t, int64_t rows, int64_t d) {
    Input x;
    const int64_t kind = in_.below(4);
    x.stride = kind == 0 ? 0 : kind == 1 ? d + in_.below(9) : d;
    x.buffer = Buffer(t, rows == 0 ? 0 : (rows - 1) * x.stride + d, in_.below(8));
    const double s = scale(t);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t j = 0; j < d; ++j) x.buffer.set(row * x.stride + j, value(s));
    if (rows > 0 && d > 0) {
      const double specials[] = {NAN, INFINITY, -INFINITY, -0.0, 0.0};
      for (int64_t n = in_.below(8); n > 5; --n) {
        const int64_t i = in_.below(rows) * x.stride + in_.below(d);
        x.buffer.set(i, in_.one_of(specials));
        if (in_.below(2)) x.buffer.set_bits(i);  // the NaN that a rounding by addition takes past its end
      }
      if (in_.below(4) == 0)
        for (int64_t row = in_.below(rows), j = 0; j < d; ++j) x.buffer.set(row * x.stride + j, 0);
    }
    x.before = x.buffer.bytes();
    return x;
  }

 private:
  Bytes& in_;
  std::mt19937_64 random_;
};

struct Pair {
  DType branch, stream;
};
constexpr DType kTypes[] = {DType::f32, DType::bf16, DType::f16, DType::f64};
constexpr Pair kMixed[] = {{DType::bf16, DType::f32}, {DType::f16, DType::f32}, {DType::f32, DType::f64},
                           {DType::bf16, DType::f64}, {DType::f16, DType::f64}};

// The parameters of a site, and the memory they point to.
struct Site {
  Buffer weight, lam, offset;
  DType accumulate;

  template <typename P>
  void describe(P& p, Bytes& in, Source& source, bool mixed) {
    p.branch = p.stream = in.one_of(kTypes);
    if (mixed) {
      const Pair pair = in.one_of(kMixed);
      p.branch = pair.branch, p.stream = pair.stream;
    }
    accumulate = accumulate_dtype(p.stream);
    p.exact = in.below(2) == 0;
    const int64_t size = in.below(512);
    if (size == 511) {  // beyond the size at which the loops begin to prefetch
      p.d = 900 + in.below(400);
      p.rows = (3 << 19) / (2 * p.d * size_of(p.stream)) + 1 + in.below(3);
    } else {
      p.rows = in.below(size % 8 ? 24 : 3);
      p.d = in.below(size % 8 ? 100 : 2300);
    }
    constexpr double kLams[] = {2, 1, 0, -2, 30, 1e-3, 1e4}, kKappas[] = {10, 1, 0.1}, kEps[] = {1e-6, 1e-12, 1};
    lam = Buffer(in.one_of(kTypes), 1);
    lam.set(0, in.one_of(kLams));
    p.lam = lam.values();
    p.kappa = in.one_of(kKappas), p.eps = in.one_of(kEps);
    if (!p.exact && in.below(2)) p.offset = (offset = source.vector(in.one_of(kTypes), 1, 1, true)).values();
    if (in.below(4)) p.weight = (weight = source.vector(in.one_of(kTypes), p.d, 2)).values();
  }
};

// The gain as rows take it.
Buffer wide_weight(const cpu::Kernels& table, const SiteParams& p) {
  Buffer wide(accumulate_dtype(p.stream), p.d), expected(accumulate_dtype(p.stream), p.d);
  table.widen(p.weight, p.stream, p.d, wide.data());
  for (int64_t j = 0; j < p.d; ++j) expected.set(j, p.weight.data ? cpu::read(p.weight, j) : 1);
  check(wide.bytes() == expected.bytes(), "widened gain", table.name);
  return wide;
}

// f(begin, end) over [0, n), in one thread or in two.
template <typename F>
void run(bool two_threads, int64_t n, int64_t at, F f) {
  if (!two_threads) return f(0, n);
  std::thread other([&] { f(0, at); });
  f(at, n);
  other.join();
}

double shifted_variance(const SiteParams& p, double v) { return v + (p.offset.data ? cpu::read(p.offset) : 0) + p.eps; }

struct ForwardOutputs {
  Buffer y, sum, variance;
};

void check_forward(const ForwardParams& p, const Input& x, const Input& residual, const Buffer& variance,
                   const Buffer& weight, const ForwardOutputs& out, const char* table) {
  const DType A = accumulate_dtype(p.stream);
  Buffer stream(p.stream, p.d), bound(p.branch, 1);
  for (int64_t i = 0; i < p.rows; ++i) {
    long double squares = 0;
    bool finite = true;
    for (int64_t j = 0; j < p.d; ++j) {
      stream.set(j, residual.buffer.data() ? x.get(i, j) + residual.get(i, j) : x.get(i, j));
      const double s = stream.get(j);
      squares += static_cast<long double>(s) * s;
      finite = finite && std::isfinite(s);
      if (p.sum) {
        const double sum = out.sum.get(i * p.d + j);
        check(sum == s || (std::isnan(sum) && std::isnan(s)), "sum", table, i, j);
      }
    }
    const double v = (p.exact ? out.variance : variance).get(i);
    if (p.exact && p.d > 0) {
      const double mean = static_cast<double>(squares / p.d), tiny = std::ldexp(1.0, format(A).smallest_exponent);
      if (finite)
        check(std::fabs(v - mean) <= (A == DType::f64 ? 1e-14 : 12 * rounding(A)) * mean + tiny, "variance", table, i);
      else
        check(!std::isfinite(v), "variance of a row that is not finite", table, i);
    }
    const double a = cpu::read(p.lam) / (p.kappa * std::sqrt(shifted_variance(p, v)));
    for (int64_t j = 0; j < p.d; ++j) {
      const double y = out.y.get(i * p.d + j), w = weight.get(j), exact = w * std::tanh(a * stream.get(j));
      if (std::isnan(exact) || !std::isfinite(a)) {
        check(std::isnan(y) || !std::isnan(exact), "y of a NaN", table, i, j);
        continue;
      }
      const double error = std::fabs(y - exact);
      bound.set(0, w);
      check(std::fabs(y) <= std::fabs(bound.get(0)), "|y| <= |weight|", table, i, j);
      if (p.branch == DType::f64)
        check(error <= 1e-14 * std::fabs(exact) + 0x1p-1022, "y", table, i, j);
      else
        check(error <= (p.branch == DType::f32 ? 6 : 0.55) * ulp(exact, p.branch), "y", table, i, j);
    }
  }
}

void forward(Bytes& in) {
  ForwardParams p;
  Site site;
  Source source(in);
  const int64_t kind = in.below(3);  // one tensor, a sum, a sum of two dtypes
  site.describe(p, in, source, kind == 2);
  const Input x = source.input(p.branch, p.rows, p.d);
  Input residual;
  if (kind > 0) residual = source.input(p.stream, p.rows, p.d);
  Buffer variance;
  if (!p.exact) variance = source.vector(site.accumulate, p.rows, source.scale(DType::f32), true);
  p.x = x.rows(), p.residual = residual.rows(), p.variance = variance.data();
  const int64_t at = in.below(p.rows + 1);
  for (const cpu::Kernels* table : cpu::runnable_kernels()) {
    const Buffer weight = wide_weight(*table, p);
    ForwardOutputs out[2];
    for (int i = 0; i < 2; ++i) {
      p.y = (out[i].y = Buffer(p.branch, p.rows * p.d)).data();
      if (kind > 0) p.sum = (out[i].sum = Buffer(p.stream, p.rows * p.d)).data();
      if (p.exact) p.variance_out = (out[i].variance = Buffer(site.accumulate, p.rows)).data();
      run(i == 1, p.rows, at, [&](int64_t begin, int64_t end) { table->forward(p, weight.data(), begin, end); });
    }
    check(out[0].y.bytes() == out[1].y.bytes(), "y has other bits in parts", table->name);
    check(out[0].sum.bytes() == out[1].sum.bytes(), "sum has other bits in parts", table->name);
    check(out[0].variance.bytes() == out[1].variance.bytes(), "variance has other bits in parts", table->name);
    check_forward(p, x, residual, variance, weight, out[0], table->name);
    check(x.unchanged() && residual.unchanged(), "an input was written", table->name);
  }
}

struct BackwardOutputs {
  Buffer x, variance, weight, lam;
};

// Bounds: z = a x is off by at most four roundings, which 1 - t^2 amplifies 2|z| times; sixteen more for g; for t of
// 16-bit rows what tanh-inl.h states, 2^-20.5 below 1; the rest counts additions. `tiny` stands for what underflows.
void check_backward(const BackwardParams& p, const Input& grad_y, const Input& grad_sum, const Input& x,
                    const Buffer& variance, const Buffer& grad_variance, const Buffer& weight,
                    const BackwardOutputs& out, const char* table) {
  const DType A = accumulate_dtype(p.stream);
  const double u = rounding(A), t_error = (size_of(p.stream) == 2 ? 0x1p-20 : 4 * u);
  const double tiny = std::ldexp(1.0, format(A).smallest_exponent), additions = 40 + cpu::chunks_of(p.rows).count;
  const double d = static_cast<double>(p.d);
  std::vector<double> weight_sum(p.d), weight_size(p.d), g(p.d), g_error(p.d);
  double lam_sum = 0, lam_error = 0;
  bool all_finite = true;
  for (int64_t i = 0; i < p.rows; ++i) {
    const double shifted = shifted_variance(p, variance.get(i)), a_over_lam = 1 / (p.kappa * std::sqrt(shifted));
    const double a = cpu::read(p.lam) * a_over_lam;
    double S = 0, S_error = 0;
    bool finite = true;
    for (int64_t j = 0; j < p.d; ++j) {
      const double xs = x.get(i, j), z = a * xs, r = 1 / (1 + std::exp(2 * std::fabs(z))), gy = grad_y.get(i, j);
      const double scale = std::fabs(gy * weight.get(j)), t = std::tanh(z);
      g[j] = gy * weight.get(j) * 4 * r * (1 - r);
      const double slope_error = std::fabs(z) < 1.01 ? 2 * t_error * t * t : 0;
      g_error[j] = std::fabs(g[j]) * (8 * std::fabs(z) + 16) * u + slope_error * scale + tiny * (scale + 1);
      S += g[j] * xs;
      S_error += g_error[j] * std::fabs(xs) + std::fabs(g[j] * xs) * additions * u + tiny;
      weight_sum[j] += gy * t;
      weight_size[j] += std::fabs(gy * t) + tiny;
      for (const double given : {xs, gy, p.grad_sum.data ? grad_sum.get(i, j) : 0})
        finite = finite && std::isfinite(given);
    }
    all_finite = all_finite && finite;
    if (!finite) continue;
    lam_sum += a_over_lam * S;
    lam_error += a_over_lam * S_error + additions * u * std::fabs(a_over_lam * S);
    if (p.grad_variance_out) {
      const double factor = -a / (2 * shifted);
      check(near(out.variance.get(i), factor * S, std::fabs(factor) * (S_error + 4 * u * std::fabs(S)), A),
            "grad_variance", table, i);
    }
    if (!p.grad_x) continue;
    const double from_v = p.exact && p.grad_variance ? 2 * grad_variance.get(i) / d : 0;
    const double from_S = p.exact ? a * S / (d * shifted) : 0;
    const double along_x = from_v - from_S;
    const double along_x_error = (p.exact ? std::fabs(a) * S_error / (d * shifted) : 0) +
                                 8 * u * (std::fabs(from_v) + std::fabs(from_S));
    for (int64_t j = 0; j < p.d; ++j) {
      const double xs = x.get(i, j), upstream = p.grad_sum.data ? grad_sum.get(i, j) : 0;
      const double dx = a * g[j] + xs * along_x + upstream;
      const double error = std::fabs(a) * g_error[j] + std::fabs(xs) * along_x_error + tiny +
                           8 * u * (std::fabs(a * g[j]) + std::fabs(xs * along_x) + std::fabs(upstream));
      check(near(out.x.get(i * p.d + j), dx, error, p.stream), "grad_x", table, i, j);
    }
  }
  if (!all_finite) return;
  for (int64_t j = 0; p.grad_weight && j < p.d; ++j)
    check(near(out.weight.get(j), weight_sum[j], weight_size[j] * (additions * u + t_error), p.weight.dtype),
          "grad_weight", table, 0, j);
  if (p.grad_lam) check(near(out.lam.get(0), lam_sum, lam_error, p.lam.dtype), "grad_lam", table);
}

void backward(Bytes& in) {
  BackwardParams p;
  Site site;
  Source source(in);
  site.describe(p, in, source, in.below(3) == 2);
  const Input grad_y = source.input(p.branch, p.rows, p.d), x = source.input(p.stream, p.rows, p.d);
  Input grad_sum;
  if (in.below(2)) grad_sum = source.input(p.stream, p.rows, p.d);
  const Buffer variance = source.vector(site.accumulate, p.rows, source.scale(DType::f32), true);
  Buffer grad_variance;
  if (p.exact && in.below(2)) grad_variance = source.vector(site.accumulate, p.rows, 1);
  p.grad_y = grad_y.rows(), p.x = x.rows(), p.grad_sum = grad_sum.rows();
  p.variance = variance.data(), p.grad_variance = grad_variance.data();
  const bool wants_x = in.below(8), wants_variance = in.below(2), wants_weight = in.below(2), wants_lam = in.below(2);
  const auto count = cpu::chunks_of(p.rows).count;
  const int64_t at = in.below(count + 1), column = in.below(p.d + 1);
  for (const cpu::Kernels* table : cpu::runnable_kernels()) {
    const Buffer weight = wide_weight(*table, p);
    BackwardOutputs out[2];
    for (int i = 0; i < 2; ++i) {
      const Buffer weight_partials(site.accumulate, count * p.d), lam_partials(DType::f64, count);
      const cpu::Partials partials{weight_partials.data(), reinterpret_cast<double*>(lam_partials.data())};
      if (wants_x) p.grad_x = (out[i].x = Buffer(p.stream, p.rows * p.d)).data();
      if (wants_variance && !p.exact) p.grad_variance_out = (out[i].variance = Buffer(site.accumulate, p.rows)).data();
      if (wants_weight && p.weight.data) p.grad_weight = (out[i].weight = Buffer(p.weight.dtype, p.d)).data();
      if (wants_lam) p.grad_lam = (out[i].lam = Buffer(p.lam.dtype, 1)).data();
      run(i == 1, count, at,
          [&](int64_t begin, int64_t end) { table->backward(p, weight.data(), partials, begin, end); });
      if (p.grad_weight)
        run(i == 1, p.d, column, [&](int64_t begin, int64_t end) { table->sum_weight(p, partials, begin, end); });
      if (p.grad_lam) table->sum_lam(p, partials);
    }
    check(out[0].x.bytes() == out[1].x.bytes(), "grad_x has other bits in parts", table->name);
    check(out[0].variance.bytes() == out[1].variance.bytes(), "grad_variance has other bits in parts", table->name);
    check(out[0].weight.bytes() == out[1].weight.bytes(), "grad_weight has other bits in parts", table->name);
    check(out[0].lam.bytes() == out[1].lam.bytes(), "grad_lam has other bits in parts", table->name);
    check_backward(p, grad_y, grad_sum, x, variance, grad_variance, weight, out[0], table->name);
    check(x.unchanged() && grad_y.unchanged() && grad_sum.unchanged(), "an input was written", table->name);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes in{data, size};
  in.below(2) == 0 ? forward(in) : backward(in);
  return 0;
}

#ifdef BHYT_FUZZ_SECONDS
int main(int argc, char** argv) {
  std::mt19937_64 random(argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0);
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(BHYT_FUZZ_SECONDS);
  long calls = 0;
  for (; std::chrono::steady_clock::now() < end; ++calls) {
    uint8_t bytes[128];
    for (auto& byte : bytes) byte = static_cast<uint8_t>(random());
    LLVMFuzzerTestOneInput(bytes, sizeof bytes);
  }
  std::printf("%ld calls, every instruction set of this CPU: ok\n", calls);
}
#endif
