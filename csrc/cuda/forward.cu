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

// Wide: a thread keeps its N packs of the row in registers from the only read to the write. A row longer than a block is
// shared by several, which form a cluster where they have a sum to make.
template <class Branch, class Stream, class Weight, bool residual_added, bool exact, int N>
BHYT_KERNEL(kMaxThreads) forward_row_in_registers(const ForwardParams p, const Constants<Accumulate<Stream>> constants,
                                              const Ladder ladder) {
  using A = Accumulate<Stream>;
  constexpr int W = kPackWidth<Stream>;
  using Row = StreamRow<Branch, Stream, residual_added>;
  auto& slots = *reinterpret_cast<SumSlots<A>*>(hw::shared());
  const Place at;
  if (exact && ladder.parts > 1) open_cluster(at, slots);
  const int64_t row = hw::block_x() * ladder.groups + at.group;
  const bool inside = row < p.rows;
  const Row stream(p, row);
  const auto pack_of = [&](int k) { return (at.part * N + k) * ladder.threads + at.lane; };
  const auto exists = [&](int k) { return inside && pack_of(k) < ladder.row_packs; };

  hw::wait_for_previous_grid();
  typename Row::Raw raw[N];
  Gains<Weight, A, W> gains[N];
#pragma unroll
  for (int k = 0; k < N; ++k)
    if (exists(k)) raw[k] = stream.template load<true>(pack_of(k) * W, p.d);
  A v = 1;
  if (!exact && inside) v = static_cast<const A*>(p.variance)[row];
#pragma unroll
  for (int k = 0; k < N; ++k) gains[k] = Gains<Weight, A, W>::ones();
  if (p.weight.data)
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
    if constexpr (exact) sum = hw::add(sum, square_sum<A>(x[k]));
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
  const A a = Scales<A>(scalars)(v).a;
  Branch* const y = static_cast<Branch*>(p.y) + row * p.d;
#pragma unroll
  for (int k = 0; k < N; ++k)
    if (exists(k)) site<Branch>(x[k], a, gains[k]).template store<true>(y, pack_of(k) * W, p.d);
}

// Any alignment and length: the row of an exact site is read for v and again for y. Same elements per thread and same
// order of sums as above, so the same bits.
template <class Branch, class Stream, bool residual_added, bool exact, bool wide>
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
  hw::wait_for_previous_grid();
  const SiteScalars<A> scalars(p, constants);

  A v = exact || !inside ? A(1) : static_cast<const A*>(p.variance)[row];
  if constexpr (exact) {
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
    v = mean_of(total, constants);
    if (inside && at.lane == 0) static_cast<A*>(p.variance_out)[row] = v;
  }
  if (!inside) return;

  const A a = Scales<A>(scalars)(v).a;
  Branch* const y = static_cast<Branch*>(p.y) + row * p.d;
  const int64_t stride = int64_t(hw::blocks_y()) * ladder.threads;
  for (int64_t pack = int64_t(at.part) * ladder.threads + at.lane; pack < ladder.row_packs; pack += stride) {
    StreamPack x;
    if constexpr (exact && residual_added) {
      x = StreamPack::template load<wide>(stream.sum, pack * W, p.d);  // what this very thread stored above
    } else {
      x = stream.template make<wide>(stream.template load<wide>(pack * W, p.d), pack * W, p.d);
    }
    const auto gains = Gains<AnyFloat, A, W>::template load<wide>(p.weight, pack * W, p.d);
    site<Branch>(x, a, gains).template store<wide>(y, pack * W, p.d);
  }
}

// Launches ---------------------------------------------------------------------------------------------------------

template <class Branch, class Stream, class Weight, bool residual_added, bool exact>
cudaError_t in_registers(const ForwardParams& p, const Ladder& ladder, const Grid& grid) {
  const auto constants = constants_of<Accumulate<Stream>>(p);
  const auto run = [&](auto packs) {
    return launch(forward_row_in_registers<Branch, Stream, Weight, residual_added, exact, decltype(packs)::value>, grid,
                  p, constants, ladder);
  };
  switch (ladder.packs) {
    case 1: return run(std::integral_constant<int, 1>());
    case 2: return run(std::integral_constant<int, 2>());
    case 4: return run(std::integral_constant<int, 4>());
    default: return cudaErrorInvalidValue;
  }
}

template <class Branch, class Stream, bool residual_added, bool exact>
cudaError_t run_form(const ForwardParams& p, const Device& device, cudaStream_t on) {
  const Ladder ladder = forward_ladder(p.d, p.stream);
  Grid grid;
  grid.blocks_x = ceil_div(p.rows, ladder.groups);
  grid.threads_x = ladder.threads;
  grid.threads_y = ladder.groups;
  grid.shared_bytes = sizeof(SumSlots<Accumulate<Stream>>);
  grid.overlaps_last = device.hopper_or_later;
  grid.stream = on;
  const bool wide = is_wide(p);
  if constexpr (!std::is_same_v<Stream, double>) {
    const bool own_dtype = p.weight.data == nullptr || p.weight.dtype == p.branch;
    const bool cluster = ladder.fits_a_cluster() && device.resident_clusters[cluster_index(ladder)] > 0;
    if (wide && (own_dtype || p.weight.dtype == DType::f32)) {
      grid.blocks_y = std::min(ladder.parts, kMaxGridY);
      if (exact) grid.cluster = grid.blocks_y;
      const auto run = [&](auto weight) {
        using Weight = typename decltype(weight)::type;
        return in_registers<Branch, Stream, Weight, residual_added, exact>(p, ladder, grid);
      };
      if (exact ? ladder.parts == 1 || cluster : ladder.parts <= kMaxGridY)
        return own_dtype ? run(Type<Branch>()) : run(Type<float>());
    }
  }
  // An approximate site's packs know nothing of each other; an exact one's block reads what it has stored.
  grid.blocks_y = exact ? 1 : std::min(ladder.parts, kMaxGridY);
  grid.cluster = 1;
  const auto constants = constants_of<Accumulate<Stream>>(p);
  if constexpr (!std::is_same_v<Stream, double>)
    if (wide)
      return launch(forward_row_read_twice<Branch, Stream, residual_added, exact, true>, grid, p, constants, ladder);
  return launch(forward_row_read_twice<Branch, Stream, residual_added, exact, false>, grid, p, constants, ladder);
}

}  // namespace

cudaError_t forward(const ForwardParams& p, const Device& device, cudaStream_t on) {
  if (p.rows == 0 || (p.d == 0 && !p.exact)) return cudaSuccess;
  return with_types(p.branch, p.stream, [&](auto branch, auto stream) {
    using Branch = typename decltype(branch)::type;
    using Stream = typename decltype(stream)::type;
    if (p.residual.data != nullptr || !std::is_same_v<Branch, Stream>)
      return p.exact ? run_form<Branch, Stream, true, true>(p, device, on)
                     : run_form<Branch, Stream, true, false>(p, device, on);
    if constexpr (std::is_same_v<Branch, Stream>)
      return p.exact ? run_form<Branch, Stream, false, true>(p, device, on)
                     : run_form<Branch, Stream, false, false>(p, device, on);
    return cudaErrorInvalidValue;
  });
}

}  // namespace bhyt::cuda
