// The op contract. Everything else in this folder implements these lines, for one dispatch key or another.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <memory>

#include "registration.h"

namespace {

constexpr const char* kSchemas[] = {
    "forward(Tensor x, Tensor? weight, Tensor lam, float kappa=10.0, float eps=1e-06)"
    " -> (Tensor y, Tensor variance)",
    "forward_approx(Tensor x, Tensor variance, Tensor? variance_offset, Tensor? weight, Tensor lam,"
    " float kappa=10.0, float eps=1e-06) -> Tensor y",
    "add_forward(Tensor x, Tensor residual, Tensor? weight, Tensor lam, float kappa=10.0, float eps=1e-06)"
    " -> (Tensor y, Tensor sum, Tensor variance)",
    "add_forward_approx(Tensor x, Tensor residual, Tensor variance, Tensor? variance_offset, Tensor? weight,"
    " Tensor lam, float kappa=10.0, float eps=1e-06) -> (Tensor y, Tensor sum)",
    "forward.out(Tensor x, Tensor? weight, Tensor lam, float kappa=10.0, float eps=1e-06, *, Tensor(a!) y,"
    " Tensor(b!) variance) -> (Tensor(a!) y, Tensor(b!) variance)",
    "forward_approx.out(Tensor x, Tensor variance, Tensor? variance_offset, Tensor? weight, Tensor lam,"
    " float kappa=10.0, float eps=1e-06, *, Tensor(a!) y) -> Tensor(a!) y",
    "add_forward.out(Tensor x, Tensor residual, Tensor? weight, Tensor lam, float kappa=10.0, float eps=1e-06, *,"
    " Tensor(a!) y, Tensor(b!) sum, Tensor(c!) variance) -> (Tensor(a!) y, Tensor(b!) sum, Tensor(c!) variance)",
    "add_forward_approx.out(Tensor x, Tensor residual, Tensor variance, Tensor? variance_offset, Tensor? weight,"
    " Tensor lam, float kappa=10.0, float eps=1e-06, *, Tensor(a!) y, Tensor(b!) sum)"
    " -> (Tensor(a!) y, Tensor(b!) sum)",
    "forward_quantized(Tensor x, Tensor? weight, Tensor lam, float scale, int zero_point=0, ScalarType dtype=int8,"
    " float kappa=10.0, float eps=1e-06) -> (Tensor q, Tensor variance)",
    "forward_approx_quantized(Tensor x, Tensor variance, Tensor? variance_offset, Tensor? weight, Tensor lam,"
    " float scale, int zero_point=0, ScalarType dtype=int8, float kappa=10.0, float eps=1e-06) -> Tensor q",
    "add_forward_quantized(Tensor x, Tensor residual, Tensor? weight, Tensor lam, float scale, int zero_point=0,"
    " ScalarType dtype=int8, float kappa=10.0, float eps=1e-06) -> (Tensor q, Tensor sum, Tensor variance)",
    "add_forward_approx_quantized(Tensor x, Tensor residual, Tensor variance, Tensor? variance_offset,"
    " Tensor? weight, Tensor lam, float scale, int zero_point=0, ScalarType dtype=int8, float kappa=10.0,"
    " float eps=1e-06) -> (Tensor q, Tensor sum)",
    "forward_quantized.explicit(Tensor x, Tensor? weight, Tensor lam, float scale, int zero_point, ScalarType dtype,"
    " float kappa, float eps) -> (Tensor q, Tensor variance)",
    "forward_approx_quantized.explicit(Tensor x, Tensor variance, Tensor? variance_offset, Tensor? weight, Tensor lam,"
    " float scale, int zero_point, ScalarType dtype, float kappa, float eps) -> Tensor q",
    "add_forward_quantized.explicit(Tensor x, Tensor residual, Tensor? weight, Tensor lam, float scale, int zero_point,"
    " ScalarType dtype, float kappa, float eps) -> (Tensor q, Tensor sum, Tensor variance)",
    "add_forward_approx_quantized.explicit(Tensor x, Tensor residual, Tensor variance, Tensor? variance_offset,"
    " Tensor? weight, Tensor lam, float scale, int zero_point, ScalarType dtype, float kappa, float eps)"
    " -> (Tensor q, Tensor sum)",
    "backward(Tensor grad_y, Tensor? grad_variance, Tensor? grad_sum, Tensor x, Tensor variance, Tensor? weight,"
    " Tensor lam, float kappa, float eps, bool[3] output_mask)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_lam)",
    "backward_approx(Tensor grad_y, Tensor? grad_sum, Tensor x, Tensor variance, Tensor? variance_offset,"
    " Tensor? weight, Tensor lam, float kappa, float eps, bool[4] output_mask)"
    " -> (Tensor grad_x, Tensor grad_variance, Tensor grad_weight, Tensor grad_lam)",
};

// The kernel of a quantised op: it calls the op's overload without defaults. A traced graph leaves out arguments that
// equal their defaults, and AOTInductor writes the default of a ScalarType as an int, which its loader refuses.
struct CallExplicit final : c10::OperatorKernel {
  explicit CallExplicit(const char* name) : op(c10::Dispatcher::singleton().findSchemaOrThrow(name, "explicit")) {}
  void operator()(const c10::OperatorHandle&, c10::DispatchKeySet, torch::jit::Stack* stack) { op.callBoxed(stack); }

  c10::OperatorHandle op;  // looked up once: a look-up takes a seventh of a microsecond
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(bhyt, m) {
  if (!bhyt::registers_ops()) return;
  for (const char* schema : kSchemas) m.def(schema, {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(bhyt, CompositeImplicitAutograd, m) {
  if (!bhyt::registers_ops()) return;
  for (const char* name : {"bhyt::forward_quantized", "bhyt::forward_approx_quantized", "bhyt::add_forward_quantized",
                           "bhyt::add_forward_approx_quantized"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunctor(std::make_unique<CallExplicit>(name)));
}
