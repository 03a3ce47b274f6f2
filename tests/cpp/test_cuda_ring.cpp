// The backward with a ring of rows on the host: the bits of the first variant, in any order of threads.
#include "backward_cases.h"

namespace {

using cuda::BackwardVariant;
using simt::Order;

constexpr int64_t kHopper = 227 << 10;

// Bytes of shared memory that the row kernel of a call asks for; its outputs are those of the first variant.
int64_t shared_bytes(Case c, const Inputs& in, const Outputs& first, bool expect_ring) {
  simt::Machine& m = simt::machine();
  c.variant = BackwardVariant::ring;
  m.most_shared = c.shared_bytes;
  m.asked_shared = m.bulk_loaded = 0;
  const Outputs out = run(c, in);
  m.most_shared = 48 << 10;
  check(same(out, first) && out.work.bytes == first.work.bytes, "the bits of the first variant: " + c.text());
  check(m.bulk_loaded == (expect_ring ? 2 * c.rows * c.d * bhyt::size_of(c.stream) : 0),
        "each row comes once, where there is a ring: " + c.text());
  return m.asked_shared;
}

void test(Case c, int64_t stages) {
  c.shared_bytes = kHopper;
  const Inputs in = make_inputs(c);
  const Outputs first = run(c, in);
  compare(c, in, first);
  for (Order order : {Order::ascending, Order::descending, Order::shuffled}) {
    c.order = order;
    const int64_t bytes = shared_bytes(c, in, first, true);
    const cuda::Ladder l = cuda::backward_ladder(c.d, c.stream);
    const int64_t stage = int64_t(l.threads) * 16 * 2 * bhyt::size_of(c.stream), least = stages * stage;
    check(bytes > least && bytes < least + stage + (48 << 10), "as many rows as shared memory holds: " + c.text());
  }
}

// Where a ring does not suit, the first variant runs.
void elsewhere() {
  const auto first = [](Case c) {
    const Inputs in = make_inputs(c);
    check(shared_bytes(c, in, run(c, in), false) <= 48 << 10, "no ring: " + c.text());
  };
  Case c;
  c.branch = c.stream = DType::bf16, c.d = 16384, c.rows = 3, c.shared_bytes = kHopper;
  Case other = c;
  other.d = 8192;
  first(other);  // one block for a row
  other = c, other.branch = DType::bf16, other.stream = DType::f32;
  first(other);
  other = c, other.x_offset = 1;
  first(other);
  other = c, other.clusters = false;
  first(other);
  other = c, other.shared_bytes = 99 << 10;  // of compute capability 12.0: a stage takes 32 KB, the rest 41
  first(other);
  other = c, other.exact = false, other.wanted = {true, false, true, false};  // no sums of rows
  first(other);
  other.wanted = {false, true, true, true};  // no grad_x
  first(other);
}

}  // namespace

int main() {
  for (DType dtype : {DType::bf16, DType::f16, DType::f32})
    for (bool exact : {true, false})
      for (int64_t d : {8200, 16384, 20000, 65560, 131072}) {
        if (dtype == DType::f16 && d != 16384) continue;
        if (d > 100000 && (dtype == DType::f32 || !exact)) continue;
        Case c;
        c.branch = c.stream = dtype, c.exact = exact, c.d = d, c.multiprocessors = 16;
        c.rows = d < 10000 ? 15 : d < 60000 ? 9 : 5;  // of two clusters
        c.weight = d == 20000 ? -1 : d == 16384 ? int(DType::f32) : int(dtype);
        c.grad_sum = d % 16384 != 0, c.grad_variance = exact && d == 20000;
        if (d > 60000) c.wanted.weight = false;
        c.pad = d == 8200 ? 16 : 0;
        const int64_t threads = cuda::backward_ladder(d, dtype).threads;
        test(c, std::min<int64_t>(3, (kHopper - 304 - 80 * threads) / (32 * threads * bhyt::size_of(dtype))));
      }
  Case c;  // fewer rows than stages; rows that are repeated
  c.branch = c.stream = DType::bf16, c.d = 16384, c.rows = 1;
  test(c, 3);
  c.rows = 2, c.wanted = {true, true, true, false};
  test(c, 3);
  elsewhere();
  return rows::report("ring");
}
