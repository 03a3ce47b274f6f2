#include "composite.h"

#include <ATen/ATen.h>

#include "adapters.h"

namespace bhyt {
namespace {

Tensor accumulate(const Tensor& t) { return t.to(checks::accumulate_type(t.scalar_type())); }

// 1 / (kappa sqrt(v + eps)), [..., 1]: a is this times lam, and lam = 0 divides nothing.
Tensor scale_over_lam(const Tensor& variance, const OptionalTensor& offset, double kappa, double eps) {
  const Tensor v = offset ? variance + offset->to(variance.scalar_type()).reshape({}) : variance;
  return (v + eps).rsqrt() / kappa;
}

// y = weight * tanh(a x) in the accumulate dtype.
Tensor y_of(const Tensor& row, const Tensor& variance, const Site& s) {
  const Tensor a = s.lam.to(row.scalar_type()).reshape({}) * scale_over_lam(variance, s.offset, s.kappa, s.eps);
  Tensor y = (row * a).tanh();
  if (s.weight) y = y * s.weight->to(row.scalar_type());
  return y;
}

// q = saturate(round_half_even(y / scale) + zero_point); a NaN is zero_point, in float8 NaN.
Tensor quantize(const Tensor& y, const Quantized& to) {
  const Tensor scaled = y / to.scale;
  if (to.dtype == at::kFloat8_e4m3fn) return scaled.clamp(-448, 448);
  const int64_t lowest = checks::lowest(to.dtype) - to.zero_point;
  return scaled.round().nan_to_num(0).clamp(lowest, lowest + 255) + to.zero_point;
}

// The terms both backward formulas share, in the names of docs/mathematics.md:
//   t = tanh(a x),  g = grad_y weight (1 - t^2),  S = sum_i g_i x_i,  scale = a / lam
struct Terms {
  Tensor row, t, g, S, scale, a;

  explicit Terms(const SiteGradients& s)
      : row(accumulate(s.x)), scale(scale_over_lam(s.variance, s.offset, s.kappa, s.eps)) {
    const auto dtype = row.scalar_type();
    a = s.lam.to(dtype).reshape({}) * scale;
    const Tensor z = row * a;
    t = z.tanh();
    const Tensor r = (z.abs() * -2).sigmoid();  // 1 - t^2 = 4 r (1 - r) does not cancel for large |z|
    g = s.grad_y.to(dtype) * (r * (1 - r) * 4);
    if (s.weight) g = g * s.weight->to(dtype);
    S = (g * row).sum(-1, /*keepdim=*/true);
  }
};

Tensor grad_x_of(const SiteGradients& s, const Terms& k) {
  Tensor grad = k.a * k.g;
  if (s.exact) {
    Tensor per_row = k.a * k.S / (s.variance + s.eps);
    if (s.grad_variance) per_row = per_row - 2 * *s.grad_variance;
    grad = grad - k.row * (per_row / c10::Scalar(s.x.sym_size(-1)));
  }
  if (s.grad_sum) grad = grad + *s.grad_sum;
  return grad.to(s.x.scalar_type()).contiguous();
}

}  // namespace

// Writes into given memory where no kernel does: under functionalization, and on devices without kernels.
Outputs Composite::forward_into(const Site& s) {
  check(s);
  Site plain = s;
  plain.into.reset();
  const Outputs made = call_op(plain);
  for (const auto& [to, from] :
       {std::pair(s.into->y, made.y), {s.into->sum, made.sum}, {s.into->variance, made.variance}})
    if (from.defined()) to.copy_(from);
  return *s.into;
}

Outputs Composite::forward(const Site& s) {
  if (s.into) return forward_into(s);
  check(s);
  Outputs out;
  if (s.quantized && !s.variance) {
    // Sum and variance come from the op that is not quantised, so that their bits are the same everywhere: a device may
    // have kernels for that op and none for the quantised one.
    Site plain = s;
    plain.quantized.reset();
    out = call_op(plain);
  } else if (s.residual) {
    out.sum = (*s.residual + s.x).contiguous();
  }
  const Tensor row = accumulate(s.residual ? out.sum : s.x);
  if (!s.quantized && !s.variance) out.variance = row.square().mean(-1, /*keepdim=*/true);
  out.y = y_of(row, s.variance ? *s.variance : out.variance, s);
  if (s.quantized) out.y = quantize(out.y, *s.quantized);
  out.y = out.y.to(s.y_dtype()).contiguous();  // rounded once; contiguous, as Meta says of every output
  return out;
}

Gradients Composite::backward(const SiteGradients& s) {
  check(s);
  const Terms k(s);
  Gradients grads;
  if (s.wanted.x) grads.x = grad_x_of(s, k);
  // 1 / (v' + eps) = (kappa * scale)^2
  if (s.wanted.variance) grads.variance = k.a * k.S * (k.scale * s.kappa).square() * -0.5;
  if (s.wanted.weight && s.weight) {
    Tensor columns = s.grad_y.to(k.t.scalar_type()) * k.t;
    while (columns.dim() > 1) columns = columns.sum(0);
    grads.weight = columns.to(s.weight->scalar_type());
  }
  if (s.wanted.lam) grads.lam = (k.scale * k.S).sum().reshape_symint(s.lam.sym_sizes()).to(s.lam.scalar_type());
  return grads;
}

TORCH_LIBRARY_IMPL(bhyt, CompositeExplicitAutograd, m) { register_ops<Composite>(m); }
TORCH_LIBRARY_IMPL(bhyt, FuncTorchBatched, m) { register_ops<Composite>(m); }
TORCH_LIBRARY_IMPL(bhyt, Functionalize, m) { register_ops_into<Composite>(m); }

}  // namespace bhyt
