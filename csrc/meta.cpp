// Shapes and dtypes without data, for symbolic sizes too. Checks are those of every other device.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>

#include "checks.h"
#include "registration.h"

namespace bhyt {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Tensor like(const Tensor& t) { return at::empty_symint(t.sym_sizes(), t.options()); }

Tensor like(const Tensor& t, double scale, int64_t zero_point, at::ScalarType dtype) {
  checks::quantization(scale, zero_point, dtype);
  return at::empty_symint(t.sym_sizes(), t.options().dtype(dtype));
}

Tensor variance_of(const Tensor& stream) {
  c10::SymDimVector sizes(stream.sym_sizes());
  sizes.back() = 1;
  return at::empty_symint(sizes, stream.options().dtype(checks::accumulate_type(stream.scalar_type())));
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const OptionalTensor& weight, const Tensor& lam, double kappa,
                                   double eps) {
  checks::site(x, weight, lam, kappa, eps);
  return {like(x), variance_of(x)};
}

Tensor forward_approx(const Tensor& x, const Tensor& variance, const OptionalTensor& offset,
                      const OptionalTensor& weight, const Tensor& lam, double kappa, double eps) {
  checks::site(x, weight, lam, kappa, eps);
  checks::given_variance(x, variance, offset);
  return like(x);
}

std::tuple<Tensor, Tensor, Tensor> add_forward(const Tensor& x, const Tensor& residual, const OptionalTensor& weight,
                                               const Tensor& lam, double kappa, double eps) {
  checks::residual(x, residual);
  checks::site(x, weight, lam, kappa, eps);
  return {like(x), like(residual), variance_of(residual)};
}

std::tuple<Tensor, Tensor> add_forward_approx(const Tensor& x, const Tensor& residual, const Tensor& variance,
                                              const OptionalTensor& offset, const OptionalTensor& weight,
                                              const Tensor& lam, double kappa, double eps) {
  checks::residual(x, residual);
  checks::site(x, weight, lam, kappa, eps);
  checks::given_variance(residual, variance, offset);
  return {like(x), like(residual)};
}

std::tuple<Tensor, Tensor> forward_quantized(const Tensor& x, const OptionalTensor& weight, const Tensor& lam,
                                             double scale, int64_t zero_point, at::ScalarType dtype, double kappa,
                                             double eps) {
  checks::site(x, weight, lam, kappa, eps);
  return {like(x, scale, zero_point, dtype), variance_of(x)};
}

Tensor forward_approx_quantized(const Tensor& x, const Tensor& variance, const OptionalTensor& offset,
                                const OptionalTensor& weight, const Tensor& lam, double scale, int64_t zero_point,
                                at::ScalarType dtype, double kappa, double eps) {
  checks::site(x, weight, lam, kappa, eps);
  checks::given_variance(x, variance, offset);
  return like(x, scale, zero_point, dtype);
}

std::tuple<Tensor, Tensor, Tensor> add_forward_quantized(const Tensor& x, const Tensor& residual,
                                                         const OptionalTensor& weight, const Tensor& lam, double scale,
                                                         int64_t zero_point, at::ScalarType dtype, double kappa,
                                                         double eps) {
  checks::residual(x, residual);
  checks::site(x, weight, lam, kappa, eps);
  return {like(x, scale, zero_point, dtype), like(residual), variance_of(residual)};
}

std::tuple<Tensor, Tensor> add_forward_approx_quantized(const Tensor& x, const Tensor& residual, const Tensor& variance,
                                                        const OptionalTensor& offset, const OptionalTensor& weight,
                                                        const Tensor& lam, double scale, int64_t zero_point,
                                                        at::ScalarType dtype, double kappa, double eps) {
  checks::residual(x, residual);
  checks::site(x, weight, lam, kappa, eps);
  checks::given_variance(residual, variance, offset);
  return {like(x, scale, zero_point, dtype), like(residual)};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_y, const OptionalTensor& grad_variance,
                                            const OptionalTensor& grad_sum, const Tensor& x, const Tensor& variance,
                                            const OptionalTensor& weight, const Tensor& lam, double kappa, double eps,
                                            std::array<bool, 3> output_mask) {
  checks::site(x, weight, lam, kappa, eps);
  checks::gradients(grad_y, grad_sum, x);
  checks::given_variance(x, variance, {});
  if (grad_variance) checks::per_row("grad_variance", *grad_variance, x);
  return {output_mask[0] ? like(x) : Tensor(), output_mask[1] && weight ? like(*weight) : Tensor(),
          output_mask[2] ? like(lam) : Tensor()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_approx(const Tensor& grad_y, const OptionalTensor& grad_sum,
                                                           const Tensor& x, const Tensor& variance,
                                                           const OptionalTensor& offset, const OptionalTensor& weight,
                                                           const Tensor& lam, double kappa, double eps,
                                                           std::array<bool, 4> output_mask) {
  checks::site(x, weight, lam, kappa, eps);
  checks::gradients(grad_y, grad_sum, x);
  checks::given_variance(x, variance, offset);
  return {output_mask[0] ? like(x) : Tensor(), output_mask[1] ? like(variance) : Tensor(),
          output_mask[2] && weight ? like(*weight) : Tensor(), output_mask[3] ? like(lam) : Tensor()};
}

}  // namespace

TORCH_LIBRARY_IMPL(bhyt, Meta, m) {
  if (!registers_ops()) return;
  m.impl("forward", forward);
  m.impl("forward_approx", forward_approx);
  m.impl("add_forward", add_forward);
  m.impl("add_forward_approx", add_forward_approx);
  m.impl("forward_quantized.explicit", forward_quantized);
  m.impl("forward_approx_quantized.explicit", forward_approx_quantized);
  m.impl("add_forward_quantized.explicit", add_forward_quantized);
  m.impl("add_forward_approx_quantized.explicit", add_forward_approx_quantized);
  m.impl("backward", backward);
  m.impl("backward_approx", backward_approx);
}

}  // namespace bhyt
