// Forward:  v = mean(x^2),  a = lam / (kappa sqrt(v + offset + eps)),  y = weight * tanh(a x)
// where x may be a residual to which a branch is added first; the sum is stored, and v is that of the stored sum.
#include "dispatch.cuh"
#include "reduce.cuh"

namespace bhyt::cuda {
namespace {

// One row of the stream, as x or as a sum to be made: branch + residual, rounded.
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
        sum(static_cast<Stream*>(p.sum) + row * p.d) {}

  // What is read for one pack; turned into the stream's pack by make(). Apart, so that all loads go out before a store.
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

  template <bool wide>
  BHYT_DEVICE StreamPack make(const Raw& raw, int64_t first, int64_t d) const {
    if constexpr (residual_added) {
      A added[W];
#pragma unroll
      for (int j = 0; j < W; ++j)
        added[j] = hw::add(raw.branch.template get<A>(j), raw.residual.template get<A>(j));
      const StreamPack pack = StreamPack::of(added);
      pack.template store<wide>(sum, first, d);
      return pack;
    } else {
      return raw.branch;
    }
  }
};

template <class Branch, class A, class Stream, int W, class Weight>
BHYT_DEVICE Pack<Branch, W> site(const Pack<Stream, W>& pack, A a, const Gains<Weight, A, W>& gains) {
  A z[W], y[W];
#pragma unroll
  for (int j = 0; j < W; ++j) z[j] = hw::mul(a, pack.template get<A>(j));
  tanh_for<Stream>(z, y);
#pragma unroll
  for (int j = 0; j < W; ++j) y[j] = hw::mul(gains.get(j), y[j]);
  return Pack<Branch, W>::of(y);
}

template <class A, class Stream, int W>
BHYT_DEVICE A square_sum(const Pack<Stream, W>& pack) {
  A x[W];
  pack.get_all(x);
  return dot(x, x);
}

// Exact, wide: a thread keeps its N packs of the row in registers from the only read to the write. A row longer than a
// block is shared by a cluster.
template <class Branch, class Stream, class Weight, bool residual_added, int N>
BHYT_KERNEL(kMaxThreads) forward_row_in_registers(const ForwardParams p, const Constants<Accumulate<Stream>> constants,
                                              const Ladder ladder) {
  using A = Accumulate<Stream>;
  constexpr int W = kPackWidth<Stream>;
  using Row = StreamRow<Branch, Stream, residual_added>;
  auto& slots = *reinterpret_cast<SumSlots<A>*>(hw::shared());
  if (ladder.parts > 1) hw::cluster_arrive();
  const Place at;
  const int64_t row = hw::block_x() * ladder.groups + at.group;
  const bool inside = row < p.rows;
  const Row stream(p, row);
  const auto pack_of = [&](int k) { return (at.part * N + k) * ladder.threads + at.lane; };
  const auto exists = [&](int k) { return inside && pack_of(k) < ladder.row_packs; };

  typename Row::Raw raw[N];
  Gains<Weight, A, W> gains[N];
#pragma unroll
  for (int k = 0; k < N; ++k)
    if (exists(k)) raw[k] = stream.template load<true>(pack_of(k) * W, p.d);
#pragma unroll
  for (int k = 0; k < N; ++k)
    if (exists(k)) gains[k] = Gains<Weight, A, W>::template load<true>(p.weight, pack_of(k) * W, p.d);

  const SiteScalars<A> scalars(p, constants);

  Pack<Stream, W> x[N];
  A sum = 0;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    if (!exists(k)) continue;
    x[k] = stream.template make<true>(raw[k], pack_of(k) * W, p.d);
    sum = hw::add(sum, square_sum<A>(x[k]));
  }
  sum = group_sum(sum, ladder, at, slots, 0);
  if constexpr (std::is_same_v<A, float>)
    if (ladder.parts > 1) sum = cluster_sum(sum, ladder, at, slots, 0);

  const A v = hw::div(sum, constants.d);
  const A a = scalars(v).a;
  if (inside && at.part == 0 && at.lane == 0) static_cast<A*>(p.variance_out)[row] = v;
  Branch* y = static_cast<Branch*>(p.y) + row * p.d;
#pragma unroll
  for (int k = 0; k < N; ++k)
    if (exists(k)) site<Branch>(x[k], a, gains[k]).template store<true>(y, pack_of(k) * W, p.d);
}

// Exact, any alignment and length: the row is read for v and again for y. Same elements per thread and same order of
// sums as above, so the same bits.
template <class Branch, class Stream, bool residual_added, bool wide>
BHYT_KERNEL(kMaxThreads) forward_row_read_twice(const ForwardParams p, const Constants<Accumulate<Stream>> constants,
                                              const Ladder ladder) {
  using A = Accumulate<Stream>;
  constexpr int W = kPackWidth<Stream>;
  using StreamPack = Pack<Stream, W>;
  auto& slots = *reinterpret_cast<SumSlots<A>*>(hw::shared());
  const Place at;
  const int64_t row = hw::block_x() * ladder.groups + at.group;
  const bool inside = row < p.rows;
  const StreamRow<Branch, Stream, residual_added> stream(p, row);
  const SiteScalars<A> scalars(p, constants);

  A total = 0;
  for (int part = 0; part < ladder.parts; ++part) {
    A sum = 0;
    for (int k = 0; k < ladder.packs; ++k) {
      const int64_t pack = (int64_t(part) * ladder.packs + k) * ladder.threads + at.lane;
      if (!inside || pack >= ladder.row_packs) break;
      const auto raw = stream.template load<wide>(pack * W, p.d);
      sum = hw::add(sum, square_sum<A>(stream.template make<wide>(raw, pack * W, p.d)));
    }
    total = hw::add(total, group_sum(sum, ladder, at, slots, part));
  }
  if (!inside) return;

  const A v = hw::div(total, constants.d);
  const A a = scalars(v).a;
  if (at.lane == 0) static_cast<A*>(p.variance_out)[row] = v;
  Branch* y = static_cast<Branch*>(p.y) + row * p.d;
  for (int64_t pack = at.lane; pack < ladder.row_packs; pack += ladder.threads) {
    StreamPack x;  // of a sum: what this very thread stored above
    if constexpr (residual_added)
      x = StreamPack::template load<wide>(stream.sum, pack * W, p.d);
    else
      x = stream.template load<wide>(pack * W, p.d).branch;
    const auto gains = Gains<AnyFloat, A, W>::template load<wide>(p.weight, pack * W, p.d);
    site<Branch>(x, a, gains).template store<wide>(y, pack * W, p.d);
  }
}

constexpr int kApproxRows = 4;  // per thread, at most

// Approximate: v is given, so everything streams. A thread takes one pack of columns of up to kApproxRows rows.
template <class Branch, class Stream, class Weight, bool residual_added, bool wide>
BHYT_KERNEL(256) forward_approx_streaming(const ForwardParams p, const Constants<Accumulate<Stream>> constants,
                                      const int64_t row_packs, const int rows_per_thread) {
  using A = Accumulate<Stream>;
  constexpr int W = kPackWidth<Stream>;
  using Row = StreamRow<Branch, Stream, residual_added>;
  const int groups = hw::threads_y();
  const int64_t first_row = hw::block_x() * groups * rows_per_thread + hw::thread_y();
  const auto row_of = [&](int i) { return first_row + i * groups; };
  const auto exists = [&](int i) { return i < rows_per_thread && row_of(i) < p.rows; };
  const int64_t stride = int64_t(hw::blocks_y()) * hw::threads_x();

  for (int64_t pack = int64_t(hw::block_y()) * hw::threads_x() + hw::thread_x(); pack < row_packs; pack += stride) {
    typename Row::Raw raw[kApproxRows];
    A v[kApproxRows];
#pragma unroll
    for (int i = 0; i < kApproxRows; ++i)
      if (exists(i)) {
        raw[i] = Row(p, row_of(i)).template load<wide>(pack * W, p.d);
        v[i] = static_cast<const A*>(p.variance)[row_of(i)];
      }
    const auto gains = Gains<Weight, A, W>::template load<wide>(p.weight, pack * W, p.d);
    const SiteScalars<A> scalars(p, constants);
#pragma unroll
    for (int i = 0; i < kApproxRows; ++i)
      if (exists(i)) {
        const auto x = Row(p, row_of(i)).template make<wide>(raw[i], pack * W, p.d);
        Branch* y = static_cast<Branch*>(p.y) + row_of(i) * p.d;
        site<Branch>(x, scalars(v[i]).a, gains).template store<wide>(y, pack * W, p.d);
      }
  }
}

// Launches ---------------------------------------------------------------------------------------------------------

template <class Branch, class Stream, class Weight, bool residual_added>
cudaError_t exact_in_registers(const ForwardParams& p, const Ladder& ladder, Grid grid) {
  const auto constants = constants_of<Accumulate<Stream>>(p);
  grid.blocks_y = grid.cluster = ladder.parts;
  const auto run = [&](auto packs) {
    return launch(forward_row_in_registers<Branch, Stream, Weight, residual_added, decltype(packs)::value>, grid, p,
                  constants, ladder);
  };
  switch (ladder.packs) {
    case 1: return run(std::integral_constant<int, 1>());
    case 2: return run(std::integral_constant<int, 2>());
    case 4: return run(std::integral_constant<int, 4>());
    default: return cudaErrorInvalidValue;
  }
}

template <class Branch, class Stream, bool residual_added>
cudaError_t exact(const ForwardParams& p, const Device& device, cudaStream_t on) {
  const Ladder ladder = forward_ladder(p.d, p.stream);
  Grid grid;
  grid.blocks_x = ceil_div(p.rows, ladder.groups);
  grid.threads_x = ladder.threads;
  grid.threads_y = ladder.groups;
  grid.shared_bytes = sizeof(SumSlots<Accumulate<Stream>>);
  grid.stream = on;
  const auto constants = constants_of<Accumulate<Stream>>(p);
  const bool wide = is_wide(p);
  if constexpr (!std::is_same_v<Stream, double>) {
    const bool cluster = ladder.fits_a_cluster() && device.resident_clusters[cluster_index(ladder)] > 0;
    if (wide && (ladder.parts == 1 || cluster)) {
      if (p.weight.data == nullptr || p.weight.dtype == p.branch)
        return exact_in_registers<Branch, Stream, Branch, residual_added>(p, ladder, grid);
      if (p.weight.dtype == DType::f32)
        return exact_in_registers<Branch, Stream, float, residual_added>(p, ladder, grid);
    }
    if (wide) return launch(forward_row_read_twice<Branch, Stream, residual_added, true>, grid, p, constants, ladder);
  }
  return launch(forward_row_read_twice<Branch, Stream, residual_added, false>, grid, p, constants, ladder);
}

template <class Branch, class Stream, bool residual_added>
cudaError_t approx(const ForwardParams& p, const Device& device, cudaStream_t on) {
  const Columns columns = columns_for(p.d, p.stream, 256, 256);
  const int64_t row_packs = ceil_div(p.d, pack_width(p.stream));
  // One row per thread while that leaves multiprocessors idle: results do not depend on it.
  const int64_t blocks = ceil_div(p.rows, columns.groups) * columns.blocks;
  const int rows_per_thread = blocks >= int64_t(kApproxRows) * 4 * device.multiprocessors ? kApproxRows : 1;
  Grid grid;
  grid.blocks_x = ceil_div(p.rows, columns.groups * rows_per_thread);
  grid.blocks_y = columns.blocks;
  grid.threads_x = columns.threads;
  grid.threads_y = columns.groups;
  grid.stream = on;
  const auto run = [&](auto weight, auto wide) {
    using Weight = typename decltype(weight)::type;
    return launch(forward_approx_streaming<Branch, Stream, Weight, residual_added, decltype(wide)::value>, grid, p,
                  constants_of<Accumulate<Stream>>(p), row_packs, rows_per_thread);
  };
  if constexpr (!std::is_same_v<Stream, double>) {
    if (is_wide(p)) {
      if (p.weight.data == nullptr || p.weight.dtype == p.branch) return run(Type<Branch>(), std::true_type());
      if (p.weight.dtype == DType::f32) return run(Type<float>(), std::true_type());
    }
  }
  return run(Type<AnyFloat>(), std::false_type());
}

}  // namespace

cudaError_t forward(const ForwardParams& p, const Device& device, cudaStream_t on) {
  if (p.rows == 0 || (p.d == 0 && !p.exact)) return cudaSuccess;
  return with_types(p.branch, p.stream, [&](auto branch, auto stream) {
    using Branch = typename decltype(branch)::type;
    using Stream = typename decltype(stream)::type;
    if (p.residual.data != nullptr || !std::is_same_v<Branch, Stream>)
      return p.exact ? exact<Branch, Stream, true>(p, device, on) : approx<Branch, Stream, true>(p, device, on);
    if constexpr (std::is_same_v<Branch, Stream>)
      return p.exact ? exact<Branch, Stream, false>(p, device, on) : approx<Branch, Stream, false>(p, device, on);
    return cudaErrorInvalidValue;
  });
}

}  // namespace bhyt::cuda
