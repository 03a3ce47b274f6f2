// The backward in two kernels, for any alignment and length.
#pragma once

#include "backward_formula.cuh"

namespace bhyt::cuda {
namespace {

// The first: S of every row, added in the order of the persistent kernel; grad_v, and the terms of grad_lam.
template <class Branch, class Stream, bool wide>
BHYT_KERNEL(kMaxThreads)
backward_row_sums(const BackwardParams p, const Constants<Accumulate<Stream>> constants, const Ladder ladder,
                  const Partials<Accumulate<Stream>> out) {
  using A = Accumulate<Stream>;
  constexpr int W = kPackWidth<Stream>;
  auto& slots = *reinterpret_cast<SumSlots<A>*>(hw::shared());
  const Place at;
  const int64_t row = hw::block_x() * ladder.groups + at.group;
  const bool inside = row < p.rows;
  const SiteScalars<A> scalars(p, constants);
  const Scale<A> scale = Scales<A>(scalars)(inside ? static_cast<const A*>(p.variance)[row] : A(1));
  const Stream* x_row = static_cast<const Stream*>(p.x.data) + row * p.x.stride;
  const Branch* grad_y = static_cast<const Branch*>(p.grad_y.data) + row * p.grad_y.stride;

  using SumAlone = Wanted<GradX::unwanted, true, false>;
  A total = 0;
  for (int part = 0; part < ladder.parts; ++part) {
    A sum = 0, x[W], g[W], columns[W];
    for (int k = 0; k < ladder.packs; ++k) {
      const int64_t pack = (int64_t(part) * ladder.packs + k) * ladder.threads + at.lane;
      if (!inside || pack >= ladder.row_packs) break;
      Pack<Stream, W>::template load<wide>(x_row, pack * W, p.d).get_all(x);
      const auto grad_y_pack = Pack<Branch, W>::template load<wide>(grad_y, pack * W, p.d);
      const auto gains = Gains<AnyFloat, A, W>::template load<wide>(p.weight, pack * W, p.d);
      sum = hw::add(sum, gradient<Stream, SumAlone>(x, grad_y_pack, gains.values, scale.a, g, columns));
    }
    total = hw::add(total, group_sum(sum, ladder, at, slots, part));
  }
  if (!inside || at.lane != 0) return;
  out.row_sums[row] = total;
  if (out.lam) out.lam[row] = hw::mul(scale.per_lam, total);
  if (p.grad_variance_out) static_cast<A*>(p.grad_variance_out)[row] = grad_variance_of(scale, total);
}

// The second: grad_x, and the sums of the columns over the block's share of the rows. A thread keeps to one pack of
// columns.
template <class Branch, class Stream, class Wanted, bool wide>
BHYT_KERNEL(kColumnThreads)
backward_columns(const BackwardParams p, const Constants<Accumulate<Stream>> constants, const int64_t row_packs,
                 const Partials<Accumulate<Stream>> out) {
  using A = Accumulate<Stream>;
  constexpr int W = kPackWidth<Stream>;
  constexpr bool exact = Wanted::grad_x == GradX::after_sum;
  using StreamPack = Pack<Stream, W>;
  const Scales<A> scales{SiteScalars<A>(p, constants)};
  const int64_t stride = int64_t(hw::blocks_y()) * hw::threads_x();
  for (int64_t pack = int64_t(hw::block_y()) * hw::threads_x() + hw::thread_x(); pack < row_packs; pack += stride) {
    Gains<AnyFloat, A, W> gains;
    if constexpr (Wanted::g) gains = Gains<AnyFloat, A, W>::template load<wide>(p.weight, pack * W, p.d);
    A columns[W] = {};
    for (int64_t row = hw::block_x(); row < p.rows; row += hw::blocks_x()) {
      A x[W], g[W];
      StreamPack::template load<wide>(static_cast<const Stream*>(p.x.data) + row * p.x.stride, pack * W, p.d)
          .get_all(x);
      const auto grad_y = Pack<Branch, W>::template load<wide>(
          static_cast<const Branch*>(p.grad_y.data) + row * p.grad_y.stride, pack * W, p.d);
      const Scale<A> scale = scales(static_cast<const A*>(p.variance)[row]);
      gradient<Stream, Wanted>(x, grad_y, gains.values, scale.a, g, columns);
      if constexpr (!Wanted::writes) continue;
      const A dv = exact && p.grad_variance ? static_cast<const A*>(p.grad_variance)[row] : A(0);
      const A c = exact ? factor_of_x(constants, scale, out.row_sums[row], dv) : A(0);
      const auto store = [&](auto has_grad_sum) {
        constexpr bool summed = decltype(has_grad_sum)::value;
        auto grad_sum = StreamPack::zero();
        if constexpr (summed)
          grad_sum = StreamPack::template load<wide>(
              static_cast<const Stream*>(p.grad_sum.data) + row * p.grad_sum.stride, pack * W, p.d);
        grad_x_pack<exact, summed>(g, x, scale.a, c, grad_sum)
            .template store<wide>(static_cast<Stream*>(p.grad_x) + row * p.d, pack * W, p.d);
      };
      p.grad_sum.data ? store(std::true_type()) : store(std::false_type());
    }
    if constexpr (Wanted::grad_weight)
#pragma unroll
      for (int j = 0; j < W; ++j)
        if (pack * W + j < p.d) out.weight[hw::block_x() * p.d + pack * W + j] = columns[j];
  }
}

}  // namespace
}  // namespace bhyt::cuda
