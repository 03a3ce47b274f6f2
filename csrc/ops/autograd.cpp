// Autograd of the ops: which way a call takes.
//   composite      a functorch transform or a forward-mode tangent is present, or a backward is differentiated in turn
//   below autograd nothing requires grad
//   record         otherwise: the fused op, and a node whose backward calls bhyt::backward through the dispatcher
#include <ATen/core/grad_mode.h>

#include "autograd_node.h"
#include "composite.h"

namespace bhyt {
namespace {

using c10::DispatchKeySet;

// Whether `is` holds for a tensor by which a call is differentiated. The offset gets no gradient. It counts for
// quantised ops alone, which refuse every tensor that wants a gradient.
template <class Is>
bool any_of(const Site& s, const Is& is) {
  return is(&s.x) || is(s.residual) || is(s.variance) || (s.weight && is(&*s.weight)) || is(&s.lam) ||
         (s.quantized && s.offset && is(&*s.offset)) ||
         (s.into && (is(&s.into->y) || is(&s.into->sum) || is(&s.into->variance)));
}
template <class Is>
bool any_of(const SiteGradients& s, const Is& is) {
  return is(&s.grad_y) || (s.grad_variance && is(&*s.grad_variance)) || (s.grad_sum && is(&*s.grad_sum)) || is(&s.x) ||
         is(&s.variance) || (s.weight && is(&*s.weight)) || is(&s.lam);
}

template <class T>
bool has_tangent(const T& of) {
  return any_of(of, [](const Tensor* t) { return t && t->defined() && t->_fw_grad(/*level=*/0).defined(); });
}

template <class T>
bool wants_graph(const T& of) {
  return c10::GradMode::is_enabled() &&
         any_of(of, [](const Tensor* t) { return t && t->defined() && t->requires_grad(); });
}

std::string name_of(const Site& s) {
  return with_op(s, [](auto op) { return op.name(); }) + (s.into ? ".out" : "");
}

Outputs write_into(DispatchKeySet keys, const Site& s) {
  TORCH_CHECK_NOT_IMPLEMENTED(!inside_functorch_transform(), "bhyt: ", name_of(s),
                              ": not under functorch transforms; call the op without outputs");
  for (const Tensor* t : {&s.into->y, &s.into->sum, &s.into->variance}) count_write(*t);
  return call_op(s, keys & c10::after_autograd_keyset);
}

struct Routes {
  static Outputs forward(DispatchKeySet keys, const Site& s) {
    if (s.quantized || s.into)
      TORCH_CHECK(!wants_graph(s) && !has_tangent(s), "bhyt: ", name_of(s),
                  ": not differentiable; call it under torch.no_grad(), or with tensors that do not require grad");
    if (s.into) return write_into(keys, s);
    if (inside_functorch_transform() || has_tangent(s)) return Composite::forward(s);
    const DispatchKeySet below = keys & c10::after_autograd_keyset;
    return wants_graph(s) ? record(below, s) : call_op(s, below);
  }

  static Gradients backward(DispatchKeySet keys, const SiteGradients& s) {
    if (inside_functorch_transform() || has_tangent(s) || wants_graph(s)) return Composite::backward(s);
    return call_op(s, keys & c10::after_autograd_keyset);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(bhyt, Autograd, m) { register_ops<Routes, DispatchKeySet>(m); }

}  // namespace bhyt
