// The node that a forward leaves in the graph. No other file uses the private interfaces of torch's autograd.
#pragma once

#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <array>
#include <bit>
#include <mutex>
#include <string>
#include <vector>

#include "adapters.h"

namespace bhyt {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

inline bool inside_functorch_transform() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// Raises the version of a tensor that has been written: graphs that have saved the tensor notice the write by it.
inline void count_write(const Tensor& t) {
  if (t.defined()) torch::autograd::impl::bump_version(t);
}

// Gradient edges in this order; a tensor that was not given has an edge that leads nowhere.
enum Edge : size_t { kX, kResidual, kVariance, kWeight, kLam, kEdges };
using Wanted = std::array<bool, kEdges>;

// What a backward needs of its forward: row, variance, offset, weight and lam, undefined where not given.
struct Saved {
  std::array<Tensor, 5> tensors;
  Numbers numbers;
  bool exact, adds;
};

using Doubles = std::array<double, sizeof(Numbers) / sizeof(double)>;

// grads: of y, sum (when adding), variance (when exact), as the schemas order them; undefined where unused.
inline variable_list site_gradients(const variable_list& grads, const Saved& saved, const Wanted& wanted) {
  const auto given = [](const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; };
  const auto& [row, variance, offset, weight, lam] = saved.tensors;
  const Tensor grad_y = grads[0].defined() ? grads[0] : row.new_zeros({}).expand_symint(row.sym_sizes());
  const OptionalTensor grad_sum = saved.adds ? given(grads[1]) : std::nullopt;
  const OptionalTensor grad_variance = saved.exact ? given(grads[1 + saved.adds]) : std::nullopt;
  const OptionalTensor given_offset = given(offset), given_weight = given(weight);
  const Gradients found = call_op(SiteGradients{
      saved.numbers, grad_y, grad_variance, grad_sum, row, variance, given_offset, given_weight, lam, saved.exact,
      {wanted[kX] || wanted[kResidual], wanted[kVariance], wanted[kWeight], wanted[kLam]}});
  // x and residual have the same gradient. The engine casts it to the dtype of a narrower branch.
  return {wanted[kX] ? found.x : Tensor(), wanted[kResidual] ? found.x : Tensor(), found.variance, found.weight,
          found.lam};
}

// A node like the nodes that torch generates for its own ops. torch::autograd::Function would be shorter, but costs
// 3 us more in a forward and 3 us more in a backward: as long as the whole call of a small row.
struct SiteBackward : torch::autograd::Node {
  std::array<SavedVariable, 5> variables;
  Saved saved{};  // without its tensors: they are in `variables`

  // The sum and an exact site's variance are outputs of this very node.
  bool is_output(size_t variable) const { return variable == 0 ? saved.adds : variable == 1 && saved.exact; }

  Saved unpack() {
    Saved all = saved;
    for (size_t i = 0; i < variables.size(); ++i)
      all.tensors[i] = variables[i].unpack(is_output(i) ? getptr() : nullptr);
    return all;
  }

  Wanted wanted() const {
    Wanted edges;
    for (size_t i = 0; i < kEdges; ++i) edges[i] = task_should_compute_output(i);
    return edges;
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    return site_gradients(grads, unpack(), wanted());
  }

  std::string name() const override {
    return std::string("BHyT") + (saved.adds ? "Add" : "") + "Forward" + (saved.exact ? "" : "Approx") + "Backward";
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& variable : variables) variable.reset_data();
  }

  // Compiled autograd: what identifies this node, then the same gradients as a function of packed values.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(name());
    for (size_t i = 0; i < variables.size(); ++i) args.collect(variables[i], is_output(i));
    for (const double number : std::bit_cast<Doubles>(saved.numbers)) args.collect(number);
  }

  static variable_list apply_packed(const variable_list& grads, const std::vector<at::IValue>& packed) {
    Saved saved;
    Doubles numbers;
    Wanted wanted;
    auto next = packed.begin();
    for (Tensor& t : saved.tensors) t = (next++)->toTensor();
    for (double& number : numbers) number = (next++)->toDouble();
    for (bool* flag : {&saved.exact, &saved.adds}) *flag = (next++)->toBool();
    for (bool& flag : wanted) flag = (next++)->toBool();
    saved.numbers = std::bit_cast<Numbers>(numbers);
    return site_gradients(grads, saved, wanted);
  }

  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& swapped) override {
    for (SavedVariable& variable : variables) swapped.before(variable);
    const auto tensors = unpack().tensors;
    std::vector<at::IValue> packed(tensors.begin(), tensors.end());
    for (const double number : std::bit_cast<Doubles>(saved.numbers)) packed.emplace_back(number);
    for (const bool flag : {saved.exact, saved.adds}) packed.emplace_back(flag);
    for (const bool flag : wanted()) packed.emplace_back(flag);
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
    for (SavedVariable& variable : variables) swapped.after(variable);
    return results;
  }
};

// Newer versions of torch hold nodes by intrusive pointers, older versions by shared pointers. deleteNode is found by
// argument-dependent look-up, and exists in the older versions only.
template <typename T, typename Node = torch::autograd::Node>
auto make_node() {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, Node>)
    return c10::make_intrusive<T>();
  else
    return std::shared_ptr<T>(new T(), [](auto* node) { deleteNode(node); });
}

// Runs the op below autograd, and hangs its outputs on a node.
inline Outputs record(c10::DispatchKeySet below, const Site& s) {
  const bool exact = !s.variance, adds = s.residual;
  const Tensor undefined;
  auto node = make_node<SiteBackward>();
  node->set_next_edges(torch::autograd::collect_next_edges(s.x, adds ? *s.residual : undefined,
                                                           exact ? undefined : *s.variance, s.weight, s.lam));
  Outputs outputs = call_op(s, below);
  for (const Tensor& output : {std::cref(outputs.y), std::cref(outputs.sum), std::cref(outputs.variance)})
    if (output.defined()) torch::autograd::set_history(output, node);
  node->variables = {SavedVariable(adds ? outputs.sum : s.x, adds),
                     SavedVariable(exact ? outputs.variance : *s.variance, exact), SavedVariable(s.offset, false),
                     SavedVariable(s.weight, false), SavedVariable(s.lam, false)};
  node->saved = {{}, s, exact, adds};
  return outputs;
}

}  // namespace bhyt
