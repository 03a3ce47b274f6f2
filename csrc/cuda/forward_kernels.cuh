// Forward:  v = mean(x^2),  a = lam / (kappa sqrt(v + offset + eps)),  y = weight * tanh(a x)
// With a residual the branch is added to it first; the sum is stored, and v is that of the stored sum.
#pragma once

#include "output.cuh"
#include "reduce.cuh"
#include "scalars.cuh"
#include "tanh.cuh"

namespace bhyt::cuda {
namespace {

// One row: the branch alone, or the rounded sum of branch and residual.
template <class Branch, class Stream, bool residual_added>
struct StreamRow {
  static constexpr int W = kPackWidth<Stream>;
  using A = Accumulate<Stream>;
  using BranchPack = Pack<Branch, W>;
  using StreamPack = Pack<Stream, W>;

  const Branch* branch;    // [d]
  const Stream* residual;  // [d]
  Stream* sum;             // [d]

  BHYT_DEVICE StreamRow(const ForwardParams& p, int64_t row)
      : branch(static_cast<const Branch*>(p.x.data) + row * p.x.stride),
        residual(static_cast<const Stream*>(p.residual.data) + row * p.residual.stride),
        sum(static_cast<Stream*>(p.sum) + row * p.d) {
    hw::pin(branch);
    if constexpr (residual_added) hw::pin(residual);
  }

  // What is read for one pack; make() turns it into the row's pack. The two are apart so that all loads are issued
  // before the first store.
  struct Raw {
    BranchPack branch;
    StreamPack residual;
  };

  template <bool wide>
  BHYT_DEVICE Raw load(int64_t first, int64_t d) const {
    Raw raw;
    raw.branch = BranchPack::template load<wide>(branch, first, d);
    if constexpr (residual_added) raw.residual = StreamPack::template load<wide>(residual, first, d);
    return raw;
  }

  BHYT_DEVICE static Raw zero() {
    Raw raw;
    raw.branch = BranchPack::zero();
    if constexpr (residual_added) raw.residual = StreamPack::zero();
    return raw;
  }

  BHYT_DEVICE static StreamPack make(const Raw& raw) {
    if constexpr (residual_added) {
      A added[W];
#pragma unroll
      for (int j = 0; j < W; ++j)
        added[j] = hw::add(raw.branch.template get<A>(j), raw.residual.template get<A>(j));
      return StreamPack::of(added);
    } else {
      return raw.branch;
    }
  }
};

// y of one pack, not yet rounded.
template <class Y, class A, class Stream, int W, class Weight>
BHYT_DEVICE void site(const Pack<Stream, W>& pack, A a, const Gains<Weight, A, W>& gains, A (&y)[W]) {
  A z[W];
#pragma unroll
  for (int j = 0; j < W; ++j) z[j] = hw::mul(a, pack.template get<A>(j));
  tanh_for<Stream, Y>(z, y);
#pragma unroll
  for (int j = 0; j < W; ++j) y[j] = gains.times(j, y[j]);
}

template <class A, bool widened_apart = false, class Stream, int W>
BHYT_DEVICE A square_sum(const Pack<Stream, W>& pack) {
  A x[W];
#pragma unroll
  for (int j = 0; j < W; ++j) x[j] = widened_apart ? pack.template get_apart<A>(j) : pack.template get<A>(j);
  return dot(x, x);
}

// Whether 64 registers hold what a thread keeps without a spill (ptxas of CUDA 13.0). Two blocks of 512 threads then
// share a multiprocessor.
template <class Stream, class Weight, bool residual_added>
constexpr bool fits_twice() {
  if (sizeof(Stream) == 4 || std::is_same_v<Weight, NoGain>) return true;
  const bool narrow = sizeof(Weight) == 2, brain = std::is_same_v<Stream, bf16>;
  if (residual_added) return narrow && brain && hw::kArch == 90;
  return narrow || (brain && hw::kArch != 80);
}

// For rows of whole, aligned packs, counted in 32 bits. A thread keeps its N packs in registers from the only read to
// the write. Several blocks share a row longer than a block; at an exact site they form a cluster, as they have a sum
// to make.
template <class Branch, class Stream, class Weight, class Y, bool residual_added, bool exact, int N>
BHYT_KERNEL_SHARING(kMaxThreads, (fits_twice<Stream, Weight, residual_added>() ? 2 : 1))
forward_row_in_registers(const ForwardParams p, const Constants<Accumulate<Stream>> constants, const Ladder ladder,
                         const Output<Y, Accumulate<Stream>> output) {
  using A = Accumulate<Stream>;
  constexpr int W = kPackWidth<Stream>;
  using Row = StreamRow<Branch, Stream, residual_added>;
  auto& slots = *reinterpret_cast<SumSlots<A>*>(hw::shared());
  const Place at;
  const int row = static_cast<int>(hw::block_x()) * ladder.groups + at.group;
  const bool inside = row < static_cast<int>(p.rows);
  const Row source(p, row);
  const int first_pack = at.part * N * ladder.threads + at.lane;
  const int end = inside ? static_cast<int>(ladder.row_packs) : 0;
  const auto pack_of = [&](int k) { return first_pack + k * ladder.threads; };
  const auto exists = [&](int k) { return pack_of(k) < end; };

  hw::wait_for_previous_grid();
  typename Row::Raw raw[N];
  Gains<Weight, A, W> gains[N];
#pragma unroll
  for (int k = 0; k < N; ++k) {
    if constexpr (exact) raw[k] = Row::zero();  // adds nothing to the sum
    if (exists(k)) raw[k] = source.template load<true>(pack_of(k) * W, p.d);
  }
  A v = 1;
  if (!exact && inside) v = static_cast<const A*>(p.variance)[row];
#pragma unroll
  for (int k = 0; k < N; ++k)
    if (exists(k)) gains[k] = Gains<Weight, A, W>::template load_given<true>(p.weight, pack_of(k) * W, p.d);
  // Behind the loads, so that its launch falls into their time. Also, ptxas moves no load across: here it would ask for
  // lam first, and wait for it before it asks for the row. At an approximate site it does so if this stands here.
  if constexpr (exact) hw::let_next_grid_start();
  const SiteScalars<A> scalars(p, constants, exact);
  if (exact && ladder.parts > 1) open_cluster(at, slots);

  Pack<Stream, W> x[N];
  A sum = 0;
  Stream* sum_row = source.sum;
  if constexpr (residual_added) hw::pin(sum_row);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    x[k] = Row::make(raw[k]);
    if (residual_added && exists(k)) x[k].template store<true>(sum_row, pack_of(k) * W, p.d);
    if constexpr (exact) sum = hw::add(sum, square_sum<A, (sizeof(Weight) > sizeof(Stream))>(x[k]));
  }
  if constexpr (exact) {
    sum = group_sum(sum, ladder, at, slots, 0);
    if (ladder.parts > 1) {
      hw::cluster_wait();
      sum = cluster_sum(sum, ladder, at, slots, 0);
    }
    v = mean_of(sum, constants);
    if (inside && at.part == 0 && at.lane == 0) static_cast<A*>(p.variance_out)[row] = v;
  }
  if constexpr (!exact) hw::let_next_grid_start();
  const A a = Scales<A>(scalars)(v).a;
  Y* y_row = static_cast<Y*>(p.y) + row * p.d;
  hw::pin(y_row);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    A y[W];
    site<Y>(x[k], a, gains[k], y);
    if (exists(k)) output(y).template store<true>(y_row, pack_of(k) * W, p.d);
  }
}

// For any alignment and length. The row of an exact site is read for v, and again for y. Threads have the same elements
// and sums the same order as above, so the bits are the same.
template <class Branch, class Stream, class Y, bool residual_added, bool exact, bool wide>
BHYT_KERNEL_SHARING(kMaxThreads, 1)
forward_row_read_twice(const ForwardParams p, const Constants<Accumulate<Stream>> constants, const Ladder ladder,
                       const Output<Y, Accumulate<Stream>> output) {
  using A = Accumulate<Stream>;
  constexpr int W = kPackWidth<Stream>;
  using StreamPack = Pack<Stream, W>;
  auto& slots = *reinterpret_cast<SumSlots<A>*>(hw::shared());
  const Place at;
  const int64_t row = hw::block_x() * ladder.groups + at.group;
  const bool inside = row < p.rows;
  const StreamRow<Branch, Stream, residual_added> source(p, row);
  const auto row_pack = [&](int64_t first) {
    const StreamPack pack = source.make(source.template load<wide>(first, p.d));
    if constexpr (residual_added) pack.template store<wide>(source.sum, first, p.d);
    return pack;
  };
  hw::wait_for_previous_grid();
  const SiteScalars<A> scalars(p, constants, exact);

  A v = exact || !inside ? A(1) : static_cast<const A*>(p.variance)[row];
  if constexpr (exact) {
    A total = 0;
    for (int part = 0; part < ladder.parts; ++part) {
      A sum = 0;
      for (int k = 0; k < ladder.packs; ++k) {
        const int64_t pack = (int64_t(part) * ladder.packs + k) * ladder.threads + at.lane;
        if (!inside || pack >= ladder.row_packs) break;
        sum = hw::add(sum, square_sum<A>(row_pack(pack * W)));
      }
      total = hw::add(total, group_sum(sum, ladder, at, slots, part));
    }
    v = mean_of(total, constants);
    if (inside && at.lane == 0) static_cast<A*>(p.variance_out)[row] = v;
  }
  if (!inside) return;

  hw::let_next_grid_start();
  const A a = Scales<A>(scalars)(v).a;
  Y* const y_row = static_cast<Y*>(p.y) + row * p.d;
  const int64_t stride = int64_t(hw::blocks_y()) * ladder.threads;
  for (int64_t pack = int64_t(at.part) * ladder.threads + at.lane; pack < ladder.row_packs; pack += stride) {
    StreamPack x;
    if constexpr (exact && residual_added) {
      x = StreamPack::template load<wide>(source.sum, pack * W, p.d);  // this thread stored it above
    } else {
      x = row_pack(pack * W);
    }
    const auto gains = Gains<AnyFloat, A, W>::template load<wide>(p.weight, pack * W, p.d);
    A y[W];
    site<Y>(x, a, gains, y);
    output(y).template store<wide>(y_row, pack * W, p.d);
  }
}

}  // namespace
}  // namespace bhyt::cuda
