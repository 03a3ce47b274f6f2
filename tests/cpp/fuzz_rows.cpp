// Fuzzes the CPU kernels: bytes become a forward or backward call on buffers of exactly its size, which every
// instruction set of this CPU answers. Each answer must lie within bounds of a plain loop in double, a call in two
// threads must have the bits of the call in one, and nothing but the outputs may change. Sanitizers watch the memory.
//
//   clang++ -fsanitize=fuzzer,address ...     libFuzzer
//   g++ -DBHYT_FUZZ_SECONDS=60 ...            random bytes for so long; [SEED] as argument
//
// sanitizers.sh builds both.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "fuzz_inputs.h"

using namespace bhyt;
using namespace bhyt::fuzz;

namespace {

void check(bool holds, const char* what, const char* table, int64_t row = 0, int64_t column = 0) {
  if (holds) return;
  std::fprintf(stderr, "%s: %s at row %lld, column %lld\n", table, what, static_cast<long long>(row),
               static_cast<long long>(column));
  std::abort();
}

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

// Where element j of n of a prepared weight lies.
int64_t place(const cpu::Kernels& table, DType stream, int64_t j, int64_t n) {
  const int64_t block = table.bfloat_block, first = j - j % block, k = j - first;
  return stream != DType::bf16 || block == 1 || first + block > n ? j : first + k % 2 * (block / 2) + k / 2;
}

struct Weight {
  Buffer memory;
  cpu::PreparedWeight prepared;
  Buffer in_order;
};

Weight prepare_weight(const cpu::Kernels& table, const SiteParams& p, const Quantization* quantization = nullptr) {
  const DType A = accumulate_dtype(p.stream);
  Buffer memory(A, p.d), in_order(A, p.d), expected(A, p.d);
  const cpu::PreparedWeight prepared = table.prepare_weight(p, quantization, memory.data());
  for (int64_t j = 0; j < p.d; ++j) in_order.set(j, memory.get(place(table, p.stream, j, p.d)));
  for (int64_t j = 0; j < p.d; ++j) expected.set(j, p.weight.data ? cpu::read(p.weight, j) : 1);
  if (quantization)
    for (int64_t j = 0; j < p.d; ++j) {
      const double over_scale = expected.get(j) * quantization->inverse_scale;
      check(near(in_order.get(j), over_scale, 2 * rounding(A) * std::fabs(over_scale), A), "weight over the scale",
            table.name);
    }
  else
    check(in_order.bytes() == expected.bytes(), "prepared weight", table.name);
  return {std::move(memory), prepared, std::move(in_order)};
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

// A byte as the number it stands for.
double number(uint8_t byte, DType t) {
  if (t != DType::f8) return t == DType::i8 ? static_cast<int8_t>(byte) : byte;
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  const double size = (byte & 127) == 127 ? NAN
                      : exponent == 0     ? std::ldexp(mantissa, -9)
                                          : std::ldexp(8 + mantissa, exponent - 10);
  return byte & 128 ? -size : size;
}

// q of y / scale, within a ten-thousandth of a step of where two numbers meet.
bool is_quantized(double q, double scaled, const Quantization& to) {
  if (std::isnan(scaled)) return to.dtype == DType::f8 ? std::isnan(q) : q == to.zero_point;
  const double lowest = to.lowest() - to.zero_point, highest = to.highest() - to.zero_point;
  scaled = std::min(highest, std::max(lowest, scaled));
  int exponent = 0;
  std::frexp(scaled, &exponent);
  const double step = to.dtype == DType::f8 ? std::ldexp(1.0, std::max(exponent, -5) - 4) : 1;
  return std::fabs(q - to.zero_point - scaled) <= 0.5001 * step;
}

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
#ifdef BHYT_FUZZ_BOCHS  // whose VCVTPS2PH rounds ties up: so may a sum of f16 be
      const double given = p.sum ? out.sum.get(i * p.d + j) : NAN;
      if (p.stream == DType::f16 && std::fabs(given - stream.get(j)) <= ulp(given, p.stream)) stream.set(j, given);
#endif
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
      if (p.quantization) {
        const auto byte = static_cast<uint8_t>(out.y.data()[i * p.d + j]);
        if (std::isfinite(a) || std::isnan(exact))
          check(is_quantized(number(byte, p.quantization->dtype), exact, *p.quantization), "q", table, i, j);
        continue;
      }
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
  if (in.below(2)) {
    constexpr DType kBytes[] = {DType::i8, DType::u8, DType::f8};
    const DType dtype = in.one_of(kBytes);
    const int zero_point = dtype == DType::f8 ? 0 : static_cast<int>(in.below(256)) - (dtype == DType::i8 ? 128 : 0);
    p.quantization = Quantization{dtype, 1 / (source.scale(DType::f16) / 127), zero_point};
  }
  const Quantization* quantization = p.quantization ? &*p.quantization : nullptr;
  for (const cpu::Kernels* table : cpu::runnable_kernels(p.stream)) {
    const Weight weight = prepare_weight(*table, p, quantization);
    ForwardOutputs out[2];
    for (int i = 0; i < 2; ++i) {
      p.y = (out[i].y = Buffer(quantization ? quantization->dtype : p.branch, p.rows * p.d)).data();
      if (kind > 0) p.sum = (out[i].sum = Buffer(p.stream, p.rows * p.d)).data();
      if (p.exact) p.variance_out = (out[i].variance = Buffer(site.accumulate, p.rows)).data();
      run(i == 1, p.rows, at, [&](int64_t begin, int64_t end) { table->forward(p, weight.prepared, begin, end); });
    }
    check(out[0].y.bytes() == out[1].y.bytes(), "y has other bits in parts", table->name);
    check(out[0].sum.bytes() == out[1].sum.bytes(), "sum has other bits in parts", table->name);
    check(out[0].variance.bytes() == out[1].variance.bytes(), "variance has other bits in parts", table->name);
    check_forward(p, x, residual, variance, weight.in_order, out[0], table->name);
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
  void* const nowhere = reinterpret_cast<void*>(64);  // of what serves nothing that is wanted; so are null pointers
  const auto count = cpu::chunks_of(p.rows).count;
  const int64_t at = in.below(count + 1), column = in.below(p.d / cpu::kColumnBlock + 1) * cpu::kColumnBlock;
  for (const cpu::Kernels* table : cpu::runnable_kernels(p.stream)) {
    const Weight weight = prepare_weight(*table, p);
    BackwardOutputs out[2];
    for (int i = 0; i < 2; ++i) {
      if (wants_x) p.grad_x = (out[i].x = Buffer(p.stream, p.rows * p.d)).data();
      if (wants_variance && !p.exact) p.grad_variance_out = (out[i].variance = Buffer(site.accumulate, p.rows)).data();
      if (wants_weight && p.weight.data) p.grad_weight = (out[i].weight = Buffer(p.weight.dtype, p.d)).data();
      if (wants_lam) p.grad_lam = (out[i].lam = Buffer(p.lam.dtype, 1)).data();
      if (!p.needs_g() && !p.grad_weight) continue;
      if (!p.grad_x && p.grad_sum.data) p.grad_sum.data = nowhere;
      if (!p.grad_x && p.grad_variance) p.grad_variance = nowhere;
      Buffer weight_sums, lam_sums;
      cpu::Scratch sums;
      if (p.grad_weight) sums.weight = (weight_sums = Buffer(site.accumulate, count * p.d)).data();
      if (p.grad_lam) sums.lam = reinterpret_cast<double*>((lam_sums = Buffer(DType::f64, count)).data());
      run(i == 1, count, at, [&](int64_t begin, int64_t end) {
        Buffer g;
        cpu::Scratch scratch = sums;
        if (p.exact && p.grad_x) scratch.g = (g = Buffer(site.accumulate, p.d)).data();
        table->backward(p, p.needs_g() ? weight.prepared : cpu::PreparedWeight(), scratch, begin, end);
      });
      if (p.grad_weight)
        run(i == 1, p.d, column, [&](int64_t begin, int64_t end) { table->sum_weight(p, sums, begin, end); });
      if (p.grad_lam) table->sum_lam(p, sums);
    }
    check(out[0].x.bytes() == out[1].x.bytes(), "grad_x has other bits in parts", table->name);
    check(out[0].variance.bytes() == out[1].variance.bytes(), "grad_variance has other bits in parts", table->name);
    check(out[0].weight.bytes() == out[1].weight.bytes(), "grad_weight has other bits in parts", table->name);
    check(out[0].lam.bytes() == out[1].lam.bytes(), "grad_lam has other bits in parts", table->name);
    check_backward(p, grad_y, grad_sum, x, variance, grad_variance, weight.in_order, out[0], table->name);
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
