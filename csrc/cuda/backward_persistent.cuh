// The persistent kernel of the backward, for rows of whole packs. Groups of threads go from row to row.
#pragma once

#include "backward_formula.cuh"

namespace bhyt::cuda {
namespace {

// How the persistent kernel's groups go through the rows. The host makes this: the numbers are constants in the
// kernel's loop and take no registers.
struct Course {
  int turns = 0;     // rows of every group ..
  int64_t more = 0;  // .. and one more row for so many groups, the first
  int64_t x = 0, grad_y = 0, grad_sum = 0, grad_x = 0, statistics = 0;  // bytes from a group's row to its next one
  int64_t to_grad_variance = 0;                                         // bytes from a row's variance
  bool has_grad_variance = false, needs_sums = false;
  int packs = 0, more_lanes = 0;                 // packs of the row for every lane, and one more for so many lanes
  int groups_at_once = 1, group_turns = 1;       // groups that share a warp, and how often as many add their sums
};

template <class T>
BHYT_DEVICE const T* row_at(const char* address) {
  return reinterpret_cast<const T*>(address);
}

// Where a thread's first pack of its group's row lies in each tensor.
template <class Branch, class Stream>
struct RowCursor {
  const char *x, *grad_y, *grad_sum;
  char *grad_x, *variance;

  BHYT_DEVICE RowCursor(const BackwardParams& p, int64_t row, int first)
      : x(start<Stream>(p.x, row, first)),
        grad_y(start<Branch>(p.grad_y, row, first)),
        grad_sum(start<Stream>(p.grad_sum, row, first)),
        grad_x(const_cast<char*>(start<Stream>({p.grad_x, p.d}, row, first))),
        variance(static_cast<char*>(const_cast<void*>(p.variance)) + row * int64_t(sizeof(float))) {}

  // What is read for the next row while this one is worked on ..
  BHYT_DEVICE void read_next(const Course& course) {
    x += course.x, grad_y += course.grad_y, variance += course.statistics;
  }
  // .. and what belongs to the row that is worked on.
  template <bool summed>
  BHYT_DEVICE void write_next(const Course& course) {
    grad_x += course.grad_x;
    if constexpr (summed) grad_sum += course.grad_sum;
  }

 private:
  template <class T>
  BHYT_DEVICE static const char* start(const Rows& t, int64_t row, int first) {
    return static_cast<const char*>(t.data) + (row * t.stride + first) * int64_t(sizeof(T));
  }
};

// A thread's gains lie in shared memory as floats, so many apart: four more than it has, so that of eight lanes no two
// meet in a bank.
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

// Groups of one warp hold the same columns of different rows: adds their sums, 16 lanes apart, then 8, and so on.
template <class Wanted, class A, int N, int W>
BHYT_DEVICE void sum_within_warp(const Ladder& ladder, A (&columns)[N][W], A& lam) {
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
}

// Adds the sums of the block's groups in turn and writes them to `out`.
template <class Wanted, class A, int N, int W>
BHYT_DEVICE void store_block_sums(const BackwardParams& p, const Place& at, const Ladder& ladder, const Course& course,
                                  const A (&columns)[N][W], A lam, A* block_columns, const Partials<A>& out) {
  const int width = N * ladder.threads;  // packs of columns in the block
  A& block_lam = block_columns[width * W];
  const auto each = [&](auto&& body) {
#pragma unroll
    for (int k = 0; k < N; ++k)
#pragma unroll
      for (int j = 0; j < W; ++j) body(k, j, block_columns[(j * N + k) * ladder.threads + at.lane]);
  };
  for (int turn = 0; turn < course.group_turns; ++turn) {
    if (at.group == turn * course.groups_at_once) {
      if (Wanted::grad_weight && turn == 0) each([&](int k, int j, A& column) { column = columns[k][j]; });
      if (Wanted::grad_weight && turn > 0) {
        A before[N][W];  // all are read before the first is written
        each([&](int k, int j, A& column) { before[k][j] = column; });
        each([&](int k, int j, A& column) { column = hw::add(before[k][j], columns[k][j]); });
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

// 512 threads with so many registers leave 4,096 of a multiprocessor's 65,536: those of a block of sum_partials, which
// waits there for the rows' end.
constexpr int kRowRegisters = 120;

// The packs of the next row come into registers.
struct NoRing {
  static constexpr bool used = false;
};

// A group loads the packs of its next row while the sum of the current row is made. The sums of the columns stay in
// registers until the end. Packs beyond a row's end are not loaded: they are zeros, which add nothing. With a ring rows
// come through shared memory: backward_ring.cuh.
template <class Branch, class Stream, class Wanted, bool summed, class Ring = NoRing>
BHYT_DEVICE void block_rows(const BackwardParams& p, const Constants<float>& constants, const Ladder& ladder,
                            const Course& course, const Partials<float>& out, Ring ring = Ring()) {
  using A = float;
  constexpr int W = kPackWidth<Stream>;
  constexpr int N = kBackwardElements / W;
  constexpr bool exact = Wanted::grad_x == GradX::after_sum;  // without a grad_x both kinds of site are the same
  using StreamPack = Pack<Stream, W>;
  using BranchPack = Pack<Branch, W>;
  auto& slots = *reinterpret_cast<SumSlots<A>*>(hw::shared());
  static_assert(sizeof slots % 16 == 0);
  // Shared memory holds the gains, and at the end in their place the block's columns [W * N * threads] and its lam.
  A* const block_columns = reinterpret_cast<A*>(hw::shared() + sizeof slots);
  const Place at;
  A* const gains = block_columns + at.lane * kGainsApart;
  if (Wanted::sum && ladder.parts > 1) open_cluster(at, slots);
  const int first_pack = at.part * N * ladder.threads + at.lane;
  const int packs = course.packs - at.part * N + (at.lane < course.more_lanes);
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
  RowCursor<Branch, Stream> cursor(p, first_row, first_pack * W);
  const auto load_statistics = [&] {
    v = *row_at<A>(cursor.variance);
    if (exact && course.has_grad_variance) next_dv = *row_at<A>(cursor.variance + course.to_grad_variance);
  };
  if constexpr (Ring::used) ring.open(at, ladder, N);
  const auto load_pack = [&](int k) {
    next_x[k] = StreamPack::template load<true>(row_at<Stream>(cursor.x), k * apart, p.d);
    grad_y[k] = BranchPack::template load<true>(row_at<Branch>(cursor.grad_y), k * apart, p.d);
  };

  hw::wait_for_previous_grid();
  if (rows > 0) {
    load_statistics();
    if constexpr (Ring::used) ring.fill(cursor.x, cursor.grad_y, rows, course.x, course.grad_y);
#pragma unroll
    for (int k = 0; k < N; ++k)
      if (!Ring::used && k < packs) load_pack(k);
  }
  const SiteScalars<A> scalars(p, constants, exact);
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
    if (turn == rows) {  // other groups of the block have another row, and this group's threads take part in their sums
      clear_row();
      v = 1, next_dv = 0, stored = 0;
      hw::pin(v);  // makes this a branch; else every register would be selected
    }
    const Scale<A> scale = scales(v);
    const A dv = next_dv;
    cursor.read_next(course);
    const int next_packs = turn + 1 < rows ? packs : 0;

    StreamPack grad_sum[N];
    const auto load_grad_sum = [&](int k) {
      grad_sum[k] = StreamPack::template load<true>(row_at<Stream>(cursor.grad_sum), k * apart, p.d);
    };
    // Loaded here where there are registers for it. 32-bit rows have too few: they bring it into L2.
    constexpr bool early = sizeof(Stream) == 2;
    if (summed && !early && hw::has_bulk_prefetch()) {
      const int most = N * ladder.threads, left = static_cast<int>(ladder.row_packs) - at.part * most;
      const int part_packs = left < most ? left : most;
      if (at.lane == 0 && stored > 0) hw::prefetch_bulk(cursor.grad_sum, part_packs * sizeof(StreamPack));
    } else if constexpr (summed) {
#pragma unroll
      for (int k = 0; k < N; ++k)
        if (k < stored) early ? load_grad_sum(k) : hw::prefetch(row_at<Stream>(cursor.grad_sum) + k * apart);
    }
    A x[N][W], g[N][W], sum = 0;
    if (turn + 1 < rows) load_statistics();
    if constexpr (Ring::used) ring.wait();
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if constexpr (Ring::used) {
        next_x[k] = StreamPack::zero(), grad_y[k] = BranchPack::zero();
        if (k < packs) ring.read(k, next_x[k], grad_y[k]);
      }
      next_x[k].get_all(x[k]);
#pragma unroll
      for (int j = 0; j < W; ++j) hw::pin(x[k][j]);  // else it would be converted again for grad_x
      const A added = gradient<Stream, Wanted>(x[k], grad_y[k], gains + k * W, scale.a, g[k], columns[k]);
      sum = k == 0 ? added : hw::add(sum, added);
      if (!Ring::used && k < next_packs) load_pack(k);
    }

    const auto store_grad_x = [&](A c) {
#pragma unroll
      for (int k = 0; k < N; ++k)
        if (k < stored) {
          if constexpr (summed && !early) load_grad_sum(k);
          grad_x_pack<exact, summed>(g[k], x[k], scale.a, c, grad_sum[k])
              .template store<true>(reinterpret_cast<Stream*>(cursor.grad_x), k * apart, p.d);
        }
    };
    if constexpr (Wanted::grad_x == GradX::at_once) store_grad_x(A(0));
    // needs_sums is true whenever this is compiled; but without the question ptxas takes two instructions more for
    // 16-bit rows.
    if (Wanted::sum && course.needs_sums) {
      sum = group_sum<true>(sum, ladder, at, slots, turn);
      if constexpr (Ring::used) ring.next(cursor.x, cursor.grad_y, turn, rows);  // all have read this row
      if (ladder.parts > 1) sum = cluster_sum(sum, ladder, at, slots, turn);
      lam = hw::fma(scale.per_lam, sum, lam);
      if constexpr (exact) {
        store_grad_x(factor_of_x(constants, scale, sum, dv));
      } else if (turn < written) {
        *reinterpret_cast<A*>(cursor.variance + course.to_grad_variance) = grad_variance_of(scale, sum);
      }
    }
    cursor.template write_next<summed>(course);
  }

  hw::let_next_grid_start();
  if (!Wanted::grad_weight && !out.lam) return;
  hw::block_barrier();  // the gains are read no more
  sum_within_warp<Wanted>(ladder, columns, lam);
  store_block_sums<Wanted>(p, at, ladder, course, columns, lam, block_columns, out);
}

template <class Branch, class Stream, class Wanted, bool summed>
BHYT_KERNEL_WITHIN(kMaxThreads, kRowRegisters)
backward_rows_persistent(const BackwardParams p, const Constants<float> constants, const Ladder ladder,
                         const Course course, const Partials<float> out) {
  block_rows<Branch, Stream, Wanted, summed>(p, constants, ladder, course, out);
}

}  // namespace
}  // namespace bhyt::cuda
