// Calls of a backward on the host: their inputs, how they are run, and their outputs against float64.
#pragma once

#include "backward.cu"
#include "backward_one_launch.cu"
#include "backward_ring.cu"

#include "rows.h"

// What find_ticket() gives, and how often it is asked.
inline int ticket_given = 0, tickets_asked = 0;

cudaError_t bhyt::cuda::find_ticket(int, cudaStream_t, int* ticket) {
  ++tickets_asked;
  *ticket = ticket_given;
  return cudaSuccess;
}

using namespace bhyt;
using rows::check;
using rows::Tensor;

namespace {

struct Wanted {
  bool x = true, variance = true, weight = true, lam = true;
};

struct Case {
  int64_t rows = 3, d = 64;
  DType branch = DType::f32, stream = DType::f32;
  bool exact = true, grad_sum = false, grad_variance = false;
  int weight = int(DType::f32);  // a DType, or -1: none
  DType lam = DType::f32;
  int offset_dtype = -1;
  int64_t x_offset = 0, pad = 0;
  bool clusters = true, expanded_grad_y = false;
  int multiprocessors = 2;
  int64_t shared_bytes = 48 << 10;
  double lam_value = 2.0;
  Wanted wanted;
  simt::Order order = simt::Order::ascending;
  cuda::BackwardVariant variant = cuda::BackwardVariant::two_launches;

  std::string text() const {
    char s[256];
    std::snprintf(s, sizeof s,
                  "%s%s%s rows=%lld d=%lld %s/%s weight=%s offset=%lld pad=%lld clusters=%d order=%d wanted=",
                  exact ? "exact" : "approx", grad_sum ? "+grad_sum" : "", grad_variance ? "+grad_variance" : "",
                  static_cast<long long>(rows), static_cast<long long>(d), rows::name(branch), rows::name(stream),
                  weight < 0 ? "none" : rows::name(DType(weight)), static_cast<long long>(x_offset),
                  static_cast<long long>(pad), clusters, int(order));
    return std::string(s) + std::to_string(wanted.x) + std::to_string(wanted.variance) + std::to_string(wanted.weight) +
           std::to_string(wanted.lam);
  }
};

struct Inputs {
  Tensor x, grad_y, grad_sum, variance, grad_variance, weight, lam, offset;
};

// What a call costs: multiplications, numbers that lanes exchange, bytes of workspace.
struct Work {
  int64_t products = 0, shuffles = 0, bytes = 0;
};

struct Outputs {
  Tensor x, variance, weight, lam;
  Work work;
};

Inputs make_inputs(const Case& c) {
  Inputs in;
  in.x = rows::random_rows(c.stream, c.rows, c.d, 3 + c.d, c.d + c.pad, c.x_offset);
  in.grad_y = rows::random_rows(c.branch, c.expanded_grad_y ? 1 : c.rows, c.d, 4 + c.d, c.d + c.pad, c.x_offset);
  if (c.expanded_grad_y) in.grad_y.stride = 0;
  if (c.grad_sum) in.grad_sum = rows::random_rows(c.stream, c.rows, c.d, 5 + c.d, c.d + c.pad, c.x_offset);
  in.variance = Tensor(accumulate_dtype(c.stream), c.rows, 1);
  for (int64_t row = 0; row < c.rows; ++row) {
    double v = 0;
    for (int64_t i = 0; i < c.d; ++i) {
      v += in.x.get(row, i) * in.x.get(row, i) / c.d;
      if (!c.expanded_grad_y)  // gradients that lean one way, so that the sums over rows don't cancel
        in.grad_y.set(row, i, in.grad_y.get(row, i) + 0.3 * in.x.get(row, i));
    }
    in.variance.set(row, 0, c.exact ? v : v * 1.1 + 0.01);
  }
  if (c.grad_variance) in.grad_variance = rows::random_rows(accumulate_dtype(c.stream), c.rows, 1, 6);
  if (c.weight >= 0) {
    in.weight = Tensor(DType(c.weight), 1, c.d, -1, c.x_offset);
    for (int64_t i = 0; i < c.d; ++i) in.weight.set(0, i, 1 + 0.5 * std::sin(double(i)));
  }
  in.lam = Tensor(c.lam, 1, 1);
  in.lam.set(0, 0, c.lam_value);
  if (c.offset_dtype >= 0) {
    in.offset = Tensor(DType(c.offset_dtype), 1, 1);
    in.offset.set(0, 0, 0.125);
  }
  return in;
}

Outputs run(const Case& c, const Inputs& in) {
  Outputs out;
  BackwardParams p;
  p.rows = c.rows, p.d = c.d, p.branch = c.branch, p.stream = c.stream, p.exact = c.exact;
  if (in.weight) p.weight = in.weight.values();
  p.lam = in.lam.values();
  if (in.offset) p.offset = in.offset.values();
  p.x = in.x.view();
  p.grad_y = in.grad_y.view();
  if (in.grad_sum) p.grad_sum = in.grad_sum.view();
  p.variance = in.variance.data();
  if (in.grad_variance) p.grad_variance = in.grad_variance.data();
  if (c.wanted.x) p.grad_x = (out.x = Tensor(c.stream, c.rows, c.d)).data();
  if (c.wanted.variance && !c.exact)
    p.grad_variance_out = (out.variance = Tensor(accumulate_dtype(c.stream), c.rows, 1)).data();
  if (c.wanted.weight && in.weight) p.grad_weight = (out.weight = Tensor(in.weight.dtype, 1, c.d)).data();
  if (c.wanted.lam) p.grad_lam = (out.lam = Tensor(c.lam, 1, 1)).data();
  // What serves none of these lies where nobody may read.
  void* const nowhere = reinterpret_cast<void*>(4096);
  if (!p.grad_x && in.grad_sum) p.grad_sum.data = nowhere;
  if (!p.grad_x && in.grad_variance) p.grad_variance = nowhere;
  if (!p.grad_x && !p.grad_lam && !p.grad_variance_out && in.weight) p.weight.data = nowhere;

  simt::machine().order = c.order;
  cuda::Device device;
  device.multiprocessors = c.multiprocessors;
  device.hopper_or_later = c.clusters;
  if (c.clusters)
    for (int i = 1; i < cuda::kClusterSizes; ++i) device.resident_clusters[i] = 2;
  device.shared_bytes = c.shared_bytes;
  const int64_t bytes = cuda::backward_workspace(p, device);
  Tensor workspace(DType::f32, 1, bytes / 4);
  simt::machine().products = simt::machine().shuffles = 0;
  check(cuda::backward(p, workspace.data(), device, {}, c.variant) == cudaSuccess, "returns success: " + c.text());
  bool held = workspace.guards_hold();
  for (const Tensor* t : {&out.x, &out.variance, &out.weight, &out.lam}) held &= !*t || t->guards_hold();
  out.work = {simt::machine().products, simt::machine().shuffles, bytes};
  check(held, "writes within its outputs: " + c.text());
  return out;
}

// Sums of squares of a result's error, of the error of rounding the right result, and of the right result.
struct Error {
  double error = 0, rounding = 0, size = 0;
  bool bad = false;

  void add(double got, double right, DType dtype) {
    if (std::isnan(got) != std::isnan(right)) bad = true;
    if (std::isnan(right)) return;
    error += (got - right) * (got - right);
    const double r = rows::rounded(right, dtype) - right;
    rounding += r * r;
    size += right * right;
  }
  // `relative` for the arithmetic, and 1.1 times what rounding alone costs
  bool within(double relative, DType dtype) const {
    const double allowed = relative * std::sqrt(size) + (bhyt::size_of(dtype) == 2 ? 1.1 : 1.0) * std::sqrt(rounding);
    return !bad && std::sqrt(error) <= allowed;
  }
};

void compare(const Case& c, const Inputs& in, const Outputs& out) {
  const bool f64 = c.stream == DType::f64;
  const double relative_x = f64 ? 1e-14 : size_of(c.stream) == 2 ? 0 : 2e-6, relative = f64 ? 1e-14 : 1e-5;
  std::vector<double> grad_weight(c.d, 0.);
  double grad_lam = 0, lam_size = 0;
  for (int64_t row = 0; row < c.rows; ++row) {
    const double shifted = in.variance.get(row, 0) + (in.offset ? in.offset.get(0, 0) : 0.) + 1e-6;
    const double per_lam = 1 / (10 * std::sqrt(shifted)), a = in.lam.get(0, 0) * per_lam;
    double s = 0, size = 0;
    std::vector<double> g(c.d);
    for (int64_t i = 0; i < c.d; ++i) {
      const double x = in.x.get(row, i), t = std::tanh(a * x), e = std::exp(-2 * std::fabs(a * x));
      const double dy = in.grad_y.get(row, i), w = in.weight ? in.weight.get(0, i) : 1.;
      g[i] = dy * w * 4 * e / ((1 + e) * (1 + e));
      s += g[i] * x;
      size += std::fabs(g[i] * x);
      grad_weight[i] += dy * t;
    }
    grad_lam += per_lam * s;
    lam_size += per_lam * size;
    if (out.x) {
      Error error;
      const double dv = in.grad_variance ? in.grad_variance.get(row, 0) : 0.;
      for (int64_t i = 0; i < c.d; ++i) {
        const double x = in.x.get(row, i), gs = in.grad_sum ? in.grad_sum.get(row, i) : 0.;
        const double through_v = c.exact ? -a * x * s / (c.d * shifted) + 2 * x * dv / c.d : 0.;
        error.add(out.x.get(row, i), a * g[i] + through_v + gs, c.stream);
      }
      check(error.within(relative_x, c.stream), "grad_x: " + c.text());
    }
    if (out.variance)
      check(std::fabs(out.variance.get(row, 0) + a * s / (2 * shifted)) <= relative * a * size / (2 * shifted),
            "grad_variance: " + c.text());
  }
  if (out.weight) {
    Error error;
    for (int64_t i = 0; i < c.d; ++i) error.add(out.weight.get(0, i), grad_weight[i], in.weight.dtype);
    check(error.within(relative, in.weight.dtype), "grad_weight: " + c.text());
  }
  if (out.lam) {
    const double right = c.d > 0 ? grad_lam : 0.;
    const double allowed = relative * lam_size + 0.51 * rows::ulp(right, c.lam);
    check(std::fabs(out.lam.get(0, 0) - right) <= allowed, "grad_lam: " + c.text());
  }
}

bool same(const Tensor& a, const Tensor& b) {
  if (!a || !b) return true;  // where one was not asked for
  for (int64_t row = 0; row < a.rows; ++row)
    if (!a.same_bits(b, row, row)) return false;
  return true;
}
bool same(const Outputs& a, const Outputs& b) {
  return same(a.x, b.x) && same(a.variance, b.variance) && same(a.weight, b.weight) && same(a.lam, b.lam);
}

}  // namespace
