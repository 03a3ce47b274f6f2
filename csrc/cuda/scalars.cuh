// The scalars of a call and of a row: lam, offset, the mean of squares, a.
#pragma once

#include "formats.cuh"

namespace bhyt::cuda {

// 1 / sqrt(s): 0 for infinity, infinity for 0.
BHYT_DEVICE double reciprocal_sqrt(double s) { return hw::div(1., hw::sqrt(s)); }

// The approximate instruction and one Newton step: within 1.1 ulp, in a fifth of the time of a root and a division.
BHYT_DEVICE float reciprocal_sqrt(float s) {
  const float r = hw::reciprocal_sqrt_approx(s);
  const float step = hw::mul(hw::mul(0.5f, r), hw::fma(-hw::mul(s, r), r, 1.f));
  return step == step ? hw::add(r, step) : r;
}

// The numbers of a call in the arithmetic type. The host makes them: conversions and divisions are slow on the device.
template <class A>
struct Constants {
  A per_kappa, eps, d, per_d;
};

template <class A>
Constants<A> constants_of(const SiteParams& p) {
  return {static_cast<A>(1 / p.kappa), static_cast<A>(p.eps), static_cast<A>(p.d), static_cast<A>(1. / p.d)};
}

// sum / d
template <class A>
BHYT_DEVICE A mean_of(A sum, const Constants<A>& constants) {
  const A q = hw::mul(sum, constants.per_d);
  const A rest = hw::fma(-q, constants.d, sum);  // NaN where the sum is infinite
  return rest == rest ? hw::fma(rest, constants.per_d, q) : q;
}

// A row's scalars: with s = v + offset + eps,  `inverse` = 1 / s,  `per_lam` = 1 / (kappa sqrt(s)),  a = lam per_lam.
template <class A>
struct Scale {
  A inverse, per_lam, a;
};

// One number, 0 where none is given. The constructor issues the load; only value() branches on the dtype.
struct Scalar {
  uint32_t low = 0, high = 0;
  DType dtype;

  BHYT_DEVICE explicit Scalar(const Values& t, bool given) : dtype(t.dtype) {
    const int bytes = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
    if (given) hw::load_scalar(t.data, bytes, low, high);
  }

  template <class A>
  BHYT_DEVICE A value() const {
    switch (dtype) {
      case DType::f16: return static_cast<A>(hw::half_bits_to_float(low));
      case DType::bf16: return static_cast<A>(hw::bits_to_float(low << 16));
      case DType::f32: return static_cast<A>(hw::bits_to_float(low));
      default: return static_cast<A>(hw::bits_to_double(low, high));
    }
  }
};

// The scalars of a call, the same for every row. The constructor issues their loads.
template <class A>
struct SiteScalars {
  Constants<A> constants;
  Scalar lam, offset;

  // exact: such a site has no offset, so that no code asks for one.
  BHYT_DEVICE SiteScalars(const SiteParams& p, const Constants<A>& constants, bool exact = false)
      : constants(constants), lam(p.lam, true), offset(p.offset, !exact && p.offset.data) {}
};

// The one place where a is made, from the variance as stored: so an approximate forward that is given the variance of
// an exact one has the same bits. An absent offset is added as 0, which changes no bit.
template <class A>
struct Scales {
  Constants<A> constants;
  A lam, offset;

  BHYT_DEVICE explicit Scales(const SiteScalars<A>& site)
      : constants(site.constants),
        lam(site.lam.template value<A>()),
        offset(site.offset.template value<A>()) {}

  BHYT_DEVICE Scale<A> operator()(A v) const {
    const A root = reciprocal_sqrt(hw::add(hw::add(v, offset), constants.eps));
    Scale<A> scale;
    scale.inverse = hw::mul(root, root);
    scale.per_lam = hw::mul(constants.per_kappa, root);
    scale.a = hw::mul(lam, scale.per_lam);
    hw::pin(scale.a);
    return scale;
  }
};

}  // namespace bhyt::cuda
