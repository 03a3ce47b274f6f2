// Runs every float, or every STRIDE-th, through the forward kernel of each instruction set with a = 1 and no gain, so
// that y = tanh(x), and reports the largest error in ulps of the output's dtype. Exits 1 above the contract.
//
//   tanh_sweep [STRIDE [TIER]]     STRIDE 1 (the default) takes all 2^32 floats: half an hour of CPU time
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

template <typename T>
Worst sweep(const cpu::Kernels& kernels, DType dtype, int digits, int smallest_exponent, uint64_t begin, uint64_t end,
            uint64_t stride) {
  std::vector<float> x(kBlock), no_gain(kBlock, 1.0f);
  std::vector<T> y(kBlock);
  const float one = 1.0f;
  ForwardParams p;
  p.rows = 1;
  p.branch = dtype;
  // A wide stream: float32 arguments for every output dtype would need a residual; the stream is then the sum.
  p.stream = DType::f32;
  p.exact = false;
  p.lam = {&one, DType::f32};
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
      for (const uint64_t special : specials) x[n++] = cpu::bit_cast<float>(static_cast<uint32_t>(special));
    for (; n < kBlock && bits < end; bits += stride) x[n++] = cpu::bit_cast<float>(static_cast<uint32_t>(bits));
    p.d = n;
    kernels.forward(p, no_gain.data(), 0, 1);
    for (int64_t i = 0; i < n; ++i) {
      const double given = cpu::widen(y[i]), exact = std::tanh(static_cast<double>(x[i]));
      const bool special_ok = std::isnan(exact) ? std::isnan(given)
                              : exact == 0      ? given == 0 && (std::signbit(given) == std::signbit(exact) ||
                                                            dtype != DType::f32)  // x + 0 drops the sign of -0
                                                : std::fabs(given) <= 1;
      if (!special_ok) ++worst.wrong_specials;
      if (std::isnan(exact)) continue;
      const double error = std::fabs(given - exact) / ulp(exact, digits, smallest_exponent);
      if (!(error <= worst.ulps)) {
        worst.ulps = error;
        worst.at = x[i];
      }
    }
  }
  return worst;
}

template <typename T>
bool check(const cpu::Kernels& kernels, DType dtype, const char* name, int digits, int smallest_exponent, double limit,
           uint64_t stride) {
  const unsigned threads = std::max(1u, std::thread::hardware_concurrency());
  const uint64_t all = uint64_t{1} << 32, share = (all / threads + stride - 1) / stride * stride;
  std::vector<Worst> found(threads);
  std::vector<std::thread> pool;
  for (unsigned i = 0; i < threads; ++i)
    pool.emplace_back([&, i] {
      found[i] = sweep<T>(kernels, dtype, digits, smallest_exponent, i * share, std::min(all, (i + 1) * share), stride);
    });
  for (auto& thread : pool) thread.join();
  Worst worst;
  for (const auto& w : found) {
    worst.wrong_specials += w.wrong_specials;
    if (w.ulps > worst.ulps) worst.ulps = w.ulps, worst.at = w.at;
  }
  const bool ok = worst.ulps <= limit && worst.wrong_specials == 0;
  std::printf("%-8s %-5s  %.4f ulp at %a (limit %.2f), %ld wrong special values  %s\n", kernels.name, name, worst.ulps,
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
    ok &= check<float>(kernels, DType::f32, "f32", 24, -149, 2.5, stride);
    ok &= check<cpu::bf16>(kernels, DType::bf16, "bf16", 8, -133, 0.55, stride);
    ok &= check<cpu::f16>(kernels, DType::f16, "f16", 11, -24, 0.55, stride);
  }
  return ok ? 0 : 1;
}
