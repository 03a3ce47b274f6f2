// The formula in plain ATen ops, differentiable to any order. It runs on devices without kernels, under functorch
// transforms, with forward-mode tangents, and when a backward is itself differentiated.
#pragma once

#include "site.h"

namespace bhyt {

struct Composite {
  static Outputs forward(const Site& s);
  static Outputs forward_into(const Site& s);
  static Gradients backward(const SiteGradients& s);
};

}  // namespace bhyt
