// Autograd of the six ops. Three routes, chosen per call:
//   composite      a functorch transform or a forward-mode tangent is present, or a backward is differentiated in turn
//   below autograd nothing requires grad
//   Site           otherwise: the fused op, whose backward calls bhyt::backward through the dispatcher
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "composite.h"

namespace bhyt {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using c10::DispatchKeySet;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The op `name` with the signature of its composite, as the next dispatch key down sees it.
template <auto composite_op>
struct Op;

template <typename Return, typename... Args, Return (*composite_op)(Args...)>
struct Op<composite_op> {
  explicit Op(const char* name)
      : handle_(c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Return(Args...)>()) {}
  Return operator()(Args... args) const { return handle_.call(args...); }
  Return below(DispatchKeySet keys, Args... args) const {
    return handle_.redispatch(keys & c10::after_autograd_keyset, args...);
  }

 private:
  c10::TypedOperatorHandle<Return(Args...)> handle_;
};

const auto& forward_op() {
  static const Op<&composite::forward> op("bhyt::forward");
  return op;
}
const auto& forward_approx_op() {
  static const Op<&composite::forward_approx> op("bhyt::forward_approx");
  return op;
}
const auto& add_forward_op() {
  static const Op<&composite::add_forward> op("bhyt::add_forward");
  return op;
}
const auto& add_forward_approx_op() {
  static const Op<&composite::add_forward_approx> op("bhyt::add_forward_approx");
  return op;
}
const auto& backward_op() {
  static const Op<&composite::backward> op("bhyt::backward");
  return op;
}
const auto& backward_approx_op() {
  static const Op<&composite::backward_approx> op("bhyt::backward_approx");
  return op;
}

bool has_tangent(const Tensor& t) { return t.defined() && t._fw_grad(/*level=*/0).defined(); }
bool has_tangent(const OptionalTensor& t) { return t && has_tangent(*t); }
bool requires_grad(const Tensor& t) { return t.defined() && t.requires_grad(); }
bool requires_grad(const OptionalTensor& t) { return t && requires_grad(*t); }

bool inside_functorch_transform() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

template <typename... Tensors>
bool wants_composite(const Tensors&... tensors) {
  return inside_functorch_transform() || (has_tangent(tensors) || ...);
}

template <typename... Tensors>
bool wants_graph(const Tensors&... tensors) {
  return c10::GradMode::is_enabled() && (requires_grad(tensors) || ...);
}

OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

// Outputs are ordered as the schemas order them: y, sum (when adding), variance (when exact).
template <bool exact, bool adds>
struct Site : torch::autograd::Function<Site<exact, adds>> {
  static constexpr bool is_traceable = true;  // compiled autograd may trace through backward

  static variable_list forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& residual,
                               const OptionalTensor& variance, const OptionalTensor& offset,
                               const OptionalTensor& weight, const Tensor& lam, double kappa, double eps) {
    ctx->set_materialize_grads(false);
    ctx->saved_data["kappa"] = kappa;
    ctx->saved_data["eps"] = eps;
    at::AutoDispatchBelowADInplaceOrView below;
    variable_list outputs;
    Tensor row = x, row_variance = variance.value_or(Tensor());
    if constexpr (exact && adds) {
      auto [y, sum, v] = add_forward_op()(x, *residual, weight, lam, kappa, eps);
      row = sum;
      row_variance = v;
      outputs = {y, sum, v};
    } else if constexpr (exact) {
      auto [y, v] = forward_op()(x, weight, lam, kappa, eps);
      row_variance = v;
      outputs = {y, v};
    } else if constexpr (adds) {
      auto [y, sum] = add_forward_approx_op()(x, *residual, *variance, offset, weight, lam, kappa, eps);
      row = sum;
      outputs = {y, sum};
    } else {
      outputs = {forward_approx_op()(x, *variance, offset, weight, lam, kappa, eps)};
    }
    ctx->save_for_backward({row, row_variance, offset.value_or(Tensor()), weight.value_or(Tensor()), lam});
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &row = saved[0], &variance = saved[1], &lam = saved[4];
    const OptionalTensor offset = optional(saved[2]), weight = optional(saved[3]);
    const double kappa = ctx->saved_data["kappa"].toDouble(), eps = ctx->saved_data["eps"].toDouble();

    // Gradient edges exist only for the tensors that were given, in argument order.
    size_t edge = 0;
    const auto next_wanted = [&](bool given) { return given && ctx->needs_input_grad(edge++); };
    const bool for_x = next_wanted(true), for_residual = next_wanted(adds), for_variance = next_wanted(!exact);
    next_wanted(offset.has_value());
    const bool for_weight = next_wanted(weight.has_value()), for_lam = next_wanted(true);

    const Tensor grad_y = grads[0].defined() ? grads[0] : at::zeros({}, row.options()).expand_symint(row.sym_sizes());
    const OptionalTensor grad_sum = adds ? optional(grads[1]) : std::nullopt;
    const bool for_row = for_x || for_residual;
    Tensor grad_row, grad_variance, grad_weight, grad_lam;
    if constexpr (exact) {
      const OptionalTensor grad_variance_in = optional(grads[adds ? 2 : 1]);
      std::tie(grad_row, grad_weight, grad_lam) = backward_op()(grad_y, grad_variance_in, grad_sum, row, variance,
                                                                weight, lam, kappa, eps, {for_row, for_weight, for_lam});
    } else {
      std::tie(grad_row, grad_variance, grad_weight, grad_lam) =
          backward_approx_op()(grad_y, grad_sum, row, variance, offset, weight, lam, kappa, eps,
                               {for_row, for_variance, for_weight, for_lam});
    }
    // d(x + residual) is the same for both; the engine casts it to a narrower branch.
    return {for_x ? grad_row : Tensor(), for_residual ? grad_row : Tensor(), grad_variance, Tensor(),
            grad_weight, grad_lam, Tensor(), Tensor()};
  }
};

std::tuple<Tensor, Tensor> forward(DispatchKeySet keys, const Tensor& x, const OptionalTensor& weight,
                                   const Tensor& lam, double kappa, double eps) {
  if (wants_composite(x, weight, lam)) return composite::forward(x, weight, lam, kappa, eps);
  if (!wants_graph(x, weight, lam)) return forward_op().below(keys, x, weight, lam, kappa, eps);
  auto out = Site<true, false>::apply(x, OptionalTensor(), OptionalTensor(), OptionalTensor(), weight, lam, kappa, eps);
  return {std::move(out[0]), std::move(out[1])};
}

Tensor forward_approx(DispatchKeySet keys, const Tensor& x, const Tensor& variance, const OptionalTensor& offset,
                      const OptionalTensor& weight, const Tensor& lam, double kappa, double eps) {
  if (wants_composite(x, variance, weight, lam))
    return composite::forward_approx(x, variance, offset, weight, lam, kappa, eps);
  if (!wants_graph(x, variance, weight, lam))
    return forward_approx_op().below(keys, x, variance, offset, weight, lam, kappa, eps);
  return Site<false, false>::apply(x, OptionalTensor(), OptionalTensor(variance), offset, weight, lam, kappa, eps)[0];
}

std::tuple<Tensor, Tensor, Tensor> add_forward(DispatchKeySet keys, const Tensor& x, const Tensor& residual,
                                               const OptionalTensor& weight, const Tensor& lam, double kappa,
                                               double eps) {
  if (wants_composite(x, residual, weight, lam)) return composite::add_forward(x, residual, weight, lam, kappa, eps);
  if (!wants_graph(x, residual, weight, lam))
    return add_forward_op().below(keys, x, residual, weight, lam, kappa, eps);
  auto out = Site<true, true>::apply(x, OptionalTensor(residual), OptionalTensor(), OptionalTensor(), weight, lam,
                                     kappa, eps);
  return {std::move(out[0]), std::move(out[1]), std::move(out[2])};
}

std::tuple<Tensor, Tensor> add_forward_approx(DispatchKeySet keys, const Tensor& x, const Tensor& residual,
                                              const Tensor& variance, const OptionalTensor& offset,
                                              const OptionalTensor& weight, const Tensor& lam, double kappa,
                                              double eps) {
  if (wants_composite(x, residual, variance, weight, lam))
    return composite::add_forward_approx(x, residual, variance, offset, weight, lam, kappa, eps);
  if (!wants_graph(x, residual, variance, weight, lam))
    return add_forward_approx_op().below(keys, x, residual, variance, offset, weight, lam, kappa, eps);
  auto out = Site<false, true>::apply(x, OptionalTensor(residual), OptionalTensor(variance), offset, weight, lam,
                                      kappa, eps);
  return {std::move(out[0]), std::move(out[1])};
}

std::tuple<Tensor, Tensor, Tensor> backward(DispatchKeySet keys, const Tensor& grad_y,
                                            const OptionalTensor& grad_variance, const OptionalTensor& grad_sum,
                                            const Tensor& x, const Tensor& variance, const OptionalTensor& weight,
                                            const Tensor& lam, double kappa, double eps,
                                            std::array<bool, 3> output_mask) {
  if (wants_composite(grad_y, grad_variance, grad_sum, x, variance, weight, lam) ||
      wants_graph(grad_y, grad_variance, grad_sum, x, variance, weight, lam))
    return composite::backward(grad_y, grad_variance, grad_sum, x, variance, weight, lam, kappa, eps, output_mask);
  return backward_op().below(keys, grad_y, grad_variance, grad_sum, x, variance, weight, lam, kappa, eps, output_mask);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_approx(DispatchKeySet keys, const Tensor& grad_y,
                                                           const OptionalTensor& grad_sum, const Tensor& x,
                                                           const Tensor& variance, const OptionalTensor& offset,
                                                           const OptionalTensor& weight, const Tensor& lam,
                                                           double kappa, double eps, std::array<bool, 4> output_mask) {
  if (wants_composite(grad_y, grad_sum, x, variance, weight, lam) ||
      wants_graph(grad_y, grad_sum, x, variance, weight, lam))
    return composite::backward_approx(grad_y, grad_sum, x, variance, offset, weight, lam, kappa, eps, output_mask);
  return backward_approx_op().below(keys, grad_y, grad_sum, x, variance, offset, weight, lam, kappa, eps, output_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(bhyt, Autograd, m) {
  m.impl("forward", forward);
  m.impl("forward_approx", forward_approx);
  m.impl("add_forward", add_forward);
  m.impl("add_forward_approx", add_forward_approx);
  m.impl("backward", backward);
  m.impl("backward_approx", backward_approx);
}

}  // namespace bhyt
