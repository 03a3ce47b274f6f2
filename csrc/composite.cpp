// Where the composite formula is the kernel: backends without kernels of their own, and torch.vmap.
#include "composite.h"

#include <torch/library.h>

#include "registration.h"

namespace bhyt {

static void register_composite(torch::Library& m) {
  if (!registers_ops()) return;
  m.impl("forward", composite::forward);
  m.impl("forward_approx", composite::forward_approx);
  m.impl("add_forward", composite::add_forward);
  m.impl("add_forward_approx", composite::add_forward_approx);
  m.impl("forward_quantized.explicit", composite::forward_quantized);
  m.impl("forward_approx_quantized.explicit", composite::forward_approx_quantized);
  m.impl("add_forward_quantized.explicit", composite::add_forward_quantized);
  m.impl("add_forward_approx_quantized.explicit", composite::add_forward_approx_quantized);
  m.impl("backward", composite::backward);
  m.impl("backward_approx", composite::backward_approx);
}

TORCH_LIBRARY_IMPL(bhyt, CompositeExplicitAutograd, m) { register_composite(m); }
TORCH_LIBRARY_IMPL(bhyt, FuncTorchBatched, m) { register_composite(m); }

}  // namespace bhyt
