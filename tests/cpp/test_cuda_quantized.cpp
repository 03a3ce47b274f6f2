// The quantised forward kernels' source on the host: the integers of float64 arithmetic, and the bits of the sums and
// variances of the unquantised ones.
#include "forward.cu"
#include "forward_quantized.cu"

#include "forward_cases.h"

using namespace bhyt;
using namespace forward_cases;
using rows::check;
using rows::Tensor;

namespace {

constexpr auto kQuantized = cuda::forward_quantized;

// dtype, 1 / scale, zero point: those of use, some that saturate, some that are fine.
const Quantization kTargets[] = {{DType::i8, 127, 0},    {DType::u8, 127, 128}, {DType::i8, 1 / 3e-3, -77},
                                 {DType::u8, 100, 3},    {DType::f8, 448, 0},   {DType::f8, 1, 0},
                                 {DType::f8, 1000, 0},   {DType::i8, 3, 127},   {DType::u8, 0x1p126, 1},
                                 {DType::i8, 0x1p-126, 5}};

// Between q and its next: 1, or for float8, 8 to a power of two from 2^-6 on.
double step_at(double scaled, DType dtype) {
  if (dtype != DType::f8) return 1;
  int e = 0;
  std::frexp(scaled, &e);
  return std::ldexp(1., std::max(e, -5) - 4);
}

// The formula in float64 on the stored inputs: q is the nearest number, or either neighbour within 1e-4 of a tie.
void compare(const Case& c, const Inputs& in, const Outputs& out) {
  const Quantization& target = *c.quantization;
  for (int64_t row = 0; row < c.rows; ++row) {
    const auto stream = [&](int64_t i) { return c.residual ? out.sum.get(row, i) : in.x.get(row, i); };
    double v = 0;
    for (int64_t i = 0; i < c.d; ++i) v += stream(i) * stream(i);
    v = c.exact ? v / c.d : in.variance.get(row, 0);
    const double a = in.lam.get(0, 0) / (c.kappa * std::sqrt(v + (in.offset ? in.offset.get(0, 0) : 0.) + 1e-6));
    double worst = 0;
    for (int64_t i = 0; i < c.d; ++i) {
      const double y = (in.weight ? in.weight.get(0, i) : 1.) * std::tanh(a * stream(i));
      const double q = out.y.get(row, i) - target.zero_point;
      if (std::isnan(y)) {
        check(target.dtype == DType::f8 ? std::isnan(q) : q == 0, "NaN: " + c.text());
        continue;
      }
      const double lowest = target.lowest() - target.zero_point, highest = target.highest() - target.zero_point;
      const double scaled = std::min(std::max(y * target.inverse_scale, lowest), highest);
      worst = std::fmax(worst, std::isnan(q) ? INFINITY : std::fabs(q - scaled) / step_at(scaled, target.dtype));
    }
    if (worst > 0.5 + 1e-4) std::printf("  row %lld: %.5f steps\n", static_cast<long long>(row), worst);
    check(worst <= 0.5 + 1e-4, "q: " + c.text());
  }
}

// Sum and variance of the unquantised kernels; the same q from the exact site's variance, from the sum, and on a device
// that rounds to float8 by integers.
void relations(const Case& c, const Inputs& in, const Outputs& out) {
  Case plain = c;
  plain.quantization.reset();
  const Outputs unquantized = run(plain, in);
  check(same(unquantized.sum, out.sum) && same(unquantized.variance, out.variance), "sum and variance: " + c.text());
  simt::machine().has_float8 = false;
  check(same(run(c, in, kQuantized), out), "without an instruction for float8: " + c.text());
  simt::machine().has_float8 = true;
  if (!c.exact) return;
  Inputs given;
  given.x = c.residual ? copy_of(out.sum, -1, 0) : copy_of(in.x, -1, 0);
  if (in.weight) given.weight = copy_of(in.weight, -1, 0);
  given.lam = copy_of(in.lam, -1, 0);
  given.variance = copy_of(out.variance, -1, 0);
  Case approx = c;
  approx.exact = approx.residual = false;
  approx.branch = c.stream, approx.x_offset = approx.pad = approx.y_offset = 0;
  check(same(run(approx, given, kQuantized).y, out.y), "from the sum and its variance: " + c.text());
}

void test(const Case& c, bool all = true) {
  const Inputs in = make_inputs(c);
  const Outputs out = run(c, in, kQuantized);
  compare(c, in, out);
  if (!all) return;
  invariances(c, in, out, kQuantized);
  relations(c, in, out);
}

// Rows of one column each are as good as any: |y| = 1 exactly, times gains that leave halves.
void ties() {
  for (DType dtype : {DType::f32, DType::f64})
    for (bool float8 : {false, true})
      for (int zero : {0, 1, -2}) {
        if (float8 && zero) continue;
        Case c;
        c.rows = 1, c.d = 8, c.branch = c.stream = dtype, c.lam_value = 1e6;
        c.quantization = {float8 ? DType::f8 : DType::i8, 1, zero};
        Inputs in = make_inputs(c);
        const double gains[] = {2.5, 1.5, 0.5, 1.0625, 1.1875, 3.5, 1, 0.125};
        for (int64_t i = 0; i < c.d; ++i) in.x.set(0, i, i % 2 ? -1e4 : 1e4), in.weight.set(0, i, gains[i]);
        const Outputs out = run(c, in, kQuantized);
        const double integers[] = {2, -2, 0, -1, 1, -4, 1, 0}, eighths[] = {2.5, -1.5, 0.5, -1, 1.25, -3.5, 1, -0.125};
        for (int64_t i = 0; i < c.d; ++i)
          check(out.y.get(0, i) == (float8 ? eighths[i] : integers[i] + zero), "ties go to even: " + c.text());
      }
}

// NaN and infinity stay in their row, and gains that are not finite in their column.
void non_finite(DType dtype, bool residual, const Quantization& target) {
  Case c;
  c.rows = 5, c.d = 96, c.branch = c.stream = dtype, c.residual = residual, c.quantization = target;
  for (int weight : {-1, int(dtype)}) {
    c.weight = weight;
    const Inputs good = make_inputs(c);
    const Outputs expected = run(c, good, kQuantized);
    for (double poison : {double(NAN), double(INFINITY), double(-INFINITY)}) {
      Inputs in = make_inputs(c);
      in.x.set(2, 17, poison);
      const Outputs out = run(c, in, kQuantized);
      compare(c, in, out);
      for (int64_t row : {0, 1, 3, 4}) check(out.y.same_bits(expected.y, row, row), "stays in its row: " + c.text());
      if (weight < 0) continue;
      in = make_inputs(c);
      in.weight.set(0, 5, poison);
      compare(c, in, run(c, in, kQuantized));
    }
  }
}

void zero_rows(const Quantization& target) {
  Case c;
  c.rows = 2, c.d = 40, c.quantization = target;
  Inputs in = make_inputs(c);
  for (int64_t i = 0; i < c.d; ++i) in.x.set(0, i, 0);
  const Outputs out = run(c, in, kQuantized);
  for (int64_t i = 0; i < c.d; ++i) check(out.y.get(0, i) == target.zero_point, "a zero row is zero_point");
}

// Every tie is approached: arguments of tanh up to 2, over the scale by which 127 steps end at 1 or at 2.
void many_values() {
  for (DType dtype : {DType::f32, DType::bf16})
    for (double bound : {1., 2.})
      for (DType q : {DType::i8, DType::f8}) {
        Case c;
        c.rows = 64, c.d = 4096, c.branch = c.stream = dtype, c.exact = false;
        c.weight = -1, c.kappa = 1, c.lam_value = 1;
        c.quantization = {q, 127 / std::tanh(bound), 0};
        Inputs in = make_inputs(c);
        for (int64_t row = 0; row < c.rows; ++row) {
          in.variance.set(row, 0, 1);
          for (int64_t i = 0; i < c.d; ++i) in.x.set(row, i, (row * c.d + i - 131072) / 65536.);
        }
        compare(c, in, run(c, in, kQuantized));
      }
}

}  // namespace

int main() {
  int turn = 0;
  for (const Types& t : kTypes)
    for (bool exact : {true, false})
      for (bool residual : {false, true}) {
        if (!residual && t.branch != t.stream) continue;
        for (int64_t d : {1, 7, 8, 32, 64, 127, 128, 768, 1000, 2048, 3584}) {
          Case c;
          c.branch = t.branch, c.stream = t.stream, c.exact = exact, c.residual = residual, c.d = d;
          const int weights[] = {-1, int(t.branch), -1, int(DType::f32), -1, int(DType::f64), int(DType::f16)};
          c.weight = weights[turn % 7];
          c.quantization = kTargets[turn % std::size(kTargets)];
          c.lam_value = turn % 4 == 3 ? 30 : 2;
          c.lam = DType(turn % 4), c.offset_dtype = exact ? -1 : turn % 5 - 1;
          c.rows = d < 1000 ? 9 : 2;
          ++turn;
          test(c, turn % 2);
        }
        for (int64_t y_offset : {1, 2, 4, 8}) {  // where y alone is off a pack
          Case c;
          c.branch = t.branch, c.stream = t.stream, c.exact = exact, c.residual = residual, c.d = 96, c.rows = 2;
          c.weight = -1, c.y_offset = y_offset, c.quantization = kTargets[y_offset % 3];
          test(c, false);
        }
      }
  for (const Types& t : {kTypes[0], kTypes[1], kTypes[3]})  // long rows: several parts, clusters, loops
    for (bool residual : {false, true}) {
      if (!residual && t.branch != t.stream) continue;
      for (int64_t d : {20000, 131072}) {
        Case c;
        c.branch = t.branch, c.stream = t.stream, c.residual = residual, c.d = d, c.rows = 1;
        c.weight = -1, c.quantization = kTargets[residual ? 1 : 4];
        test(c, d == 20000);
        c.exact = false;
        test(c, false);
      }
    }
  for (const Quantization& target : kTargets) {
    for (bool residual : {false, true})
      for (DType dtype : {DType::f32, DType::bf16, DType::f64}) non_finite(dtype, residual, target);
    zero_rows(target);
  }
  ties();
  many_values();
  empty(kTargets[0], kQuantized);
  return rows::report("quantized");
}
