// Shapes and dtypes without data, for symbolic sizes too.
#include <ATen/ops/empty.h>

#include "adapters.h"

namespace bhyt {
namespace {

Tensor like(const Tensor& t, at::ScalarType dtype) { return at::empty_symint(t.sym_sizes(), t.options().dtype(dtype)); }

Tensor like(const Tensor& t) { return like(t, t.scalar_type()); }

Tensor variance_of(const Tensor& stream) {
  c10::SymDimVector sizes(stream.sym_sizes());
  sizes.back() = 1;
  return at::empty_symint(sizes, stream.options().dtype(checks::accumulate_type(stream.scalar_type())));
}

struct Meta {
  static Outputs forward(const Site& s) {
    check(s);
    if (s.into) return *s.into;
    return {like(s.x, s.y_dtype()), s.residual ? like(*s.residual) : Tensor(),
            s.variance ? Tensor() : variance_of(s.stream())};
  }

  static Gradients backward(const SiteGradients& s) {
    check(s);
    return {s.wanted.x ? like(s.x) : Tensor(), s.wanted.variance ? like(s.variance) : Tensor(),
            s.wanted.weight && s.weight ? like(*s.weight) : Tensor(), s.wanted.lam ? like(s.lam) : Tensor()};
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(bhyt, Meta, m) { register_ops<Meta>(m); }

}  // namespace bhyt
