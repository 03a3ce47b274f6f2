// The backward in one launch on the host: the bits of two launches, whichever blocks run at once, and in any order.
#include "backward_cases.h"

namespace {

using cuda::BackwardVariant;
using simt::Order;

bool counters_are_zero() {
  for (const cuda::Tickets& t : cuda::all_tickets)
    if (t.arrived || t.taken) return false;
  return true;
}

int64_t blocks_of_grid() { return simt::machine().blocks_x * simt::machine().blocks_y; }

// Blocks that have added a share, or more, of the sums: they have counted as arrived, and taken two numbers.
int64_t blocks_that_added() {
  int64_t blocks = 0;
  for (int counted : simt::machine().counted) blocks += counted > 2;
  return blocks;
}

// In the order of threads and blocks, with so many clusters at once.
Outputs run_as(Case c, const Inputs& in, Order threads, Order blocks, int at_once) {
  simt::Machine& m = simt::machine();
  c.variant = BackwardVariant::one_launch, c.order = threads;
  m.block_order = blocks, m.at_once = at_once;
  m.launches = 0;
  tickets_asked = 0;
  Outputs out = run(c, in);
  const std::string text = c.text() + ", " + std::to_string(at_once) + " of " + std::to_string(m.blocks_x) +
                           " at once, order of blocks " + std::to_string(int(blocks));
  check(m.launches == 1 && tickets_asked == 1, "one launch: " + text);
  check(counters_are_zero(), "the counters are zero again: " + text);
  int64_t counted = 0, most = 0;
  for (int n : m.counted) counted += n, most = std::max<int64_t>(most, n);
  const int64_t shares = counted - 2 * blocks_of_grid();
  check(shares >= 1 && shares <= blocks_of_grid() + 1, "a share for each block and lam's: " + text);
  if (at_once == 1 && m.cluster == 1)  // nobody waits beside the last one
    check(blocks_that_added() == 1 && most == 2 + shares, "the last block adds every share: " + text);
  m.block_order = Order::ascending, m.at_once = 1;
  return out;
}

void test(const Case& c, bool all_orders, int most_at_once = 1000) {
  const Inputs in = make_inputs(c);
  const Outputs two = run(c, in);
  compare(c, in, two);
  constexpr Order orders[] = {Order::ascending, Order::descending, Order::shuffled};
  for (Order threads : orders)
    for (Order blocks : orders)
      for (int at_once : {1, 3, 1000}) {
        if (!all_orders && (threads != blocks || at_once == (threads == Order::shuffled ? 1 : 3))) continue;
        const Outputs one = run_as(c, in, threads, blocks, std::min(at_once, most_at_once));
        check(same(one, two) && one.work.bytes == two.work.bytes, "the bits of two launches: " + c.text());
      }
}

// Blocks that wait add shares too, several where there are several for each.
void shared_out() {
  Case c;
  c.rows = 64, c.d = 1024, c.multiprocessors = 8;
  const Inputs in = make_inputs(c);
  run_as(c, in, Order::shuffled, Order::ascending, 1000);
  check(simt::machine().blocks_x == 8 && blocks_that_added() > 3, "blocks that wait add shares: " + c.text());
  run_as(c, in, Order::shuffled, Order::ascending, 4);  // the first four are out of patience
  check(blocks_that_added() > 1 && blocks_that_added() <= 4, "of the blocks that still wait: " + c.text());
}

// A call uses its own counters alone: others belong to calls at the same time.
void own_counters() {
  Case c;
  c.rows = 20, c.variant = BackwardVariant::one_launch;
  const Inputs in = make_inputs(c);
  for (cuda::Tickets& t : cuda::all_tickets) t.arrived = 1, t.taken = 1;
  for (int ticket : {0, 1, cuda::kTickets - 1}) {
    cuda::all_tickets[ticket] = {};
    ticket_given = ticket;
    compare(c, in, run(c, in));
    cuda::Tickets& own = cuda::all_tickets[ticket];
    check(own.arrived == 0 && own.taken == 0, "a call's counters are zero again");
    own.arrived = own.taken = 1;  // not those of the next call
  }
  bool untouched = true;
  for (const cuda::Tickets& t : cuda::all_tickets) untouched &= t.arrived == 1 && t.taken == 1;
  check(untouched, "the other calls' counters are theirs");
  for (cuda::Tickets& t : cuda::all_tickets) t = {};
  ticket_given = 0;
}

// A call that it does not suit takes two launches, and asks for no counters; so does one for which there are none.
void elsewhere() {
  const auto launches = [](Case c, bool asks) {
    const Inputs in = make_inputs(c);
    const Outputs two = run(c, in);
    c.variant = BackwardVariant::one_launch;
    const int64_t before = simt::machine().launches;
    tickets_asked = 0;
    check(same(run(c, in), two) && tickets_asked == asks, "the bits of two launches: " + c.text());
    return simt::machine().launches - before;
  };
  Case wide, unaligned, f64, unsummed;
  unaligned.x_offset = 1;
  f64.stream = f64.branch = DType::f64;
  unsummed.exact = false, unsummed.wanted.weight = unsummed.wanted.lam = unsummed.wanted.variance = false;
  ticket_given = cuda::kNoTicket;
  check(launches(wide, true) == 2, "two launches where there are no counters");
  ticket_given = 0;
  check(launches(wide, true) == 1 && launches(unaligned, false) == 3 && launches(f64, false) == 3,
        "as many launches as before where one does not suit");
  check(launches(unsummed, false) == 1, "nothing is added where nothing is wanted");
  wide.rows = 0;
  check(launches(wide, false) == 1, "no rows: grad_weight is written");
}

}  // namespace

int main() {
  struct Types {
    DType branch, stream;
  };
  const Types types[] = {{DType::f32, DType::f32}, {DType::bf16, DType::bf16}, {DType::f16, DType::f16},
                         {DType::bf16, DType::f32}, {DType::f16, DType::f32}};
  int turn = 0;
  for (const Types& t : types)
    for (bool exact : {true, false})
      for (int64_t d : {8, 48, 256, 520, 1032, 2560, 8192}) {
        Case c;
        c.branch = t.branch, c.stream = t.stream, c.exact = exact, c.d = d;
        c.rows = d == 8 ? 600 : d < 100 ? 300 : d < 1000 ? 35 : 9, c.multiprocessors = d < 100 ? 5 : 4;
        if (t.branch != t.stream && d % 16 == 0) continue;
        const int weights[] = {int(t.branch), int(DType::f32), -1};
        c.weight = weights[turn++ % 3], c.grad_sum = turn % 2, c.grad_variance = exact && turn % 3 == 0;
        c.lam = DType(turn % 4);
        test(c, d == 520 && t.branch == DType::bf16);
        c.wanted = {turn % 4 != 0, turn % 3 != 0, turn % 2 == 0, turn % 2 != 0 || c.weight < 0};
        test(c, false);
      }
  for (bool exact : {true, false})  // clusters
    for (int64_t d : {16384, 40000}) {
      Case c;
      c.branch = c.stream = d == 16384 ? DType::bf16 : DType::f32, c.weight = int(c.branch);
      c.exact = exact, c.rows = 5, c.d = d, c.multiprocessors = 16;
      test(c, false);
    }
  Case many;  // more partial sums than a thread asks for at once, and more blocks than columns
  many.rows = 160 * 128, many.d = 8, many.multiprocessors = 160;
  test(many, false, 8);
  shared_out();
  own_counters();
  elsewhere();
  return rows::report("one launch");
}
