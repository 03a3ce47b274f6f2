// Calls of the forward kernels as values, and what holds of every one, quantised or not.
#pragma once

#include <optional>
#include <string>

#include "launch.h"
#include "rows.h"

namespace forward_cases {

using namespace bhyt;
using rows::check;
using rows::Tensor;

struct Types {
  DType branch, stream;
};
constexpr Types kTypes[] = {{DType::f32, DType::f32},  {DType::bf16, DType::bf16}, {DType::f16, DType::f16},
                            {DType::bf16, DType::f32}, {DType::f16, DType::f32},   {DType::f64, DType::f64},
                            {DType::bf16, DType::f64}, {DType::f16, DType::f64},   {DType::f32, DType::f64}};

struct Case {
  int64_t rows = 3, d = 64;
  DType branch = DType::f32, stream = DType::f32;
  bool exact = true, residual = false;
  int weight = int(DType::f32);  // a DType, or -1: none
  DType lam = DType::f32;
  int offset_dtype = -1;  // of variance_offset
  int64_t x_offset = 0, pad = 0;  // storage offset and row padding, elements
  bool clusters = true;
  double lam_value = 2.0, kappa = 10.0;
  simt::Order order = simt::Order::ascending;
  std::optional<Quantization> quantization;
  int64_t y_offset = 0;

  std::string text() const {
    char s[256], q[64] = "";
    if (quantization)
      std::snprintf(q, sizeof q, " %s of y * %g + %d", rows::name(quantization->dtype), quantization->inverse_scale,
                    quantization->zero_point);
    std::snprintf(s, sizeof s, "%s%s rows=%lld d=%lld %s/%s weight=%s offset=%lld pad=%lld clusters=%d order=%d%s",
                  exact ? "exact" : "approx", residual ? "+residual" : "", static_cast<long long>(rows),
                  static_cast<long long>(d), rows::name(branch), rows::name(stream),
                  weight < 0 ? "none" : rows::name(DType(weight)), static_cast<long long>(x_offset),
                  static_cast<long long>(pad), clusters, int(order), q);
    return s;
  }
};

struct Inputs {
  Tensor x, residual, weight, lam, offset, variance;
};

struct Outputs {
  Tensor y, sum, variance;
};

inline Inputs make_inputs(const Case& c) {
  Inputs in;
  in.x = rows::random_rows(c.branch, c.rows, c.d, 1 + c.d, c.d + c.pad, c.x_offset);
  if (c.residual) in.residual = rows::random_rows(c.stream, c.rows, c.d, 2 + c.d, c.d + c.pad, c.x_offset);
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
  if (!c.exact) {
    in.variance = Tensor(accumulate_dtype(c.stream), c.rows, 1);
    for (int64_t row = 0; row < c.rows; ++row) in.variance.set(row, 0, row % 3 == 1 ? 0.01 : 0.9 + row);
  }
  return in;
}

// By `kernels`: cuda::forward or cuda::forward_quantized.
using Kernels = decltype(cuda::forward)*;

inline Outputs run(const Case& c, const Inputs& in, Kernels kernels = cuda::forward) {
  Outputs out;
  ForwardParams p;
  p.rows = c.rows, p.d = c.d, p.branch = c.branch, p.stream = c.stream, p.exact = c.exact;
  if (in.weight) p.weight = in.weight.values();
  p.lam = in.lam.values();
  if (in.offset) p.offset = in.offset.values();
  p.kappa = c.kappa;
  p.x = in.x.view();
  p.quantization = c.quantization;
  out.y = Tensor(c.quantization ? c.quantization->dtype : c.branch, c.rows, c.d, -1, c.y_offset);
  p.y = out.y.data();
  if (c.residual) {
    p.residual = in.residual.view();
    out.sum = Tensor(c.stream, c.rows, c.d);
    p.sum = out.sum.data();
  }
  if (c.exact) {
    out.variance = Tensor(accumulate_dtype(c.stream), c.rows, 1);
    p.variance_out = out.variance.data();
  } else {
    p.variance = in.variance.data();
  }
  simt::machine().order = c.order;
  cuda::Device device;
  device.multiprocessors = 4;
  device.hopper_or_later = c.clusters;
  if (c.clusters) device.resident_clusters[1] = device.resident_clusters[2] = device.resident_clusters[3] = 2;
  check(kernels(p, device, {}) == cudaSuccess, "returns success: " + c.text());
  check(out.y.guards_hold() && (!out.sum || out.sum.guards_hold()) && (!out.variance || out.variance.guards_hold()),
        "writes within its outputs: " + c.text());
  return out;
}

inline bool same(const Tensor& a, const Tensor& b) {
  if (!a || !b) return !a && !b;
  for (int64_t row = 0; row < a.rows; ++row)
    if (!a.same_bits(b, row, row)) return false;
  return true;
}
inline bool same(const Outputs& a, const Outputs& b) {
  return same(a.y, b.y) && same(a.sum, b.sum) && same(a.variance, b.variance);
}

// The same numbers elsewhere in memory, in another batch, on a device without clusters, in another order of threads.
inline void invariances(const Case& c, const Inputs& in, const Outputs& out, Kernels kernels = cuda::forward) {
  const auto moved = [&](int64_t pad, int64_t offset, int64_t first, int64_t count) {
    Inputs m;
    m.x = copy_of(in.x, c.d + pad, offset, first, count);
    if (in.residual) m.residual = copy_of(in.residual, c.d + pad, offset, first, count);
    if (in.weight) m.weight = copy_of(in.weight, -1, offset);
    m.lam = copy_of(in.lam, -1, 0);
    if (in.offset) m.offset = copy_of(in.offset, -1, 0);
    if (in.variance) m.variance = copy_of(in.variance, -1, 0, first, count);
    return m;
  };
  Case other = c;
  other.order = simt::Order::shuffled;
  check(same(run(other, in, kernels), out), "the same bits in another order of threads: " + c.text());
  other.order = simt::Order::descending;
  other.clusters = false;
  check(same(run(other, moved(3, 1, 0, c.rows), kernels), out),
        "the same bits unaligned and without clusters: " + c.text());
  other = c;
  other.rows = 1;
  const Outputs alone = run(other, moved(0, 0, c.rows - 1, 1), kernels);
  check(alone.y.same_bits(out.y, 0, c.rows - 1) && (!out.sum || alone.sum.same_bits(out.sum, 0, c.rows - 1)) &&
            (!c.exact || alone.variance.same_bits(out.variance, 0, c.rows - 1)),
        "the same bits alone and in a batch: " + c.text());
}

inline void empty(const std::optional<Quantization>& quantization = {}, Kernels kernels = cuda::forward) {
  for (bool exact : {true, false}) {
    Case c;
    c.exact = exact, c.rows = 0, c.quantization = quantization;
    const int64_t before = simt::machine().launches;
    run(c, make_inputs(c), kernels);
    check(simt::machine().launches == before, "no rows, no launch");
    c.rows = 3, c.d = 0;
    const Outputs out = run(c, make_inputs(c), kernels);
    if (exact) check(std::isnan(out.variance.get(1, 0)), "the mean of nothing is NaN");
  }
}

}  // namespace forward_cases
