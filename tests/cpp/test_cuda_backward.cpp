// The backward kernels' source on the host, against float64.
#include "backward_cases.h"

namespace {

void invariances(const Case& c, const Inputs& in, const Outputs& out) {
  const auto moved = [&](int64_t pad, int64_t offset, int64_t first, int64_t count) {
    Inputs m;
    m.x = copy_of(in.x, c.d + pad, offset, first, count);
    m.grad_y = copy_of(in.grad_y, c.d + pad, offset, first, count);
    if (in.grad_sum) m.grad_sum = copy_of(in.grad_sum, c.d + pad, offset, first, count);
    m.variance = copy_of(in.variance, -1, 0, first, count);
    if (in.grad_variance) m.grad_variance = copy_of(in.grad_variance, -1, 0, first, count);
    if (in.weight) m.weight = copy_of(in.weight, -1, offset);
    m.lam = copy_of(in.lam, -1, 0);
    if (in.offset) m.offset = copy_of(in.offset, -1, 0);
    return m;
  };
  Case other = c;
  static int turn = 0;
  other.order = ++turn % 2 ? simt::Order::shuffled : simt::Order::descending;
  check(same(run(other, in), out), "the same bits in another order of threads: " + other.text());
  if (c.rows > 5 && c.d > 512) {  // several turns of groups that wait for one another
    other.order = simt::Order::shuffled;
    check(same(run(other, in), out), "the same bits when some warps run ahead: " + other.text());
  }
  if (c.expanded_grad_y) return;
  other.clusters = false;
  const Outputs elsewhere = run(other, moved(3, 1, 0, c.rows));
  check(same(elsewhere.x, out.x) && same(elsewhere.variance, out.variance),
        "the same bits unaligned and without clusters: " + c.text());
  compare(other, in, elsewhere);
  other = c;
  other.rows = 1;
  const Outputs alone = run(other, moved(0, 0, c.rows - 1, 1));
  check((!out.x || alone.x.same_bits(out.x, 0, c.rows - 1)) &&
            (!out.variance || alone.variance.same_bits(out.variance, 0, c.rows - 1)),
        "the same bits alone and in a batch: " + c.text());
}

// Every mask: the same bits, and no work for what it leaves out. An element takes at least one product for grad_x, one
// for S, two for g and one for grad_weight.
void masks(const Case& c, const Inputs& in, const Outputs& out) {
  Work work[16];
  for (int mask = 0; mask < 16; ++mask) {
    Case part = c;
    part.wanted = {bool(mask & 1), bool(mask & 2), bool(mask & 4), bool(mask & 8)};
    const Outputs some = run(part, in);
    check(same(some, out), "the same bits when less is wanted: " + part.text());
    work[mask] = some.work;
  }
  const auto needs_sums = [&](int mask) { return (mask & 8) || mask & (c.exact ? 1 : 2); };
  const auto needs_g = [&](int mask) { return (mask & 1) || needs_sums(mask); };
  const int64_t elements = c.rows * c.d;
  for (int mask = 0; mask < 16; ++mask)
    for (int one : {1, 2, 4, 8}) {
      if (!(mask & one)) continue;
      const int less = mask & ~one;
      const bool sums = needs_sums(mask) && !needs_sums(less), g = needs_g(mask) && !needs_g(less);
      const int64_t spared = elements * ((one == 1) + (one == 4) + sums + 2 * g);
      const auto text = c.text() + ", mask " + std::to_string(mask) + " without " + std::to_string(one);
      check(work[mask].products - work[less].products >= spared, "no products for what is left out: " + text);
      check(!sums || work[mask].shuffles - work[less].shuffles >= c.rows, "no exchange of sums: " + text);
      check(one != 4 || work[mask].bytes - work[less].bytes >= c.d * 4, "no partial sums of grad_weight: " + text);
      check(one != 8 || work[mask].bytes > work[less].bytes, "no partial sums of grad_lam: " + text);
    }
  for (int mask = 0; mask < 4; ++mask)
    check(needs_sums(mask) || work[mask].bytes == 0, "no workspace where nothing is summed: " + c.text());
  check(work[0].products == 0 && work[0].bytes == 0, "nothing is done where nothing is wanted: " + c.text());
}

void test(const Case& c, bool more = true) {
  const Inputs in = make_inputs(c);
  const Outputs out = run(c, in);
  compare(c, in, out);
  if (more) invariances(c, in, out);
}

// A grad_sum of 32 bits is brought into L2 once, by one instruction per row and part where there is one.
void prefetches(int64_t rows, int64_t d) {
  Case c;
  c.rows = rows, c.d = d, c.grad_sum = true, c.multiprocessors = 3;
  const Inputs in = make_inputs(c);
  simt::machine().prefetched = 0;
  const Outputs out = run(c, in);
  check(simt::machine().prefetched == rows * d * 4, "all of grad_sum is brought into L2: " + c.text());
  simt::machine().has_bulk_prefetch = false, simt::machine().prefetched = 0;
  check(same(run(c, in), out) && simt::machine().prefetched == 0, "the same bits without the instruction: " + c.text());
  simt::machine().has_bulk_prefetch = true;
}

void empty() {
  for (bool exact : {true, false})
    for (DType dtype : {DType::f32, DType::bf16, DType::f64}) {
      Case c;
      c.exact = exact, c.branch = c.stream = dtype;
      c.rows = 0;
      const Outputs none = run(c, make_inputs(c));
      for (int64_t i = 0; i < c.d; ++i) check(none.weight.get(0, i) == 0, "no rows: grad_weight is 0");
      check(none.lam.get(0, 0) == 0, "no rows: grad_lam is 0");
      c.rows = 2, c.d = 0;
      const Outputs narrow = run(c, make_inputs(c));
      check(narrow.lam.get(0, 0) == 0, "no columns: grad_lam is 0");
      if (!exact) check(narrow.variance.get(1, 0) == 0, "no columns: grad_variance is 0");
    }
}

}  // namespace

int main() {
  struct Types {
    DType branch, stream;
  };
  const Types types[] = {{DType::f32, DType::f32},  {DType::bf16, DType::bf16}, {DType::f16, DType::f16},
                         {DType::bf16, DType::f32}, {DType::f16, DType::f32},   {DType::f64, DType::f64},
                         {DType::bf16, DType::f64}, {DType::f16, DType::f64},   {DType::f32, DType::f64}};
  int turn = 0;
  for (const Types& t : types)
    for (bool exact : {true, false}) {
      Case c;
      c.branch = t.branch, c.stream = t.stream, c.exact = exact;
      for (int64_t d : {1, 7, 8, 48, 64, 127, 128, 256, 520, 768, 1000, 2048, 3584}) {
        if (t.stream == DType::f64 && d % 64 == 0) continue;  // has no wide kernels
        const int weights[] = {int(t.branch), int(DType::f32), -1, int(DType::f64), int(t.branch), int(DType::f16)};
        c.weight = weights[turn++ % 6];
        c.grad_sum = turn % 2, c.grad_variance = exact && turn % 3 != 0;
        c.d = d;
        c.rows = d < 500 ? 40 : 5;
        c.lam = DType(turn % 4);
        c.offset_dtype = exact ? -1 : turn % 5 - 1;
        test(c);
      }
      c.rows = 2, c.d = 72, c.grad_sum = true;
      for (c.x_offset = 0; c.x_offset < 8; ++c.x_offset) c.pad = c.x_offset % 3 * 4, test(c, false);
      c.x_offset = 0;
      for (c.pad = 1; c.pad <= 4; ++c.pad) test(c, false);  // the first row is aligned, the second is not
    }

  for (const Types& t : {types[0], types[1], types[3], types[5]})  // long rows: several parts, clusters, loops
    for (bool exact : {true, false})
      for (int64_t d : {8192, 16384, 20000, 40001, 131072}) {
        if (t.stream == DType::f64 && d > 20000) continue;
        Case c;
        c.branch = t.branch, c.stream = t.stream, c.exact = exact, c.d = d, c.rows = 3, c.multiprocessors = 16;
        c.weight = int(t.branch), c.grad_sum = exact;
        c.wanted.weight = d <= 20000 || (exact && t.stream == DType::bf16);  // the sums over rows take longest here
        test(c, d == 20000);
      }

  for (bool exact : {true, false})
    for (DType dtype : {DType::f32, DType::bf16}) {
      Case many;  // several turns of every persistent block, the last one short
      many.exact = exact, many.branch = many.stream = dtype;
      many.grad_variance = exact, many.grad_sum = !exact;
      many.rows = 1003, many.d = 40, many.pad = 8;
      test(many);
      many.rows = 37, many.d = 1032, many.pad = 0;
      test(many);
      many.rows = 9, many.d = 20000, many.multiprocessors = 5;  // a cluster of several parts, several turns
      test(many);
      Case blocks = many;  // more partial sums than a thread of sum_partials has on their way at once
      blocks.rows = 450, blocks.d = 7, blocks.multiprocessors = 32;
      test(blocks, false);
      Case some;
      some.exact = exact, some.branch = some.stream = dtype;
      for (int64_t d : {96, 8200})
        for (int64_t offset : {0, 1}) {
          if (d != 96 && offset == 0 && dtype == DType::f32) continue;
          some.rows = d == 96 ? 130 : 3, some.d = d, some.x_offset = offset;
          const Inputs in = make_inputs(some);
          masks(some, in, run(some, in));
        }
      Case expanded = some;
      expanded.d = 96, expanded.rows = 20, expanded.x_offset = 0, expanded.expanded_grad_y = true;
      test(expanded);
      Case saturated;
      saturated.exact = exact, saturated.branch = saturated.stream = dtype, saturated.d = 256, saturated.rows = 6;
      saturated.lam_value = 60;
      test(saturated);
      saturated.lam_value = 0;
      test(saturated);
    }
  prefetches(41, 40), prefetches(7, 1032), prefetches(5, 20004);
  empty();
  return rows::report("backward");
}
