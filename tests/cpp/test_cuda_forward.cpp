// The forward kernels' source on the host, against float64.
#include "forward.cu"

#include "forward_cases.h"

using namespace bhyt;
using namespace forward_cases;
using rows::check;
using rows::Tensor;

namespace {

// The formula in float64 on the stored inputs; with the stored sum and, for approximate sites, the given variance.
void compare(const Case& c, const Inputs& in, const Outputs& out) {
  const double wide_limit = c.branch == c.stream ? 8 : 0.51;  // float64 arithmetic leaves fp32 only its rounding
  const double y_limit = c.branch == DType::f64 ? 16 : c.branch == DType::f32 ? wide_limit : 0.55;
  const double v_limit = c.stream == DType::f64 ? 1e-14 : 1e-6;
  for (int64_t row = 0; row < c.rows; ++row) {
    double v = 0;
    const auto stream = [&](int64_t i) { return c.residual ? out.sum.get(row, i) : in.x.get(row, i); };
    bool finite = true;
    for (int64_t i = 0; i < c.d; ++i) {
      if (c.residual) {
        const double sum = rows::rounded(in.x.get(row, i) + in.residual.get(row, i), c.stream);
        const double got = out.sum.get(row, i);
        check(got == sum || (std::isnan(got) && std::isnan(sum)), "sum: " + c.text());
      }
      finite &= std::isfinite(stream(i));
      v += stream(i) * stream(i);
    }
    v /= c.d;
    if (c.exact) {
      const double got = out.variance.get(row, 0);
      check(finite ? std::fabs(got - v) <= v_limit * v : !std::isfinite(got), "variance: " + c.text());
    } else {
      v = in.variance.get(row, 0);
    }
    const double shifted = v + (in.offset ? in.offset.get(0, 0) : 0.) + 1e-6;
    const double a = in.lam.get(0, 0) / (c.kappa * std::sqrt(shifted));
    double worst = 0;
    for (int64_t i = 0; i < c.d; ++i) {
      const double y = (in.weight ? in.weight.get(0, i) : 1.) * std::tanh(a * stream(i)), got = out.y.get(row, i);
      if (std::isnan(y) || std::isnan(got))
        worst = std::isnan(y) && std::isnan(got) ? worst : INFINITY;
      else
        worst = std::fmax(worst, std::fabs(got - y) / rows::ulp(y, c.branch));
    }
    if (worst > y_limit) std::printf("  row %lld: %.3f ulp\n", static_cast<long long>(row), worst);
    check(worst <= y_limit, "y: " + c.text());
  }
}

void relations(const Case& c, const Inputs& in, const Outputs& out) {
  if (!c.exact) return;
  if (c.residual) {  // the sum, taken as an input: same variance; same y when its dtype is the branch's
    Case plain = c;
    plain.residual = false, plain.branch = c.stream, plain.x_offset = plain.pad = 0;
    Inputs from_sum;
    from_sum.x = copy_of(out.sum, -1, 0);
    if (in.weight) from_sum.weight = copy_of(in.weight, -1, 0);
    from_sum.lam = copy_of(in.lam, -1, 0);
    const Outputs unfused = run(plain, from_sum);
    check(same(unfused.variance, out.variance), "fused and unfused variances: " + c.text());
    if (c.branch == c.stream) check(same(unfused.y, out.y), "fused and unfused y: " + c.text());
  }
  Case approx = c;  // given the variance: same y
  approx.exact = false;
  Inputs given;
  given.x = copy_of(in.x, c.d + c.pad, c.x_offset);
  if (c.residual) given.residual = copy_of(in.residual, c.d + c.pad, c.x_offset);
  if (in.weight) given.weight = copy_of(in.weight, -1, 0);
  given.lam = copy_of(in.lam, -1, 0);
  given.variance = copy_of(out.variance, -1, 0);
  check(same(run(approx, given).y, out.y), "approximate from the exact variance: " + c.text());
}

void test(const Case& c, bool with_invariances = true) {
  const Inputs in = make_inputs(c);
  const Outputs out = run(c, in);
  compare(c, in, out);
  if (!with_invariances) return;
  invariances(c, in, out);
  relations(c, in, out);
}

void non_finite(DType dtype, bool residual, double poison) {
  Case c;
  c.rows = 5, c.d = 96, c.branch = c.stream = dtype, c.residual = residual;
  Inputs in = make_inputs(c);
  in.x.set(2, 17, poison);
  const Outputs out = run(c, in);
  compare(c, in, out);
  check(std::isnan(out.y.get(2, 17)), "a non-finite element gives NaN: " + c.text());
  for (int64_t row = 0; row < c.rows; ++row)
    for (int64_t i = 0; row != 2 && i < c.d; ++i)
      check(std::isfinite(out.y.get(row, i)), "NaN stays in its row: " + c.text());
}

void zero_rows() {
  Case c;
  c.rows = 2, c.d = 40;
  Inputs in = make_inputs(c);
  for (int64_t i = 0; i < c.d; ++i) in.x.set(0, i, i % 2 ? -0. : 0.);
  const Outputs out = run(c, in);
  for (int64_t i = 0; i < c.d; ++i)
    check(out.y.get(0, i) == 0 && std::signbit(out.y.get(0, i)) == (i % 2 == 1), "zeros stay zeros of their sign");
}

}  // namespace

int main() {
  int turn = 0;
  for (const Types& t : kTypes)
    for (bool exact : {true, false})
      for (bool residual : {false, true}) {
        if (!residual && t.branch != t.stream) continue;
        Case c;
        c.branch = t.branch, c.stream = t.stream, c.exact = exact, c.residual = residual;
        for (int64_t d : {1, 7, 8, 48, 64, 127, 128, 256, 768, 1000, 1536, 2048, 3584}) {
          const DType weights[] = {t.branch, DType::f32, DType::f32, DType::f64, DType::bf16, DType::f16};
          c.weight = turn % 6 == 2 ? -1 : int(weights[turn % 6]);
          ++turn;
          c.d = d;
          c.rows = d < 1000 ? 11 : 3;
          c.lam = DType(turn % 4);
          c.offset_dtype = exact ? -1 : turn % 5 - 1;
          test(c);
        }
        c.rows = 2, c.d = 72;
        for (c.x_offset = 0; c.x_offset < 8; ++c.x_offset) c.pad = c.x_offset % 3 * 4, test(c, false);
        c.x_offset = 0;
        for (c.pad = 1; c.pad <= 4; ++c.pad) test(c, false);  // the first row is aligned, the second is not
      }

  for (const Types& t : {kTypes[0], kTypes[1], kTypes[3]})  // long rows: several parts, clusters, loops
    for (bool residual : {false, true}) {
      if (!residual && t.branch != t.stream) continue;
      for (int64_t d : {16384, 20000, 40001, 131072}) {
        Case c;
        c.branch = t.branch, c.stream = t.stream, c.residual = residual, c.d = d, c.rows = 2;
        c.weight = int(t.branch);
        const bool all = d == 20000 || (d == 131072 && t.stream == DType::bf16 && !residual);
        test(c, all);
        c.exact = false;
        test(c, false);
      }
    }
  {
    Case many;  // more blocks than the device has multiprocessors; several rows per thread
    many.exact = false, many.rows = 600, many.d = 520, many.branch = many.stream = DType::bf16;
    many.weight = int(DType::bf16);
    test(many);
    many.exact = true, many.d = 24, many.rows = 205;
    test(many);
    Case saturated;  // arguments of tanh far beyond 1
    saturated.d = 512, saturated.rows = 6, saturated.lam_value = 60;
    test(saturated);
    saturated.branch = saturated.stream = DType::f16;
    test(saturated);
    Case expanded;  // one row repeated
    expanded.rows = 4, expanded.d = 64, expanded.pad = -64;
    test(expanded, false);
    Case large;  // squares beyond fp16
    large.branch = large.stream = DType::f16, large.rows = 1, large.d = 256;
    Inputs in = make_inputs(large);
    for (int64_t i = 0; i < large.d; ++i) in.x.set(0, i, i % 2 ? 6e4 : -6e4);
    compare(large, in, run(large, in));
  }
  for (double poison : {double(NAN), double(INFINITY), double(-INFINITY)})
    for (bool residual : {false, true})
      for (DType dtype : {DType::f32, DType::bf16, DType::f16, DType::f64}) non_finite(dtype, residual, poison);
  zero_rows();
  empty();
  return rows::report("forward");
}
