// Forward:  v = mean(x^2),  a = lam / (kappa sqrt(v + offset + eps)),  y = weight * tanh(a x)
// where x may be a residual to which a branch is added first; the sum is stored, and v is that of the stored sum.
#pragma once

#include "dispatch.cuh"
#include "output.cuh"
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
        sum(static_cast<Stream*>(p.sum) + row * p.d) {
    hw::pin(branch);
    if constexpr (residual_added) hw::pin(residual);
  }

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

// y of one pack before it is rounded
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

// Whether 64 registers, so that two blocks of 512 threads share a multiprocessor, hold what a thread keeps: ptxas of CUDA
// 13.0 then does not spill.
template <class Stream, class Weight, bool residual_added>
constexpr bool fits_twice() {
  if (sizeof(Stream) == 4 || std::is_same_v<Weight, NoGain>) return true;
  const bool narrow = sizeof(Weight) == 2, brain = std::is_same_v<Stream, bf16>;
  if (residual_added) return narrow && brain && hw::kArch == 90;
  return narrow || (brain && hw::kArch != 80);
}

// Wide, rows counted in 32 bits: a thread keeps its N packs of the row in registers from the only read to the write. A
// row longer than a block is shared by several, which form a cluster where they have a sum to make.
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
  const Row stream(p, row);
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
    if (exists(k)) raw[k] = stream.template load<true>(pack_of(k) * W, p.d);
  }
  A v = 1;
  if (!exact && inside) v = static_cast<const A*>(p.variance)[row];
#pragma unroll
  for (int k = 0; k < N; ++k)
    if (exists(k)) gains[k] = Gains<Weight, A, W>::template load_given<true>(p.weight, pack_of(k) * W, p.d);
  const SiteScalars<A> scalars(p, constants, exact);
  if (exact && ladder.parts > 1) open_cluster(at, slots);

  Pack<Stream, W> x[N];
  A sum = 0;
  Stream* sum_row = stream.sum;
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

// Any alignment and length: the row of an exact site is read for v and again for y. Same elements per thread and same
// order of sums as above, so the same bits.
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
  const StreamRow<Branch, Stream, residual_added> stream(p, row);
  const auto stream_pack = [&](int64_t first) {
    const StreamPack pack = stream.make(stream.template load<wide>(first, p.d));
    if constexpr (residual_added) pack.template store<wide>(stream.sum, first, p.d);
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
        sum = hw::add(sum, square_sum<A>(stream_pack(pack * W)));
      }
      total = hw::add(total, group_sum(sum, ladder, at, slots, part));
    }
    v = mean_of(total, constants);
    if (inside && at.lane == 0) static_cast<A*>(p.variance_out)[row] = v;
  }
  if (!inside) return;

  const A a = Scales<A>(scalars)(v).a;
  Y* const y_row = static_cast<Y*>(p.y) + row * p.d;
  const int64_t stride = int64_t(hw::blocks_y()) * ladder.threads;
  for (int64_t pack = int64_t(at.part) * ladder.threads + at.lane; pack < ladder.row_packs; pack += stride) {
    StreamPack x;
    if constexpr (exact && residual_added) {
      x = StreamPack::template load<wide>(stream.sum, pack * W, p.d);  // what this very thread stored above
    } else {
      x = stream_pack(pack * W);
    }
    const auto gains = Gains<AnyFloat, A, W>::template load<wide>(p.weight, pack * W, p.d);
    A y[W];
    site<Y>(x, a, gains, y);
    output(y).template store<wide>(y_row, pack * W, p.d);
  }
}

// Launches ---------------------------------------------------------------------------------------------------------

template <class Branch, class Stream, class Weight, class Y, bool residual_added, bool exact>
cudaError_t in_registers(const ForwardParams& p, const Ladder& ladder, const Grid& grid) {
  using A = Accumulate<Stream>;
  const auto run = [&](auto packs) {
    return launch(forward_row_in_registers<Branch, Stream, Weight, Y, residual_added, exact, decltype(packs)::value>,
                  grid, p, constants_of<A>(p), ladder, Output<Y, A>(p));
  };
  return ladder.packs <= 2 ? run(std::integral_constant<int, 2>()) : run(std::integral_constant<int, kForwardPacks>());
}

// Which gains those kernels are compiled for: none, y's dtype, fp32; beside eight bits, into whose readers a gain is
// folded, none.
template <class Y>
bool gain_is_tuned(const ForwardParams& p) {
  return p.weight.data == nullptr ||
         (!std::is_same_v<Y, Byte> && (p.weight.dtype == p.branch || p.weight.dtype == DType::f32));
}

template <class Branch, class Stream, class Y, bool residual_added, bool exact>
cudaError_t in_registers(const ForwardParams& p, const Ladder& ladder, const Grid& grid) {
  if constexpr (!std::is_same_v<Y, Byte>) {
    if (p.weight.data && p.weight.dtype == p.branch)
      return in_registers<Branch, Stream, Branch, Y, residual_added, exact>(p, ladder, grid);
    if (p.weight.data) return in_registers<Branch, Stream, float, Y, residual_added, exact>(p, ladder, grid);
  }
  return in_registers<Branch, Stream, NoGain, Y, residual_added, exact>(p, ladder, grid);
}

template <class Branch, class Stream, class Y, bool residual_added, bool exact>
cudaError_t run_form(const ForwardParams& p, const Device& device, cudaStream_t on) {
  using A = Accumulate<Stream>;
  const Ladder ladder = forward_ladder(p.d, p.stream);
  Grid grid;
  grid.blocks_x = ceil_div(p.rows, ladder.groups);
  grid.threads_x = ladder.threads;
  grid.threads_y = ladder.groups;
  grid.shared_bytes = sizeof(SumSlots<A>);
  grid.overlaps_last = device.hopper_or_later;
  grid.stream = on;
  const bool wide = is_wide(p);
  if constexpr (!std::is_same_v<Stream, double>) {
    const bool cluster = ladder.fits_a_cluster() && device.resident_clusters[cluster_index(ladder)] > 0;
    const bool reaches = exact ? ladder.parts == 1 || cluster : ladder.parts <= kMaxGridY;
    if (wide && reaches && p.rows <= kMaxRows && gain_is_tuned<Y>(p)) {
      grid.blocks_y = ladder.parts;
      if (exact) grid.cluster = ladder.parts;
      return in_registers<Branch, Stream, Y, residual_added, exact>(p, ladder, grid);
    }
  }
  // An approximate site's packs know nothing of each other; an exact one's block reads what it has stored.
  grid.blocks_y = exact ? 1 : std::min(ladder.parts, kMaxGridY);
  const auto run = [&](auto is_wide) {
    return launch(forward_row_read_twice<Branch, Stream, Y, residual_added, exact, decltype(is_wide)::value>, grid, p,
                  constants_of<A>(p), ladder, Output<Y, A>(p));
  };
  if constexpr (!std::is_same_v<Stream, double>)
    if (wide) return run(std::true_type());
  return run(std::false_type());
}

// Y: Byte, or void for the branch's dtype
template <class Y>
cudaError_t run_forward(const ForwardParams& p, const Device& device, cudaStream_t on) {
  if (p.rows == 0 || (p.d == 0 && !p.exact)) return cudaSuccess;
  return with_types(p.branch, p.stream, [&](auto branch, auto stream) {
    using Branch = typename decltype(branch)::type;
    using Stream = typename decltype(stream)::type;
    using Stored = std::conditional_t<std::is_void_v<Y>, Branch, Y>;
    if (p.residual.data != nullptr || !std::is_same_v<Branch, Stream>)
      return p.exact ? run_form<Branch, Stream, Stored, true, true>(p, device, on)
                     : run_form<Branch, Stream, Stored, true, false>(p, device, on);
    if constexpr (std::is_same_v<Branch, Stream>)
      return p.exact ? run_form<Branch, Stream, Stored, false, true>(p, device, on)
                     : run_form<Branch, Stream, Stored, false, false>(p, device, on);
    return cudaErrorInvalidValue;
  });
}

}  // namespace
}  // namespace bhyt::cuda
