// The choice of configuration: every element has one thread, sizes are legal, and only d and the dtype decide.
#include "ladder.h"

#include <vector>

#include "rows.h"

using namespace bhyt;
using namespace bhyt::cuda;
using rows::check;

namespace {

std::vector<int64_t> lengths() {
  std::vector<int64_t> d;
  for (int64_t i = 1; i <= 1100; ++i) d.push_back(i);
  for (int64_t i = 1024; i <= 1 << 18; i = i * 5 / 4 + 1) d.insert(d.end(), {i, i + 1, i / 8 * 8});
  for (int64_t i = 1024; i <= 1 << 20; i *= 2) d.insert(d.end(), {i - 1, i, i + 1});
  return d;
}

void ladder(const Ladder& l, int64_t d, int width, int most_packs) {
  const std::string at = "d=" + std::to_string(d) + " width=" + std::to_string(width);
  check(l.row_packs == (d + width - 1) / width, "packs cover the row: " + at);
  const bool in_warp = l.threads <= 32;
  check(in_warp ? 32 % l.threads == 0 : l.threads % 32 == 0, "a group is part of a warp or whole warps: " + at);
  check(l.threads * l.groups <= kMaxThreads && (l.threads * l.groups) % 32 == 0, "a block is legal: " + at);
  check(in_warp || l.groups <= 15, "enough named barriers: " + at);
  check(in_warp ? l.parts == 1 : true, "short rows are not cut: " + at);
  check(l.packs == 1 || l.packs == 2 || l.packs == 4, "compiled for so many packs: " + at);
  check(l.packs <= most_packs, "no more packs than registers: " + at);
  check(!l.fits_a_cluster() || power_of_two_from(l.parts) == l.parts, "a cluster is a power of two: " + at);
  check(int64_t(l.parts) * l.packs * l.threads >= l.row_packs, "every pack has a thread: " + at);
  if (l.row_packs > 64 * 1024) return;
  std::vector<char> seen(l.row_packs, 0);
  for (int part = 0; part < l.parts; ++part)
    for (int k = 0; k < l.packs; ++k)
      for (int lane = 0; lane < l.threads; ++lane) {
        const int64_t pack = (int64_t(part) * l.packs + k) * l.threads + lane;
        if (pack < l.row_packs) ++seen[pack];
      }
  bool once = true;
  for (char n : seen) once &= n == 1;
  check(once, "every pack has one thread: " + at);
  const double used = double(l.row_packs) / (int64_t(l.parts) * l.packs * l.threads);
  check(d < 64 || used >= 0.5, "no more than half of the threads idle: " + at);
}

void columns(int64_t d, DType dtype) {
  const std::string at = "columns of d=" + std::to_string(d);
  const Columns c = columns_for(d, dtype);
  check(c.threads >= 1 && c.threads <= kColumnThreads, "a block is legal: " + at);
  check(c.blocks == 65535 || c.blocks * c.threads >= ceil_div(d, pack_width(dtype)), "the grid covers the row: " + at);
}

void alignment() {
  alignas(64) static char memory[256];
  const auto wide = [&](DType dtype, int64_t d, int64_t stride, int offset, DType weight, int weight_offset) {
    ForwardParams p;
    p.d = d, p.branch = p.stream = dtype;
    p.x = {memory + offset, stride};
    p.y = memory;
    p.weight = {memory + weight_offset, weight};
    return is_wide(p);
  };
  check(wide(DType::bf16, 64, 64, 0, DType::bf16, 0), "dense bf16 rows are wide");
  check(wide(DType::bf16, 64, 72, 16, DType::f32, 16), "as are rows 16 bytes on");
  check(!wide(DType::bf16, 60, 64, 0, DType::bf16, 0), "d is no whole number of packs");
  check(!wide(DType::bf16, 64, 68, 0, DType::bf16, 0), "rows step by 8 bytes");
  check(!wide(DType::bf16, 64, 64, 2, DType::bf16, 0), "x starts off a pack");
  check(!wide(DType::bf16, 64, 64, 0, DType::bf16, 8), "weight starts off a pack");
  check(wide(DType::f32, 64, 68, 0, DType::bf16, 8), "4 bf16 gains are an access of 8 bytes");
  const auto wide_bytes = [&](DType stream, int offset) {
    ForwardParams p;
    p.d = 64, p.branch = p.stream = stream, p.quantization = Quantization();
    p.x = {memory, 64};
    p.y = memory + offset;
    return is_wide(p);
  };
  check(wide_bytes(DType::bf16, 8) && !wide_bytes(DType::bf16, 4), "8 bytes of a quantised y are one access");
  check(wide_bytes(DType::f32, 4) && !wide_bytes(DType::f32, 2), "as are 4 beside fp32");
  BackwardParams b;
  b.d = 64, b.branch = DType::bf16, b.stream = DType::f32;
  b.x = {memory, 64}, b.grad_y = {memory + 8, 64}, b.grad_x = memory;
  check(is_wide(b), "a bf16 branch on an fp32 stream moves by 8 bytes");
  b.grad_y.data = memory + 4;
  check(!is_wide(b), "or not at all");
  b.grad_y = {memory, 0};
  check(is_wide(b), "a repeated row is as good as any");
  b.grad_sum = {memory + 4, 64};
  check(!is_wide(b), "grad_sum counts");
}

// Blocks of persistent kernels fit the multiprocessor's registers, 128 per thread.
void persistent(const Ladder& l) {
  Device device;
  device.multiprocessors = 132;
  device.resident_clusters[1] = 66, device.resident_clusters[2] = 32;
  device.resident_clusters[3] = 16, device.resident_clusters[4] = 8;
  check(persistent_blocks(l, device) * l.parts <= 2 * 132, "persistent blocks fit");
  check(blocks_per_multiprocessor(l) * l.threads * l.groups <= 512, "persistent blocks' registers fit");
  check(!l.fits_a_cluster() || l.threads * l.groups >= 256, "a persistent block has two teams for the sums at least");
}

// Every group has a row in the first turn, and no fewer turns would do; most blocks may have rows in the last one too.
void even() {
  for (int64_t rows = 1; rows < 5000; rows += rows < 300 ? 1 : 37)
    for (int groups : {1, 2, 3, 16, 128})
      for (int64_t most : {1, 3, 16, 132, 264}) {
        const int64_t blocks = even_blocks(rows, groups, most), turns = ceil_div(rows, groups * most);
        const auto at = std::to_string(rows) + " rows, " + std::to_string(groups) + " groups, " + std::to_string(most);
        check(blocks >= 1 && blocks <= most && (blocks - 1) * groups < rows, "every block has a row: " + at);
        check(blocks * groups * turns >= rows, "no more turns than all blocks take: " + at);
        check((blocks - 1) * groups * turns < rows, "and no fewer blocks would do: " + at);
      }
  check(even_blocks(8192, 2, 132) == 128, "4096: 128 blocks of 64 rows, not 132 of 62 and four rows more");
}

}  // namespace

int main() {
  for (int64_t d : lengths())
    for (DType dtype : {DType::f16, DType::f32, DType::f64}) {
      ladder(forward_ladder(d, dtype), d, pack_width(dtype), kForwardPacks);
      const Ladder backward = backward_ladder(d, dtype);
      if (dtype != DType::f64) ladder(backward, d, pack_width(dtype), kBackwardElements / pack_width(dtype));
      if (backward.fits_a_cluster() && dtype != DType::f64) persistent(backward);
      columns(d, dtype);
    }
  for (int64_t d : {int64_t(1) << 31, int64_t(1) << 40})
    check(columns_for(d, DType::f16).blocks == 65535, "a row longer than the grid");
  check(forward_ladder(4096, DType::bf16).threads == 128, "4096 in bf16: 4 packs for each of 128 threads");
  check(forward_ladder(64, DType::bf16).groups == 32, "32 short rows share a block");
  check(forward_ladder(131072, DType::bf16).parts == 8, "131072 in bf16 fits a cluster");
  check(backward_ladder(131072, DType::bf16).parts == 16 && backward_ladder(131072, DType::bf16).fits_a_cluster(),
        "backward: 131072 takes a cluster of 16");
  check(!backward_ladder(131080, DType::bf16).fits_a_cluster(), "and no row is longer than that");
  check(forward_ladder(131080, DType::bf16).parts == 9 && !forward_ladder(131080, DType::bf16).fits_a_cluster(),
        "forward: clusters of 8 at most");
  check(backward_ladder(4096, DType::bf16).groups == 2, "backward: two rows of 256 threads share a block");
  alignment();
  even();
  return rows::report("ladder");
}
