// One call of an op as a value: every forward is a Site, every backward a SiteGradients. Both own nothing: the tensors
// are the caller's. check() checks the arguments of a call, in one order for every device.
#pragma once

#include "checks.h"

namespace bhyt {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline const OptionalTensor kNone;

// How a call asks for y in eight bits, in the names of the schemas.
struct Quantized {
  double scale;
  int64_t zero_point;
  at::ScalarType dtype;
};

// The numbers that a backward takes over from its forward. All are doubles: a node of the graph saves them as an array.
struct Numbers {
  double kappa, eps;
};

// sum: with a residual only; variance: of exact sites only.
struct Outputs {
  Tensor y, sum, variance;
};

struct Site : Numbers {
  const Tensor& x;
  const Tensor* residual;  // null: nothing is added
  const Tensor* variance;  // null: the site is exact
  const OptionalTensor& offset;
  const OptionalTensor& weight;
  const Tensor& lam;
  std::optional<Quantized> quantized;
  std::optional<Outputs> into;  // the caller's memory for the outputs, else it is made

  // The sum, and the row whose statistics count, have the dtype of this tensor.
  const Tensor& stream() const { return residual ? *residual : x; }
  at::ScalarType y_dtype() const { return quantized ? quantized->dtype : x.scalar_type(); }
};

struct SiteGradients : Numbers {
  const Tensor& grad_y;
  const OptionalTensor& grad_variance;  // of exact sites only
  const OptionalTensor& grad_sum;
  const Tensor& x;  // what the forward took, or its sum
  const Tensor& variance;
  const OptionalTensor& offset;
  const OptionalTensor& weight;
  const Tensor& lam;
  bool exact;

  struct {
    bool x, variance, weight, lam;  // variance: of approximate sites only
  } wanted;
};

// A gradient that is not wanted is undefined.
struct Gradients {
  Tensor x, variance, weight, lam;
};

inline void check(const Site& s) {
  if (s.residual) checks::residual(s.x, *s.residual);
  checks::site(s.x, s.weight, s.lam, s.kappa, s.eps);
  if (s.variance) checks::given_variance(s.stream(), *s.variance, s.offset);
  if (s.quantized) checks::quantization(s.quantized->scale, s.quantized->zero_point, s.quantized->dtype);
  if (!s.into) return;
  const auto& [y, sum, variance] = *s.into;
  checks::output("y", y, s.x, s.y_dtype());
  if (s.residual) checks::output("sum", sum, s.x, s.stream().scalar_type());
  if (!s.variance) checks::output_per_row("variance", variance, s.stream());
}

inline void check(const SiteGradients& s) {
  checks::site(s.x, s.weight, s.lam, s.kappa, s.eps);
  checks::gradients(s.grad_y, s.grad_sum, s.x);
  checks::given_variance(s.x, s.variance, s.offset);
  if (s.grad_variance) checks::per_row("grad_variance", *s.grad_variance, s.x);
}

}  // namespace bhyt
