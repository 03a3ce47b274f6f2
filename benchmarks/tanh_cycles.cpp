// Cycles per element of the approximate forward without a gain, y = tanh(a x), on one row in the nearest cache, for each
// instruction set. A cycle is what one step of a chain of dependent additions takes, measured beside it, so that the
// clock's changes cancel.
//
//   cmake --build build/cmake --target tanh_cycles && build/cmake/tanh_cycles
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <random>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/scalar.h"

using namespace bhyt;

namespace {

constexpr int64_t kElements = 2048;

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double seconds_per_cycle() {
  constexpr int kSteps = 2000000;
  uint64_t x = 1;
  const double start = seconds();
  for (int i = 0; i < kSteps; ++i) asm volatile("add %0, %0" : "+r"(x));
  return (seconds() - start) / kSteps;
}

template <typename T>
double cycles_per_element(const cpu::Kernels& kernels, DType dtype, double spread) {
  std::mt19937 random(0);
  std::normal_distribution<double> normal(0, spread);
  std::vector<T> x(kElements), y(kElements);
  for (auto& value : x) cpu::narrow(normal(random), &value);
  const float one = 1;
  ForwardParams p;
  p.rows = 1;
  p.d = kElements;
  p.branch = p.stream = dtype;
  p.exact = false;
  p.lam = {&one, DType::f32};
  p.variance = &one;
  p.kappa = 1;
  p.eps = 0;
  p.x = {x.data(), kElements};
  p.y = y.data();
  std::vector<double> samples;
  for (int sample = 0; sample < 101; ++sample) {
    constexpr int kCalls = 200;
    const double cycle = seconds_per_cycle(), start = seconds();
    for (int call = 0; call < kCalls; ++call) kernels.forward(p, nullptr, 0, 1);
    samples.push_back((seconds() - start) / (kCalls * kElements) / cycle);
  }
  std::nth_element(samples.begin(), samples.begin() + samples.size() / 2, samples.end());
  return samples[samples.size() / 2];
}

}  // namespace

int main() {
  std::printf("cycles per element, median      normal arguments of standard deviation\n");
  std::printf("%-12s %-5s %8s %8s %8s\n", "", "", "0.2", "1", "5");
  for (const cpu::Kernels* kernels : cpu::runnable_kernels()) {
    const auto row = [&](const char* name, auto type, DType dtype) {
      using T = decltype(type);
      std::printf("%-12s %-5s", kernels->name, name);
      for (const double spread : {0.2, 1.0, 5.0})
        std::printf(" %8.2f", cycles_per_element<T>(*kernels, dtype, spread));
      std::printf("\n");
    };
    row("f32", float(), DType::f32);
    row("bf16", cpu::bf16(), DType::bf16);
    row("f16", cpu::f16(), DType::f16);
  }
}
