// Runs every float, or every STRIDE-th, through the forward kernel of each instruction set with a = 1 and no gain, so
// that y = tanh(x), and reports the largest error in ulps of the output's dtype. Exits 1 above the contract. Rows of
// f32 take every 16th of these floats with other a too, to both sides of those that coefficients can hold; rows of bf16
// alone, which have lanes of their own, all numbers of bf16 times as many a in [1, 2) instead.
//
//   tanh_sweep [STRIDE [TIER]]     STRIDE 1 (the default) takes all 2^32 floats: half an hour of CPU time
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include "../../csrc/cpu/kernels.h"
#include "../../csrc/cpu/scalar.h"

using namespace bhyt;

namespace {

constexpr int64_t kBlock = 1 << 16;

// One ulp of a value whose float64 form is `exact`, for `digits` significand bits and the given smallest exponent.
double ulp(double exact, int digits, int smallest_exponent) {
  int exponent;
  std::frexp(exact, &exponent);
  return std::ldexp(1.0, std::max(exponent - digits, smallest_exponent));
}

struct Worst {
  double ulps = 0;
  float at = 0;
  long wrong_specials = 0;
};

// The error of one y = tanh(x), x given exactly; drops_sign: of -0.
void note(Worst& worst, double given, double x, int digits, int smallest_exponent, bool drops_sign) {
  const double exact = std::tanh(x);
  const bool special_ok = std::isnan(exact) ? std::isnan(given)
                          : exact == 0      ? given == 0 && (drops_sign || std::signbit(given) == std::signbit(exact))
                                            : std::fabs(given) <= 1;
  if (!special_ok) ++worst.wrong_specials;
  if (std::isnan(exact)) return;
  const double error = std::fabs(given - exact) / ulp(exact, digits, smallest_exponent);
  if (!(error <= worst.ulps)) {
    worst.ulps = error;
    worst.at = static_cast<float>(x);
  }
}

template <typename T>
Worst sweep(const cpu::Kernels& kernels, DType dtype, int digits, int smallest_exponent, uint64_t begin, uint64_t end,
            uint64_t stride, float a = 1) {
  std::vector<float> x(kBlock), no_gain(kBlock, 1.0f);
  std::vector<T> y(kBlock);
  const float one = 1.0f;
  ForwardParams p;
  p.rows = 1;
  p.branch = dtype;
  // A wide stream: float32 arguments for every output dtype would need a residual; the stream is then the sum.
  p.stream = DType::f32;
  p.exact = false;
  p.lam = {&a, DType::f32};
  p.variance = &one;
  p.kappa = 1;
  p.eps = 0;
  std::vector<T> branch(kBlock);  // zeros
  std::vector<float> sum(kBlock);
  p.y = y.data();
  if (dtype == DType::f32) {
    p.x = {x.data(), kBlock};
  } else {
    p.x = {branch.data(), kBlock};
    p.residual = {x.data(), kBlock};
    p.sum = sum.data();
  }
  Worst worst;
  const uint64_t specials[] = {0x80000000, 0x7f800000, 0xff800000, 0x7fc00000, 0x7fffffff, 0xffffffff, 1, 0x80000001};
  for (uint64_t bits = begin; bits < end;) {
    int64_t n = 0;
    if (bits == begin)  // whatever the stride
      for (const uint64_t special : specials) x[n++] = std::bit_cast<float>(static_cast<uint32_t>(special));
    for (; n < kBlock && bits < end; bits += stride) x[n++] = std::bit_cast<float>(static_cast<uint32_t>(bits));
    p.d = n;
    kernels.forward(p, {no_gain.data()}, 0, 1);
    for (int64_t i = 0; i < n; ++i)  // x + 0 drops the sign of -0
      note(worst, cpu::widen(y[i]), static_cast<double>(a) * x[i], digits, smallest_exponent, dtype != DType::f32);
  }
  return worst;
}

// Rows of bf16: x of every number, a = 1 + i / scales for i in [begin, end).
Worst sweep_bfloat(const cpu::Kernels& kernels, int64_t begin, int64_t end, int64_t scales) {
  std::vector<cpu::bf16> x(kBlock), y(kBlock);
  for (int64_t i = 0; i < kBlock; ++i) x[i].bits = static_cast<uint16_t>(i);
  const std::vector<float> no_gain(kBlock, 1.0f);
  const float one = 1.0f;
  float lam;
  ForwardParams p;
  p.rows = 1, p.d = kBlock;
  p.branch = p.stream = DType::bf16;
  p.exact = false;
  p.lam = {&lam, DType::f32};
  p.variance = &one;
  p.kappa = 1, p.eps = 0;
  p.x = {x.data(), kBlock};
  p.y = y.data();
  Worst worst;
  for (int64_t i = begin; i < end; ++i) {
    lam = 1 + static_cast<float>(i) / static_cast<float>(scales);
    kernels.forward(p, {no_gain.data()}, 0, 1);
    for (int64_t j = 0; j < kBlock; ++j) note(worst, cpu::widen(y[j]), lam * cpu::widen(x[j]), 8, -133, false);
  }
  return worst;
}

// part(begin, end) in every thread's share of [0, all), a multiple of step.
template <typename Part>
bool check(const char* table, const char* name, double limit, uint64_t all, uint64_t step, Part part) {
  const unsigned threads = std::max(1u, std::thread::hardware_concurrency());
  const uint64_t share = (all / threads + step) / step * step;
  std::vector<Worst> found(threads);
  std::vector<std::thread> pool;
  for (unsigned i = 0; i < threads; ++i)
    pool.emplace_back([&, i] { found[i] = part(std::min(all, i * share), std::min(all, (i + 1) * share)); });
  for (auto& thread : pool) thread.join();
  Worst worst;
  for (const auto& w : found) {
    worst.wrong_specials += w.wrong_specials;
    if (w.ulps > worst.ulps) worst.ulps = w.ulps, worst.at = w.at;
  }
  const bool ok = worst.ulps <= limit && worst.wrong_specials == 0;
  std::printf("%-8s %-9s  %.4f ulp at %a (limit %.2f), %ld wrong special values  %s\n", table, name, worst.ulps,
              worst.at, limit, worst.wrong_specials, ok ? "ok" : "FAILED");
  std::fflush(stdout);
  return ok;
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t stride = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1;
  bool ok = true;
  for (const cpu::Kernels* table : cpu::runnable_kernels()) {
    const auto& kernels = *table;
    if (argc > 2 && std::strcmp(argv[2], kernels.name) != 0) continue;
    const uint64_t all = uint64_t{1} << 32, scales = std::max<uint64_t>(1, kBlock / stride);
    const auto floats = [&]<typename T>(T, DType dtype, const char* name, int digits, int smallest, double limit) {
      ok &= check(kernels.name, name, limit, all, stride, [&](uint64_t begin, uint64_t end) {
        return sweep<T>(kernels, dtype, digits, smallest, begin, end, stride);
      });
    };
    floats(float{}, DType::f32, "f32", 24, -149, 2.5);
    ok &= check(kernels.name, "f32 rows", 2.5, all, stride * 16, [&](uint64_t begin, uint64_t end) {
      Worst worst;
      for (const float a : {0x1p-20f, 0x1p-9f, 0x1.19999ap-7f, 0.2f, 0x1.6a09e6p0f, -7.3f, 157.0f, 0x1p9f, 0x1p60f}) {
        const Worst found = sweep<float>(kernels, DType::f32, 24, -149, begin, end, stride * 16, a);
        worst.wrong_specials += found.wrong_specials;
        if (found.ulps > worst.ulps) worst.ulps = found.ulps, worst.at = found.at;
      }
      return worst;
    });
    floats(cpu::bf16{}, DType::bf16, "bf16", 8, -133, 0.55);
    floats(cpu::f16{}, DType::f16, "f16", 11, -24, 0.55);
    ok &= check(kernels.name, "bf16 rows", 0.55, scales, 1, [&](uint64_t begin, uint64_t end) {
      return sweep_bfloat(kernels, begin, end, scales);
    });
  }
  return ok ? 0 : 1;
}
