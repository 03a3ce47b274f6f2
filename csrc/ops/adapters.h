// From the signatures of the ops to a Site or a SiteGradients, and back. An implementation of the ops for a dispatch
// key has one forward and one backward. A caller of an op gives a Site or a SiteGradients.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <array>
#include <string>
#include <tuple>

#include "registration.h"
#include "site.h"

namespace bhyt {

// The tuple that f makes if `holds`, else an empty tuple.
template <bool holds, class F>
auto when(F f) {
  if constexpr (holds)
    return f();
  else
    return std::tuple<>();
}

// Element i of the tuple if `holds`, else `otherwise`.
template <bool holds, size_t i, class Tuple, class T>
const T& pick(const Tuple& given, const T& otherwise) {
  if constexpr (holds)
    return std::get<i>(given);
  else
    return otherwise;
}

// The eight forward ops and the four that write into given memory: their names, and the order of their arguments and
// outputs.
template <bool exact, bool adds, bool quantized, bool into>
struct Forward {
  using Call = Site;
  using Results = Outputs;
  static constexpr const char* overload = quantized ? "explicit" : into ? "out" : "";

  static std::string name() {
    return std::string(adds ? "add_" : "") + "forward" + (exact ? "" : "_approx") + (quantized ? "_quantized" : "");
  }

  static auto arguments(const Site& s) {
    return std::tuple_cat(
        std::tie(s.x), when<adds>([&] { return std::tie(*s.residual); }),
        when<!exact>([&] { return std::tie(*s.variance, s.offset); }), std::tie(s.weight, s.lam),
        when<quantized>([&] { return std::tuple(s.quantized->scale, s.quantized->zero_point, s.quantized->dtype); }),
        std::tuple(s.kappa, s.eps), when<into>([&] { return tensors(*s.into); }));
  }

  template <class Arguments>
  static Site call_of(const Arguments& given) {
    constexpr size_t v = 1 + adds, w = v + 2 * !exact, q = w + 2, k = q + 3 * quantized, o = k + 2;
    const Tensor& x = std::get<0>(given);
    std::optional<Quantized> to;
    if constexpr (quantized) to = {std::get<q>(given), std::get<q + 1>(given), std::get<q + 2>(given)};
    const Tensor* residual = adds ? &pick<adds, 1>(given, x) : nullptr;
    const Tensor* variance = exact ? nullptr : &pick<!exact, v>(given, x);
    std::optional<Outputs> outputs;
    if constexpr (into)
      outputs = {std::get<o>(given), pick<adds, o + 1>(given, Tensor()), pick<exact, o + 1 + adds>(given, Tensor())};
    return {{std::get<k>(given), std::get<k + 1>(given)}, x, residual, variance, pick<!exact, v + 1>(given, kNone),
            std::get<w>(given), std::get<w + 1>(given), to, outputs};
  }

  template <class Results>  // Outputs, const or not
  static auto tensors(Results& out) {
    return std::tuple_cat(std::tie(out.y), when<adds>([&] { return std::tie(out.sum); }),
                          when<exact>([&] { return std::tie(out.variance); }));
  }
};

// The two backward ops.
template <bool exact>
struct Backward {
  using Call = SiteGradients;
  using Results = Gradients;
  static constexpr const char* overload = "";

  static std::string name() { return exact ? "backward" : "backward_approx"; }

  static auto arguments(const SiteGradients& s) {
    const auto& [x, variance, weight, lam] = s.wanted;
    return std::tuple_cat(std::tie(s.grad_y), when<exact>([&] { return std::tie(s.grad_variance); }),
                          std::tie(s.grad_sum, s.x, s.variance), when<!exact>([&] { return std::tie(s.offset); }),
                          std::tie(s.weight, s.lam), std::tuple(s.kappa, s.eps),
                          when<exact>([&] { return std::tuple(std::array{x, weight, lam}); }),
                          when<!exact>([&] { return std::tuple(std::array{x, variance, weight, lam}); }));
  }

  template <class Arguments>
  static SiteGradients call_of(const Arguments& given) {
    constexpr size_t s = 1 + exact, w = s + 3 + !exact;
    const auto& mask = std::get<w + 4>(given);
    return {{std::get<w + 2>(given), std::get<w + 3>(given)}, std::get<0>(given), pick<exact, 1>(given, kNone),
            std::get<s>(given), std::get<s + 1>(given), std::get<s + 2>(given), pick<!exact, s + 3>(given, kNone),
            std::get<w>(given), std::get<w + 1>(given), exact,
            {mask[0], !exact && mask[1], mask[2 - exact], mask[3 - exact]}};
  }

  static auto tensors(Gradients& grads) {
    return std::tuple_cat(std::tie(grads.x), when<!exact>([&] { return std::tie(grads.variance); }),
                          std::tie(grads.weight, grads.lam));
  }
};

// An op as functions of its schema's signature.
template <class Kind, class Arguments = decltype(Kind::arguments(std::declval<const typename Kind::Call&>())),
          class Tensors = decltype(Kind::tensors(std::declval<typename Kind::Results&>()))>
struct Op;

template <class Kind, class... Args, class... Tensors>
struct Op<Kind, std::tuple<Args...>, std::tuple<Tensors...>> : Kind {
  using Results = typename Kind::Results;
  using Returned =
      std::conditional_t<sizeof...(Tensors) == 1, Tensor, std::tuple<std::remove_reference_t<Tensors>...>>;

  template <class Impl, class... Keys>
  static Returned kernel(Keys... keys, Args... args) {
    const auto call = Kind::call_of(std::tuple<Args...>(args...));
    Results results;
    if constexpr (std::is_same_v<Results, Outputs>)
      results = Impl::forward(keys..., call);
    else
      results = Impl::backward(keys..., call);
    return std::apply([](Tensors... t) { return Returned(std::move(t)...); }, Kind::tensors(results));
  }

  static std::string full_name() { return Kind::name() + (*Kind::overload ? "." : "") + Kind::overload; }

  template <class Impl, class... Keys>
  static void implement(torch::Library& m) {
    Returned (*const function)(Keys..., Args...) = kernel<Impl, Keys...>;
    m.impl(full_name().c_str(), function);
  }

  // Calls the op through the dispatcher: from its top, or with these keys alone.
  template <class... Keys>
  static Results call(const typename Kind::Call& call, Keys... keys) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow(("bhyt::" + Kind::name()).c_str(), Kind::overload)
                               .template typed<Returned(Args...)>();
    const auto run = [&](Args... args) {
      if constexpr (sizeof...(Keys) == 0)
        return std::tuple(op.call(args...));
      else
        return std::tuple(op.redispatch(keys..., args...));
    };
    Results results;
    Kind::tensors(results) = std::apply(run, Kind::arguments(call));
    return results;
  }
};

// Registers Impl::forward(Keys.., Site) as the ops that write into given memory.
template <class Impl, class... Keys>
void register_ops_into(torch::Library& m) {
  if (!registers_ops()) return;
  const auto implement = [&](auto... kinds) { (Op<decltype(kinds)>::template implement<Impl, Keys...>(m), ...); };
  implement(Forward<true, false, false, true>(), Forward<false, false, false, true>(),
            Forward<true, true, false, true>(), Forward<false, true, false, true>());
}

// Registers Impl::forward(Keys.., Site) and Impl::backward(Keys.., SiteGradients) as all ops of a dispatch key.
template <class Impl, class... Keys>
void register_ops(torch::Library& m) {
  if (!registers_ops()) return;
  const auto implement = [&](auto... kinds) { (Op<decltype(kinds)>::template implement<Impl, Keys...>(m), ...); };
  implement(Forward<true, false, false, false>(), Forward<false, false, false, false>(),
            Forward<true, true, false, false>(), Forward<false, true, false, false>(),
            Forward<true, false, true, false>(), Forward<false, false, true, false>(),
            Forward<true, true, true, false>(), Forward<false, true, true, false>(), Backward<true>(),
            Backward<false>());
  register_ops_into<Impl, Keys...>(m);
}

// Calls f with the op that a call is for.
template <bool... known, class F, class... Rest>
auto with_forward(const F& f, bool next, Rest... rest) {
  if constexpr (sizeof...(rest) > 0)
    return next ? with_forward<known..., true>(f, rest...) : with_forward<known..., false>(f, rest...);
  else
    return next ? f(Op<Forward<known..., true>>()) : f(Op<Forward<known..., false>>());
}

template <class F>
auto with_op(const Site& s, const F& f) {
  return with_forward<>(f, !s.variance, s.residual != nullptr, s.quantized.has_value(), s.into.has_value());
}

template <class F>
auto with_op(const SiteGradients& s, const F& f) {
  return s.exact ? f(Op<Backward<true>>()) : f(Op<Backward<false>>());
}

template <class Call, class... Keys>
auto call_op(const Call& call, Keys... keys) {
  return with_op(call, [&](auto op) { return op.call(call, keys...); });
}

}  // namespace bhyt
