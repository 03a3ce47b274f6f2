// Autograd of the ops. Three routes of those that have gradients, chosen per call:
//   composite      a functorch transform or a forward-mode tangent is present, or a backward is differentiated in turn
//   below autograd nothing requires grad
//   SiteBackward   otherwise: the fused op, and a node whose backward calls bhyt::backward through the dispatcher
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/library.h>

#include <string>

#include "composite.h"
#include "registration.h"

namespace bhyt {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using c10::DispatchKeySet;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// An overload of the op `name` with the signature of its composite, as the next dispatch key down sees it.
template <auto composite_op>
struct Op;

template <typename Return, typename... Args, Return (*composite_op)(Args...)>
struct Op<composite_op> {
  explicit Op(const char* name, const char* overload = "")
      : handle_(c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Return(Args...)>()) {}
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

// Of an argument that is no tensor.
template <typename T>
bool has_tangent(const T&) {
  return false;
}
template <typename T>
bool requires_grad(const T&) {
  return false;
}

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

// What a site's backward needs of its forward; a tensor that was not given is undefined.
struct Saved {
  Tensor row, variance, offset, weight, lam;
  double kappa, eps;
};

// Gradient edges in this order; a tensor that was not given has an edge that leads nowhere.
enum Edge : size_t { kX, kResidual, kVariance, kWeight, kLam, kEdges };
using Wanted = std::array<bool, kEdges>;

// grads: of y, sum (when adding), variance (when exact), as the schemas order them; undefined where unused.
template <bool exact, bool adds>
variable_list site_gradients(const variable_list& grads, const Saved& saved, const Wanted& wanted) {
  const auto& [row, variance, offset, weight, lam, kappa, eps] = saved;
  const Tensor grad_y = grads[0].defined() ? grads[0] : row.new_zeros({}).expand_symint(row.sym_sizes());
  const OptionalTensor grad_sum = adds ? optional(grads[1]) : std::nullopt;
  const bool for_row = wanted[kX] || wanted[kResidual];
  Tensor grad_row, grad_variance, grad_weight, grad_lam;
  if constexpr (exact) {
    std::tie(grad_row, grad_weight, grad_lam) =
        backward_op()(grad_y, optional(grads[adds ? 2 : 1]), grad_sum, row, variance, optional(weight), lam, kappa, eps,
                      {for_row, wanted[kWeight], wanted[kLam]});
  } else {
    std::tie(grad_row, grad_variance, grad_weight, grad_lam) =
        backward_approx_op()(grad_y, grad_sum, row, variance, optional(offset), optional(weight), lam, kappa, eps,
                             {for_row, wanted[kVariance], wanted[kWeight], wanted[kLam]});
  }
  // d(x + residual) is the same for both; the engine casts it to a narrower branch.
  return {wanted[kX] ? grad_row : Tensor(), wanted[kResidual] ? grad_row : Tensor(), grad_variance, grad_weight,
          grad_lam};
}

// A node like those torch generates for its own ops. torch::autograd::Function would be shorter, and costs 3 us more a
// forward and 3 us more a backward: as much again as the whole call of a small row.
template <bool exact, bool adds>
struct SiteBackward : torch::autograd::Node {
  SavedVariable row, variance, offset, weight, lam;
  double kappa = 0, eps = 0;

  // The sum and an exact site's variance are outputs of this very node.
  Saved unpack() {
    const auto self = getptr();
    return {row.unpack(adds ? self : nullptr), variance.unpack(exact ? self : nullptr), offset.unpack(),
            weight.unpack(), lam.unpack(), kappa, eps};
  }

  Wanted wanted() const {
    Wanted edges;
    for (size_t i = 0; i < kEdges; ++i) edges[i] = task_should_compute_output(i);
    return edges;
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    return site_gradients<exact, adds>(grads, unpack(), wanted());
  }

  std::string name() const override {
    return std::string("BHyT") + (adds ? "Add" : "") + "Forward" + (exact ? "" : "Approx") + "Backward";
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* saved : {&row, &variance, &offset, &weight, &lam}) saved->reset_data();
  }

  // Compiled autograd: what identifies this node, then the same gradients as a function of packed values.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(name());
    args.collect(row, adds);
    args.collect(variance, exact);
    args.collect(offset, false);
    args.collect(weight, false);
    args.collect(lam, false);
    args.collect(kappa);
    args.collect(eps);
  }

  static variable_list apply_packed(const variable_list& grads, const std::vector<at::IValue>& packed) {
    const auto flags = packed[7].toBoolList();
    Wanted wanted;
    for (size_t i = 0; i < kEdges; ++i) wanted[i] = flags.get(i);
    return site_gradients<exact, adds>(grads,
                                       {packed[0].toTensor(), packed[1].toTensor(), packed[2].toTensor(),
                                        packed[3].toTensor(), packed[4].toTensor(), packed[5].toDouble(),
                                        packed[6].toDouble()},
                                       wanted);
  }

  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& swapped) override {
    for (SavedVariable* saved : {&row, &variance, &offset, &weight, &lam}) swapped.before(*saved);
    const Saved saved = unpack();
    c10::List<bool> flags;
    for (const bool flag : wanted()) flags.push_back(flag);
    std::vector<at::IValue> packed = {saved.row, saved.variance, saved.offset, saved.weight,
                                      saved.lam, saved.kappa,    saved.eps,    flags};
    std::vector<at::TypePtr> types;
    for (const auto& value : packed) types.push_back(value.isTensor() ? at::TensorType::get() : value.type());
    const auto& compiler = torch::dynamo::autograd::getPyCompilerInterface();
    const auto function = compiler->bind_function(swapped.get_py_compiler(), name(), apply_packed, types,
                                                  /*is_custom_function=*/true, /*is_traceable=*/true);
    const auto outputs = torch::dynamo::autograd::IValuePacker<
        std::vector<std::optional<torch::autograd::InputMetadata>>>::
        pack(torch::dynamo::autograd::get_input_metadata(next_edges()));
    auto results =
        compiler->call_function(swapped.get_py_compiler(), "apply_functional", function, grads, packed, outputs);
    for (SavedVariable* saved_variable : {&row, &variance, &offset, &weight, &lam}) swapped.after(*saved_variable);
    return results;
  }
};

// Nodes are held by intrusive pointers in newer versions of torch, by shared pointers in older ones; deleteNode, found
// by argument-dependent look-up, exists in the latter only.
template <typename T, typename Node = torch::autograd::Node>
auto make_node() {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, Node>)
    return c10::make_intrusive<T>();
  else
    return std::shared_ptr<T>(new T(), [](auto* node) { deleteNode(node); });
}

// Runs `below`, the op under autograd, and hangs its outputs on a node.
template <bool exact, bool adds, typename Below>
auto record(Below below, const Tensor& x, const OptionalTensor& residual, const OptionalTensor& variance,
            const OptionalTensor& offset, const OptionalTensor& weight, const Tensor& lam, double kappa, double eps) {
  auto node = make_node<SiteBackward<exact, adds>>();
  node->set_next_edges(torch::autograd::collect_next_edges(x, residual, variance, weight, lam));
  auto outputs = below();
  std::apply([&](auto&... output) { (torch::autograd::set_history(output, node), ...); }, outputs);
  if constexpr (adds)
    node->row = SavedVariable(std::get<1>(outputs), /*is_output=*/true);
  else
    node->row = SavedVariable(x, /*is_output=*/false);
  if constexpr (exact)
    node->variance = SavedVariable(std::get<adds ? 2 : 1>(outputs), /*is_output=*/true);
  else
    node->variance = SavedVariable(variance, /*is_output=*/false);
  node->offset = SavedVariable(offset, /*is_output=*/false);
  node->weight = SavedVariable(weight, /*is_output=*/false);
  node->lam = SavedVariable(lam, /*is_output=*/false);
  node->kappa = kappa;
  node->eps = eps;
  return outputs;
}

std::tuple<Tensor, Tensor> forward(DispatchKeySet keys, const Tensor& x, const OptionalTensor& weight,
                                   const Tensor& lam, double kappa, double eps) {
  if (wants_composite(x, weight, lam)) return composite::forward(x, weight, lam, kappa, eps);
  const auto below = [&] { return forward_op().below(keys, x, weight, lam, kappa, eps); };
  if (!wants_graph(x, weight, lam)) return below();
  return record<true, false>(below, x, {}, {}, {}, weight, lam, kappa, eps);
}

Tensor forward_approx(DispatchKeySet keys, const Tensor& x, const Tensor& variance, const OptionalTensor& offset,
                      const OptionalTensor& weight, const Tensor& lam, double kappa, double eps) {
  if (wants_composite(x, variance, weight, lam))
    return composite::forward_approx(x, variance, offset, weight, lam, kappa, eps);
  const auto below = [&] {
    return std::make_tuple(forward_approx_op().below(keys, x, variance, offset, weight, lam, kappa, eps));
  };
  if (!wants_graph(x, variance, weight, lam)) return std::get<0>(below());
  return std::get<0>(record<false, false>(below, x, {}, variance, offset, weight, lam, kappa, eps));
}

std::tuple<Tensor, Tensor, Tensor> add_forward(DispatchKeySet keys, const Tensor& x, const Tensor& residual,
                                               const OptionalTensor& weight, const Tensor& lam, double kappa,
                                               double eps) {
  if (wants_composite(x, residual, weight, lam)) return composite::add_forward(x, residual, weight, lam, kappa, eps);
  const auto below = [&] { return add_forward_op().below(keys, x, residual, weight, lam, kappa, eps); };
  if (!wants_graph(x, residual, weight, lam)) return below();
  return record<true, true>(below, x, residual, {}, {}, weight, lam, kappa, eps);
}

std::tuple<Tensor, Tensor> add_forward_approx(DispatchKeySet keys, const Tensor& x, const Tensor& residual,
                                              const Tensor& variance, const OptionalTensor& offset,
                                              const OptionalTensor& weight, const Tensor& lam, double kappa,
                                              double eps) {
  if (wants_composite(x, residual, variance, weight, lam))
    return composite::add_forward_approx(x, residual, variance, offset, weight, lam, kappa, eps);
  const auto below = [&] {
    return add_forward_approx_op().below(keys, x, residual, variance, offset, weight, lam, kappa, eps);
  };
  if (!wants_graph(x, residual, variance, weight, lam)) return below();
  return record<false, true>(below, x, residual, variance, offset, weight, lam, kappa, eps);
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

// The quantised ops have no gradients: what would record them is an error.
template <const char* name, auto composite_op>
struct NoGradient;

template <const char* name, typename Return, typename... Args, Return (*composite_op)(Args...)>
struct NoGradient<name, composite_op> {
  static Return call(DispatchKeySet keys, Args... args) {
    TORCH_CHECK(!wants_graph(args...) && !(has_tangent(args) || ...), "bhyt: ", name,
                ": not differentiable; call it under torch.no_grad(), or with tensors that do not require grad");
    if (inside_functorch_transform()) return composite_op(args...);
    static const Op<composite_op> op((std::string("bhyt::") + name).c_str(), "explicit");
    return op.below(keys, args...);
  }
};

constexpr char kForward[] = "forward_quantized", kForwardApprox[] = "forward_approx_quantized";
constexpr char kAddForward[] = "add_forward_quantized", kAddForwardApprox[] = "add_forward_approx_quantized";

}  // namespace

TORCH_LIBRARY_IMPL(bhyt, Autograd, m) {
  if (!registers_ops()) return;
  m.impl("forward", forward);
  m.impl("forward_approx", forward_approx);
  m.impl("add_forward", add_forward);
  m.impl("add_forward_approx", add_forward_approx);
  m.impl("forward_quantized.explicit", NoGradient<kForward, &composite::forward_quantized>::call);
  m.impl("forward_approx_quantized.explicit", NoGradient<kForwardApprox, &composite::forward_approx_quantized>::call);
  m.impl("add_forward_quantized.explicit", NoGradient<kAddForward, &composite::add_forward_quantized>::call);
  m.impl("add_forward_approx_quantized.explicit",
         NoGradient<kAddForwardApprox, &composite::add_forward_approx_quantized>::call);
  m.impl("backward", backward);
  m.impl("backward_approx", backward_approx);
}

}  // namespace bhyt
