// Backward, with z = a x, t = tanh z, u = 1 - t^2, g = grad_y * weight * u, S = sum over the row of g x:
//   exact         grad_x = a g + x (2 grad_v - a S / s) / d + grad_sum
//   approximate   grad_x = a g + grad_sum;    grad_v = -a S / (2 s)
//   both          grad_lam = sum over rows of S / (kappa sqrt(s));    grad_weight = sum over rows of grad_y * t
// where s = v + offset + eps.
#pragma once

#include "../wanted.h"
#include "reduce.cuh"
#include "scalars.cuh"
#include "tanh.cuh"

namespace bhyt::cuda {
namespace {

// What the row kernels leave for the sums over rows: `count` partial sums of each column, `lam_count` of grad_lam.
template <class A>
struct Partials {
  A* weight = nullptr;    // [count, d], optional
  A* lam = nullptr;       // [lam_count], optional
  A* row_sums = nullptr;  // [rows]: S, from the first of the split kernels to the second
  int64_t count = 0;
  int64_t lam_count = 0;
};

// Makes g, and returns S, over one pack; adds the terms of grad_weight to `columns`. Each where it is wanted.
template <class Stream, class Wanted, class A, class Branch, int W>
BHYT_DEVICE A gradient(const A (&x)[W], const Pack<Branch, W>& grad_y, const A* gains, A a, A (&g)[W],
                       A (&columns)[W]) {
  A t[W], u[W];
  tanh_and_slope<sizeof(Stream) == 2>(a, x, t, u);
#pragma unroll
  for (int j = 0; j < W; ++j) {
    const A dy = grad_y.template get<A>(j);
    if constexpr (Wanted::grad_weight) columns[j] = hw::fma(dy, t[j], columns[j]);
    if constexpr (Wanted::g) g[j] = hw::mul(hw::mul(dy, gains[j]), u[j]);
  }
  if constexpr (Wanted::sum) return dot(g, x);
  return 0;
}

// The factor of x in grad_x of an exact site.
template <class A>
BHYT_DEVICE A factor_of_x(const Constants<A>& constants, const Scale<A>& scale, A sum, A dv) {
  return hw::mul(hw::fma(A(2), dv, -hw::mul(hw::mul(scale.a, sum), scale.inverse)), constants.per_d);
}

template <class A>
BHYT_DEVICE A grad_variance_of(const Scale<A>& scale, A sum) {
  return hw::mul(hw::mul(hw::mul(A(-0.5), scale.a), sum), scale.inverse);
}

// a g + x c + grad_sum, rounded once. Only exact sites have a c; summed: a grad_sum is given.
template <bool exact, bool summed, class A, class Stream, int W>
BHYT_DEVICE Pack<Stream, W> grad_x_pack(const A (&g)[W], const A (&x)[W], A a, A c, const Pack<Stream, W>& grad_sum) {
  A dx[W];
#pragma unroll
  for (int j = 0; j < W; ++j) {
    dx[j] = summed ? grad_sum.template get<A>(j) : A(-0.);  // changes the bits of no sum
    if constexpr (exact) dx[j] = hw::fma(x[j], c, dx[j]);
    dx[j] = hw::fma(a, g[j], dx[j]);
  }
  return Pack<Stream, W>::of(dx);
}

}  // namespace
}  // namespace bhyt::cuda
