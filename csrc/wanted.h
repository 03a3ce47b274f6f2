// The gradients that a backward must compute, as a template argument: a kernel has no code for a gradient that
// output_mask leaves out.
#pragma once

#include <type_traits>

#include "params.h"

namespace bhyt {

// When grad_x is written. An approximate site needs g alone, and writes grad_x at once. An exact site needs g and S; S
// is known after the whole row.
enum class GradX { unwanted, at_once, after_sum };

template <GradX grad_x_, bool sum_, bool grad_weight_>
struct Wanted {
  static constexpr GradX grad_x = grad_x_;
  static constexpr bool writes = grad_x != GradX::unwanted;
  static constexpr bool sum = sum_;  // S
  static constexpr bool g = writes || sum;
  static constexpr bool grad_weight = grad_weight_;
};

// Calls f(Wanted()) for a call that wants at least one gradient.
template <class F>
auto with_wanted(const BackwardParams& p, F&& f) {
  const auto choose = [&](auto grad_weight) {
    if (p.grad_x && p.exact) return f(Wanted<GradX::after_sum, true, grad_weight>());
    if (p.grad_x && p.needs_sums()) return f(Wanted<GradX::at_once, true, grad_weight>());
    if (p.grad_x) return f(Wanted<GradX::at_once, false, grad_weight>());
    if constexpr (grad_weight)
      if (!p.needs_sums()) return f(Wanted<GradX::unwanted, false, true>());
    return f(Wanted<GradX::unwanted, true, grad_weight>());
  };
  return p.grad_weight ? choose(std::true_type()) : choose(std::false_type());
}

}  // namespace bhyt
