// The formula in plain ATen ops, differentiable to any order: what runs on devices without kernels of their own, under
// functorch transforms, with forward-mode tangents, and when a backward is itself differentiated.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <array>
#include <optional>
#include <tuple>

#include "checks.h"

namespace bhyt::composite {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Tensor mean_square(const Tensor& row) { return row.square().mean(-1, /*keepdim=*/true); }

// 1 / (kappa sqrt(v + eps)), [..., 1]: a is this times lam, and lam = 0 divides nothing.
inline Tensor scale_over_lam(const Tensor& variance, const OptionalTensor& offset, double kappa, double eps) {
  const Tensor v = offset ? variance + offset->to(variance.scalar_type()).reshape({}) : variance;
  return (v + eps).rsqrt() / kappa;
}

// y = weight * tanh(a x) in the accumulate dtype.
inline Tensor site_of(const Tensor& row, const Tensor& variance, const OptionalTensor& offset,
                      const OptionalTensor& weight, const Tensor& lam, double kappa, double eps) {
  const Tensor a = lam.to(row.scalar_type()).reshape({}) * scale_over_lam(variance, offset, kappa, eps);
  Tensor y = (row * a).tanh();
  if (weight) y = y * weight->to(row.scalar_type());
  return y;
}

// y rounded once to `dtype`; contiguous, as Meta says of every output.
inline Tensor apply_site(const Tensor& row, const Tensor& variance, const OptionalTensor& offset,
                         const OptionalTensor& weight, const Tensor& lam, double kappa, double eps,
                         at::ScalarType dtype) {
  return site_of(row, variance, offset, weight, lam, kappa, eps).to(dtype).contiguous();
}

inline Tensor accumulate(const Tensor& t) { return t.to(checks::accumulate_type(t.scalar_type())); }

inline std::tuple<Tensor, Tensor> forward(const Tensor& x, const OptionalTensor& weight, const Tensor& lam,
                                          double kappa, double eps) {
  checks::site(x, weight, lam, kappa, eps);
  const Tensor row = accumulate(x), variance = mean_square(row);
  return {apply_site(row, variance, {}, weight, lam, kappa, eps, x.scalar_type()), variance};
}

inline Tensor forward_approx(const Tensor& x, const Tensor& variance, const OptionalTensor& offset,
                             const OptionalTensor& weight, const Tensor& lam, double kappa, double eps) {
  checks::site(x, weight, lam, kappa, eps);
  checks::given_variance(x, variance, offset);
  return apply_site(accumulate(x), variance, offset, weight, lam, kappa, eps, x.scalar_type());
}

inline std::tuple<Tensor, Tensor, Tensor> add_forward(const Tensor& x, const Tensor& residual,
                                                      const OptionalTensor& weight, const Tensor& lam, double kappa,
                                                      double eps) {
  checks::residual(x, residual);
  checks::site(x, weight, lam, kappa, eps);
  const Tensor sum = (residual + x).contiguous(), row = accumulate(sum), variance = mean_square(row);
  return {apply_site(row, variance, {}, weight, lam, kappa, eps, x.scalar_type()), sum, variance};
}

inline std::tuple<Tensor, Tensor> add_forward_approx(const Tensor& x, const Tensor& residual, const Tensor& variance,
                                                     const OptionalTensor& offset, const OptionalTensor& weight,
                                                     const Tensor& lam, double kappa, double eps) {
  checks::residual(x, residual);
  checks::site(x, weight, lam, kappa, eps);
  checks::given_variance(residual, variance, offset);
  const Tensor sum = (residual + x).contiguous();
  return {apply_site(accumulate(sum), variance, offset, weight, lam, kappa, eps, x.scalar_type()), sum};
}

// q = saturate(round_half_even(y / scale) + zero_point); a NaN is zero_point, in float8 NaN.
inline Tensor quantize(const Tensor& y, double scale, int64_t zero_point, at::ScalarType dtype) {
  const Tensor scaled = y / scale;
  if (dtype == at::kFloat8_e4m3fn) return scaled.clamp(-448, 448).to(dtype).contiguous();
  const int64_t lowest = dtype == at::kChar ? -128 : 0;
  const Tensor q = scaled.round().nan_to_num(0).clamp(lowest - zero_point, lowest + 255 - zero_point) + zero_point;
  return q.to(dtype).contiguous();
}

inline Tensor forward_approx_quantized(const Tensor& x, const Tensor& variance, const OptionalTensor& offset,
                                       const OptionalTensor& weight, const Tensor& lam, double scale,
                                       int64_t zero_point, at::ScalarType dtype, double kappa, double eps) {
  checks::site(x, weight, lam, kappa, eps);
  checks::given_variance(x, variance, offset);
  checks::quantization(scale, zero_point, dtype);
  return quantize(site_of(accumulate(x), variance, offset, weight, lam, kappa, eps), scale, zero_point, dtype);
}

// Sum and variance are those of the device's own op, which has kernels where the quantised one may have none: the same
// bits everywhere.
inline std::tuple<Tensor, Tensor> forward_quantized(const Tensor& x, const OptionalTensor& weight, const Tensor& lam,
                                                    double scale, int64_t zero_point, at::ScalarType dtype,
                                                    double kappa, double eps) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("bhyt::forward", "").typed<decltype(forward)>();
  const Tensor variance = std::get<1>(op.call(x, weight, lam, kappa, eps));
  return {forward_approx_quantized(x, variance, {}, weight, lam, scale, zero_point, dtype, kappa, eps), variance};
}

inline std::tuple<Tensor, Tensor, Tensor> add_forward_quantized(const Tensor& x, const Tensor& residual,
                                                                const OptionalTensor& weight, const Tensor& lam,
                                                                double scale, int64_t zero_point, at::ScalarType dtype,
                                                                double kappa, double eps) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("bhyt::add_forward", "").typed<decltype(add_forward)>();
  const auto [y, sum, variance] = op.call(x, residual, weight, lam, kappa, eps);
  return {forward_approx_quantized(sum, variance, {}, weight, lam, scale, zero_point, dtype, kappa, eps), sum,
          variance};
}

inline std::tuple<Tensor, Tensor> add_forward_approx_quantized(const Tensor& x, const Tensor& residual,
                                                               const Tensor& variance, const OptionalTensor& offset,
                                                               const OptionalTensor& weight, const Tensor& lam,
                                                               double scale, int64_t zero_point, at::ScalarType dtype,
                                                               double kappa, double eps) {
  checks::residual(x, residual);
  const Tensor sum = (residual + x).contiguous();
  return {forward_approx_quantized(sum, variance, offset, weight, lam, scale, zero_point, dtype, kappa, eps), sum};
}

// The terms both backward formulas share, in SPEC names:
//   t = tanh(a x),  g = grad_y weight (1 - t^2),  S = sum_i g_i x_i,  scale = a / lam
struct Terms {
  Tensor row, t, g, S, scale, a;

  Terms(const Tensor& grad_y, const Tensor& x, const Tensor& variance, const OptionalTensor& offset,
        const OptionalTensor& weight, const Tensor& lam, double kappa, double eps)
      : row(accumulate(x)), scale(scale_over_lam(variance, offset, kappa, eps)) {
    const auto dtype = row.scalar_type();
    a = lam.to(dtype).reshape({}) * scale;
    const Tensor z = row * a;
    t = z.tanh();
    const Tensor r = (z.abs() * -2).sigmoid();  // 1 - t^2 = 4 r (1 - r) does not cancel for large |z|
    g = grad_y.to(dtype) * (r * (1 - r) * 4);
    if (weight) g = g * weight->to(dtype);
    S = (g * row).sum(-1, /*keepdim=*/true);
  }

  Tensor grad_weight(const Tensor& grad_y, const Tensor& weight) const {
    Tensor columns = grad_y.to(t.scalar_type()) * t;
    while (columns.dim() > 1) columns = columns.sum(0);
    return columns.to(weight.scalar_type());
  }

  Tensor grad_lam(const Tensor& lam) const {
    return (scale * S).sum().reshape_symint(lam.sym_sizes()).to(lam.scalar_type());
  }
};

inline std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_y, const OptionalTensor& grad_variance,
                                                   const OptionalTensor& grad_sum, const Tensor& x,
                                                   const Tensor& variance, const OptionalTensor& weight,
                                                   const Tensor& lam, double kappa, double eps,
                                                   std::array<bool, 3> output_mask) {
  checks::site(x, weight, lam, kappa, eps);
  checks::gradients(grad_y, grad_sum, x);
  checks::given_variance(x, variance, {});
  if (grad_variance) checks::per_row("grad_variance", *grad_variance, x);
  const Terms k(grad_y, x, variance, {}, weight, lam, kappa, eps);
  Tensor grad_x, grad_weight, grad_lam;
  if (output_mask[0]) {
    Tensor per_row = k.a * k.S / (variance + eps);
    if (grad_variance) per_row = per_row - 2 * *grad_variance;
    grad_x = k.a * k.g - k.row * (per_row / c10::Scalar(x.sym_size(-1)));
    if (grad_sum) grad_x = grad_x + *grad_sum;
    grad_x = grad_x.to(x.scalar_type()).contiguous();
  }
  if (output_mask[1] && weight) grad_weight = k.grad_weight(grad_y, *weight);
  if (output_mask[2]) grad_lam = k.grad_lam(lam);
  return {grad_x, grad_weight, grad_lam};
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> backward_approx(const Tensor& grad_y, const OptionalTensor& grad_sum,
                                                                  const Tensor& x, const Tensor& variance,
                                                                  const OptionalTensor& offset,
                                                                  const OptionalTensor& weight, const Tensor& lam,
                                                                  double kappa, double eps,
                                                                  std::array<bool, 4> output_mask) {
  checks::site(x, weight, lam, kappa, eps);
  checks::gradients(grad_y, grad_sum, x);
  checks::given_variance(x, variance, offset);
  const Terms k(grad_y, x, variance, offset, weight, lam, kappa, eps);
  Tensor grad_x, grad_variance, grad_weight, grad_lam;
  if (output_mask[0]) {
    grad_x = k.a * k.g;
    if (grad_sum) grad_x = grad_x + *grad_sum;
    grad_x = grad_x.to(x.scalar_type()).contiguous();
  }
  if (output_mask[1]) {
    // 1 / (v' + eps) = (kappa * scale)^2
    grad_variance = k.a * k.S * (k.scale * kappa).square() * -0.5;
  }
  if (output_mask[2] && weight) grad_weight = k.grad_weight(grad_y, *weight);
  if (output_mask[3]) grad_lam = k.grad_lam(lam);
  return {grad_x, grad_variance, grad_weight, grad_lam};
}

}  // namespace bhyt::composite
