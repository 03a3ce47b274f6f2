// Backward, with z = a x, t = tanh z, u = 1 - t^2, g = grad_y * weight * u, S = sum over the row of g x:
//   exact         grad_x = a g + x (2 grad_v - a S / s) / d + grad_sum
//   approximate   grad_x = a g + grad_sum;    grad_v = -a S / (2 s)
//   both          grad_lam = sum over rows of S / (kappa sqrt(s));    grad_weight = sum over rows of grad_y * t
// where s = v + offset + eps.
#pragma once

#include "../wanted.h"
#include "reduce.cuh"

namespace bhyt::cuda {
namespace {

// What leaves the row kernels for the sums over rows; `count` partial sums of each column, and of grad_lam.
template <class A>
struct Partials {
  A* weight = nullptr;    // [count, d], optional
  A* lam = nullptr;       // [lam_count], optional
  A* row_sums = nullptr;  // [rows], the split kernels' S
  int64_t count = 0;
  int64_t lam_count = 0;
};

// g and S over one pack; grad_weight's terms are added to `columns`: each where it is wanted.
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

// The factor of x in an exact grad_x.
template <class A>
BHYT_DEVICE A factor_of_x(const Constants<A>& constants, const Scale<A>& scale, A sum, A dv) {
  return hw::mul(hw::fma(A(2), dv, -hw::mul(hw::mul(scale.a, sum), scale.inverse)), constants.per_d);
}

template <class A>
BHYT_DEVICE A grad_variance_of(const Scale<A>& scale, A sum) {
  return hw::mul(hw::mul(hw::mul(A(-0.5), scale.a), sum), scale.inverse);
}

// a g + x c + grad_sum, rounded once; only exact sites have c, only `summed` ones a grad_sum
template <bool exact, bool summed, class A, class Stream, int W>
BHYT_DEVICE Pack<Stream, W> grad_x_pack(const A (&g)[W], const A (&x)[W], A a, A c, const Pack<Stream, W>& grad_sum) {
  A dx[W];
#pragma unroll
  for (int j = 0; j < W; ++j) {
    dx[j] = summed ? grad_sum.template get<A>(j) : A(-0.);  // which changes no sum's bits
    if constexpr (exact) dx[j] = hw::fma(x[j], c, dx[j]);
    dx[j] = hw::fma(a, g[j], dx[j]);
  }
  return Pack<Stream, W>::of(dx);
}

// The way of the persistent kernel's groups through the rows, made on the host: how many rows each has, and how many
// bytes lie between one of them and the next. Constants in the kernel's loop, that take no registers.
struct Course {
  int turns = 0;     // rows of every group ..
  int64_t more = 0;  // .. and one more of so many, the first
  int64_t x = 0, grad_y = 0, grad_sum = 0, grad_x = 0, statistics = 0;
  int64_t to_grad_variance = 0;  // from a row's variance
  bool has_grad_variance = false, needs_sums = false;
};

template <class T>
BHYT_DEVICE const T* row_at(const char* address) {
  return reinterpret_cast<const T*>(address);
}

// Where a thread keeps its gains in shared memory, as floats: four more than it has, so that no two lanes of eight meet
// in a bank.
constexpr int kGainsApart = kBackwardElements + 4;

template <class Weight, class A, int W, int N>
BHYT_DEVICE void keep_gains(A* gains, const Values& weight, int first, int apart, int packs, int64_t d) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    auto pack = Gains<Weight, A, W>::ones();
    if (k < packs) pack = Gains<Weight, A, W>::template load<true>(weight, first + k * apart, d);
#pragma unroll
    for (int j = 0; j < W; ++j) gains[k * W + j] = pack.get(j);
  }
}

// Wide. Persistent blocks: a group of threads goes through rows, its packs of the next row on their way while this
// one's sum is made; the columns' sums stay in registers until the end, when the block's groups add theirs in turn.
// Packs beyond a row's end are never loaded, but zeros, which add nothing.
template <class Branch, class Stream, class Wanted, bool summed>
BHYT_KERNEL(kMaxThreads) backward_rows_persistent(const BackwardParams p, const Constants<float> constants,
                                                  const Ladder ladder, const Course course,
                                                  const Partials<float> out) {
  using A = float;
  constexpr int W = kPackWidth<Stream>;
  constexpr int N = kBackwardElements / W;
  constexpr bool exact = Wanted::grad_x == GradX::after_sum;  // without a grad_x both kinds of site are the same
  using StreamPack = Pack<Stream, W>;
  using BranchPack = Pack<Branch, W>;
  auto& slots = *reinterpret_cast<SumSlots<A>*>(hw::shared());
  static_assert(sizeof slots % 16 == 0);
  A* const block_columns = reinterpret_cast<A*>(hw::shared() + sizeof slots);  // [W * N * threads], then lam's
  const Place at;
  A* const gains = block_columns + at.lane * kGainsApart;  // until then
  if (Wanted::sum && ladder.parts > 1) open_cluster(at, slots);
  const SiteScalars<A> scalars(p, constants, exact);
  const int first_pack = at.part * N * ladder.threads + at.lane;
  const int packs = (static_cast<int>(ladder.row_packs) - first_pack + ladder.threads - 1) / ladder.threads;
  const int apart = ladder.threads * W;

  StreamPack next_x[N];
  BranchPack grad_y[N];
  A columns[N][W], lam = 0, v = 1, next_dv = 0;
  const auto clear_row = [&] {
#pragma unroll
    for (int k = 0; k < N; ++k) next_x[k] = StreamPack::zero(), grad_y[k] = BranchPack::zero();
  };
  clear_row();
#pragma unroll
  for (int k = 0; k < N; ++k)
#pragma unroll
    for (int j = 0; j < W; ++j) columns[k][j] = 0;

  const int64_t first_group = hw::block_x() * ladder.groups, first_row = first_group + at.group;
  const int turns = course.turns + (first_group < course.more);  // the same for all groups of the block
  const int rows = course.turns + (first_row < course.more);
  const auto start = [&](const Rows& t, int size) {
    return static_cast<const char*>(t.data) + (first_row * t.stride + first_pack * W) * size;
  };
  const char* x_row = start(p.x, sizeof(Stream));
  const char* grad_y_row = start(p.grad_y, sizeof(Branch));
  const char* grad_sum_row = start(p.grad_sum, sizeof(Stream));
  char* grad_x_row = const_cast<char*>(start({p.grad_x, p.d}, sizeof(Stream)));
  char* v_of_row = static_cast<char*>(const_cast<void*>(p.variance)) + first_row * sizeof(A);

  const auto load_statistics = [&] {
    v = *row_at<A>(v_of_row);
    if (exact && course.has_grad_variance) next_dv = *row_at<A>(v_of_row + course.to_grad_variance);
  };
  const auto load_pack = [&](int k) {
    next_x[k] = StreamPack::template load<true>(row_at<Stream>(x_row), k * apart, p.d);
    grad_y[k] = BranchPack::template load<true>(row_at<Branch>(grad_y_row), k * apart, p.d);
  };

  if (rows > 0) {
    load_statistics();
#pragma unroll
    for (int k = 0; k < N; ++k)
      if (k < packs) load_pack(k);
  }
  if (Wanted::g && at.group == 0) {
    if (p.weight.data == nullptr || p.weight.dtype == p.branch)
      keep_gains<Branch, A, W, N>(gains, p.weight, first_pack * W, apart, packs, p.d);
    else
      keep_gains<float, A, W, N>(gains, p.weight, first_pack * W, apart, packs, p.d);
  }
  hw::block_barrier();
  const Scales<A> scales(scalars);
  if (Wanted::sum && ladder.parts > 1) hw::cluster_wait();

  const int written = p.grad_variance_out && at.lane == 0 && at.part == 0 ? rows : 0;  // gradients of variances
  int stored = Wanted::writes ? packs : 0;
  for (int turn = 0; turn < turns; ++turn) {
    if (turn == rows) {  // others of the block have another row, whose sums this group's threads may take part in
      clear_row();
      v = 1, next_dv = 0, stored = 0;
      hw::pin(v);  // a branch, not a selection for every register
    }
    const Scale<A> scale = scales(v);
    const A dv = next_dv;
    x_row += course.x, grad_y_row += course.grad_y, v_of_row += course.statistics;
    const int next_packs = turn + 1 < rows ? packs : 0;

    StreamPack grad_sum[N];
    const auto load_grad_sum = [&](int k) {
      grad_sum[k] = StreamPack::template load<true>(row_at<Stream>(grad_sum_row), k * apart, p.d);
    };
    // Asked for here where registers allow; 32-bit rows leave too few, and have it brought near.
    constexpr bool early = sizeof(Stream) == 2;
    if constexpr (summed)
#pragma unroll
      for (int k = 0; k < N; ++k)
        if (k < stored) early ? load_grad_sum(k) : hw::prefetch(row_at<Stream>(grad_sum_row) + k * apart);
    A x[N][W], g[N][W], sum = 0;
    if (turn + 1 < rows) load_statistics();
#pragma unroll
    for (int k = 0; k < N; ++k) {
      next_x[k].get_all(x[k]);
#pragma unroll
      for (int j = 0; j < W; ++j) hw::pin(x[k][j]);  // or it would be made anew for grad_x
      const A added = gradient<Stream, Wanted>(x[k], grad_y[k], gains + k * W, scale.a, g[k], columns[k]);
      sum = k == 0 ? added : hw::add(sum, added);
      if (k < next_packs) load_pack(k);
    }

    const auto store_grad_x = [&](A c) {
#pragma unroll
      for (int k = 0; k < N; ++k)
        if (k < stored) {
          if constexpr (summed && !early) load_grad_sum(k);
          grad_x_pack<exact, summed>(g[k], x[k], scale.a, c, grad_sum[k])
              .template store<true>(reinterpret_cast<Stream*>(grad_x_row), k * apart, p.d);
        }
    };
    if constexpr (Wanted::grad_x == GradX::at_once) store_grad_x(A(0));
    // Always so here; but ptxas takes two instructions more for 16-bit rows where it need not ask.
    if (Wanted::sum && course.needs_sums) {
      sum = group_sum<true>(sum, ladder, at, slots, turn);
      if (ladder.parts > 1) sum = cluster_sum(sum, ladder, at, slots, turn);
      lam = hw::fma(scale.per_lam, sum, lam);
      if constexpr (exact) {
        store_grad_x(factor_of_x(constants, scale, sum, dv));
      } else if (turn < written) {
        *reinterpret_cast<A*>(v_of_row + course.to_grad_variance) = grad_variance_of(scale, sum);
      }
    }
    grad_x_row += course.grad_x;
    if constexpr (summed) grad_sum_row += course.grad_sum;
  }

  hw::let_next_grid_start();
  if (!Wanted::grad_weight && !out.lam) return;
  hw::block_barrier();  // the gains are read no more
  // Groups within a warp hold the same columns of other rows: 16 lanes away, 8, ..
  if (ladder.threads < 32) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2)
      if (mask >= ladder.threads) {
        if constexpr (Wanted::grad_weight)
#pragma unroll
          for (int k = 0; k < N; ++k)
#pragma unroll
            for (int j = 0; j < W; ++j) columns[k][j] = hw::add(columns[k][j], hw::shuffle_xor(columns[k][j], mask));
        lam = hw::add(lam, hw::shuffle_xor(lam, mask));
      }
  }
  const int groups_per_warp = ladder.threads < 32 ? 32 / ladder.threads : 1;
  const int group_turns = (ladder.groups + groups_per_warp - 1) / groups_per_warp;
  const int width = N * ladder.threads;  // packs of columns in the block
  A& block_lam = block_columns[width * W];
  for (int turn = 0; turn < group_turns; ++turn) {
    if (at.group == turn * groups_per_warp) {
      if constexpr (Wanted::grad_weight)
#pragma unroll
        for (int k = 0; k < N; ++k)
#pragma unroll
          for (int j = 0; j < W; ++j) {
            A& column = block_columns[(j * N + k) * ladder.threads + at.lane];
            column = turn == 0 ? columns[k][j] : hw::add(column, columns[k][j]);
          }
      if (at.lane == 0) block_lam = turn == 0 ? lam : hw::add(block_lam, lam);
    }
    hw::block_barrier();
  }
  if constexpr (Wanted::grad_weight)
    for (int i = at.group * ladder.threads + at.lane; i < width * W; i += ladder.threads * ladder.groups) {
      const int pack = i / W, j = i % W;
      const int64_t column = int64_t(at.part) * width * W + i;
      if (column < p.d) out.weight[hw::block_x() * p.d + column] = block_columns[j * width + pack];
    }
  if (out.lam && at.part == 0 && at.group == 0 && at.lane == 0) out.lam[hw::block_x()] = block_lam;
}

// Any alignment and length, first half: every row's S, in the order of the kernel above; grad_v and grad_lam's terms.
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

// Second half: grad_x, and the columns' sums over the block's share of the rows. A thread keeps to one pack of columns.
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

// Sums over partials, in an order fixed by their number: kSlices threads take every kSlices-th, then one adds theirs.
// Blocks 0 .. sum a stripe of grad_weight's columns each; the last one sums grad_lam.
// A thread has the partials of 192 blocks, more than most GPUs run, on their way at once.
constexpr int kStripe = 32, kSlices = 16, kAhead = 12;

template <class A>
BHYT_KERNEL(kStripe * kSlices) sum_partials(const BackwardParams p, const Partials<A> in) {
  A* const slices = reinterpret_cast<A*>(hw::shared());  // [kSlices, kStripe]
  const int lane = hw::thread_x(), slice = hw::thread_y();
  const bool for_lam = hw::block_x() == hw::blocks_x() - 1;
  const int64_t column = for_lam ? lane : hw::block_x() * kStripe + lane;
  hw::wait_for_previous_grid();
  A sum = 0;
  if (for_lam) {
    if (p.grad_lam)
      for (int64_t i = slice * kStripe + lane; i < in.lam_count; i += kStripe * kSlices) sum = hw::add(sum, in.lam[i]);
  } else if (p.grad_weight && column < p.d) {
    for (int64_t i = slice; i < in.count; i += kSlices * kAhead) {
      A partial[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
        partial[j] = i + j * kSlices < in.count ? in.weight[(i + j * kSlices) * p.d + column] : A(0);
#pragma unroll
      for (int j = 0; j < kAhead; ++j) sum = hw::add(sum, partial[j]);
    }
  }
  slices[slice * kStripe + lane] = sum;
  hw::block_barrier();
  if (slice != 0) return;
  sum = 0;
  for (int i = 0; i < kSlices; ++i) sum = hw::add(sum, slices[i * kStripe + lane]);
  if (for_lam) {
    sum = butterfly(sum, 32);
    if (p.grad_lam && lane == 0) write(p.grad_lam, p.lam.dtype, 0, sum);
  } else if (p.grad_weight && column < p.d) {
    write(p.grad_weight, p.weight.dtype, column, sum);
  }
}

}  // namespace
}  // namespace bhyt::cuda
