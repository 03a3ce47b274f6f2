// Which threads handle which elements. Plain functions of sizes, dtypes and addresses; tested on the host.
//
// A row is cut into packs of 16 bytes of its stream. `parts` blocks (one, except for very long rows) of `threads` each
// share it. A thread takes up to `packs` of its packs: number (part * packs + k) * threads + lane for its k-th. This
// fixes the order of the row's sum. It depends on d and the stream's dtype alone, so that a row's bits do not depend on
// its batch, its alignment or the device.
#pragma once

#include <algorithm>
#include <cstdint>

#include "launch.h"

namespace bhyt::cuda {

constexpr int kMaxThreads = 512;
constexpr int kColumnThreads = 128;
constexpr int kMaxClusterParts = 16;
constexpr int kMaxGridY = 65535;
constexpr int64_t kMaxRows = 1 << 30;  // leaves room for the groups of the last block when rows are counted in 32 bits

struct Ladder {
  int threads = 1;  // per part of a row: a power of two up to 32, or a multiple of 32
  int packs = 1;    // per thread
  int parts = 1;    // per row
  int groups = 1;   // groups of `threads` in a block, each with a row of its own
  int most_parts = 1;  // of a cluster
  int64_t row_packs = 0;

  bool fits_a_cluster() const { return parts <= most_parts; }
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int power_of_two_from(int64_t n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

// At most `packs` per thread; short rows share a block of `block_threads`, long ones a cluster of up to `most_parts`.
inline Ladder ladder_for(int64_t d, int pack_width, int packs, int block_threads, int most_parts) {
  Ladder l;
  l.most_parts = most_parts;
  l.row_packs = ceil_div(d, pack_width);
  if (l.row_packs <= 32 * packs) {
    // At least 4 lanes, for 64 neighbouring bytes; not more than needed, as each lane repeats the work that is done per
    // row.
    l.threads = power_of_two_from(std::max(std::min<int64_t>(l.row_packs, 4), ceil_div(l.row_packs, packs)));
    l.packs = power_of_two_from(ceil_div(l.row_packs, l.threads));
  } else {
    int64_t parts = ceil_div(l.row_packs, int64_t(kMaxThreads) * packs);
    if (parts <= most_parts) parts = power_of_two_from(parts);
    l.parts = static_cast<int>(parts);
    l.packs = packs;
    l.threads = static_cast<int>(ceil_div(ceil_div(l.row_packs, parts * packs), 32) * 32);
  }
  l.groups = l.threads < block_threads ? block_threads / l.threads : 1;
  return l;
}

constexpr int kForwardPacks = 4;            // 64 bytes in flight per thread
constexpr int kBackwardElements = 16;       // per thread, whose fp32 sums of grad_weight stay in registers
constexpr int pack_width(DType stream) { return static_cast<int>(16 / size_of(stream)); }

inline Ladder forward_ladder(int64_t d, DType stream) {
  return ladder_for(d, pack_width(stream), kForwardPacks, 128, kPortableCluster);
}

// A block takes half of a multiprocessor's registers or more. So there are few blocks, and few partial sums of
// grad_weight.
inline Ladder backward_ladder(int64_t d, DType stream) {
  return ladder_for(d, pack_width(stream), kBackwardElements / pack_width(stream), kMaxThreads, kMaxClusterParts);
}

// The i of 2^i = parts: the index into Device::resident_clusters.
inline int cluster_index(const Ladder& l) {
  int i = 0;
  while (1 << i < l.parts) ++i;
  return i;
}

// Blocks of a persistent kernel on a multiprocessor. 512 threads take its registers; where a block has at most half as
// many, because its threads divide 512 badly, there are two.
inline int blocks_per_multiprocessor(const Ladder& l) {
  return l.parts == 1 && l.threads * l.groups <= kMaxThreads / 2 ? 2 : 1;
}

// Blocks of a persistent kernel along the rows, at most: as many as run at once.
inline int64_t persistent_blocks(const Ladder& l, const Device& device) {
  if (l.parts > 1) return device.resident_clusters[cluster_index(l)];
  return int64_t(device.multiprocessors) * blocks_per_multiprocessor(l);
}

// Of at most `most` blocks so many that all go through equally many rows, where the rows allow it: a last turn of a few
// blocks takes as long as one of all.
inline int64_t even_blocks(int64_t rows, int groups, int64_t most) {
  const int64_t turns = ceil_div(rows, groups * most);
  return ceil_div(rows, groups * turns);
}

// A kernel in which a thread keeps to one pack of columns and goes through rows.
struct Columns {
  int threads = 1;     // packs of columns per block
  int64_t blocks = 1;  // along the row
};

inline Columns columns_for(int64_t d, DType stream) {
  Columns c;
  const int64_t packs = d > 0 ? ceil_div(d, pack_width(stream)) : 1;
  c.blocks = ceil_div(packs, kColumnThreads);
  c.threads = static_cast<int>(ceil_div(packs, c.blocks));
  if (c.blocks > 1) c.threads = static_cast<int>(ceil_div(c.threads, 32) * 32);
  if (c.blocks > kMaxGridY) c.blocks = kMaxGridY;  // a thread then takes several packs, 65535 blocks apart
  return c;
}

// Whether every pack of every row starts on a multiple of the bytes of one access.
inline bool packs_are_aligned(const Rows& t, DType dtype, int pack_width) {
  if (t.data == nullptr) return true;
  const int64_t pack = pack_width * size_of(dtype), access = pack < 16 ? pack : 16;
  return reinterpret_cast<uintptr_t>(t.data) % access == 0 && t.stride * size_of(dtype) % access == 0;
}

inline bool is_wide(const ForwardParams& p) {
  const int w = pack_width(p.stream);
  const DType y = p.quantization ? p.quantization->dtype : p.branch;
  return p.d % w == 0 && packs_are_aligned(p.x, p.branch, w) && packs_are_aligned(p.residual, p.stream, w) &&
         packs_are_aligned({p.y, p.d}, y, w) && packs_are_aligned({p.sum, p.d}, p.stream, w) &&
         packs_are_aligned({p.weight.data, 0}, p.weight.dtype, w);
}

inline bool is_wide(const BackwardParams& p) {
  const int w = pack_width(p.stream);
  return p.d % w == 0 && packs_are_aligned(p.x, p.stream, w) && packs_are_aligned(p.grad_y, p.branch, w) &&
         packs_are_aligned(p.grad_sum, p.stream, w) && packs_are_aligned({p.grad_x, p.d}, p.stream, w) &&
         packs_are_aligned({p.weight.data, 0}, p.weight.dtype, w);
}

}  // namespace bhyt::cuda
