"""Breaks of the backward's variants, for mutations.py."""

from mutants import Mutant

ONE, TICKETS = ("one_launch",), ("device",)
KERNEL, PLAN = "backward_one_launch.cuh", "backward_one_launch.cu"
CUDA_VARIANTS = (
    Mutant(KERNEL, "  hw::block_barrier();  // the partial sums are written\n", "", ONE),
    Mutant(KERNEL, "== blocks - 1;", "== blocks - 2;", ONE),
    Mutant(KERNEL, "look < kPatience;", "look < 0;", ONE),
    Mutant(KERNEL, "all ? 1 : kGaveUp", "1", ONE),
    Mutant(KERNEL, "tickets.arrived = tickets.taken = 0;", "tickets.taken = 0;", ONE),
    Mutant(KERNEL, "tickets.arrived = tickets.taken = 0;", "tickets.arrived = 0;", ONE),
    Mutant(KERNEL, "return all ? before & (kGaveUp - 1) :", "return all ? before :", ONE),
    Mutant(KERNEL, "(taken & (kGaveUp - 1)) + taken / kGaveUp", "(taken & (kGaveUp - 1))", ONE),
    Mutant(KERNEL, "== shares + blocks;", "== shares + blocks - 1;", ONE),
    Mutant(KERNEL, " * hw::blocks_y();", ";", ONE),
    Mutant(KERNEL, "    hw::block_barrier();\n    const uint32_t share", "    const uint32_t share", ONE),
    Mutant(KERNEL, "numbers[(turn + 1) & 1] =", "numbers[turn & 1] =", ONE),
    Mutant(KERNEL, "      wait();  // the sums of the stripe before have been read\n", "", ONE),
    Mutant(KERNEL, "for_lam = share == finish.shares - 1;", "for_lam = share == 0;", ONE),
    Mutant(KERNEL, "team < teams && stripe < end", "stripe < end", ONE),
    Mutant(KERNEL, "stripe < end; stripe += teams", "stripe < end; stripe += teams + 1", ONE),
    Mutant(KERNEL, "stripe = first + team;", "stripe = first;", ONE),
    Mutant(KERNEL, "all_tickets[finish.ticket];", "all_tickets[0];", ONE),
    Mutant(PLAN, "sizeof(SumSlots<float>) + sums);", "0);", ONE),
    Mutant(PLAN, " + 2 * sizeof(uint32_t);", ";", ONE),
    Mutant(PLAN, "plan.blocks * ladder.parts) * teams;", "plan.blocks * ladder.parts);", ONE),
    Mutant(PLAN, "p.grad_weight ? ceil_div(p.d, kStripe) : 0;", "ceil_div(p.d, kStripe);", ONE),
    Mutant("backward_plan.cuh", "return plan.persistent && (p.grad_weight", "return (p.grad_weight", ONE),
    Mutant("backward_plan.cuh", "plan.persistent && (p.grad_weight || p.grad_lam);", "plan.persistent;", ONE),
    Mutant("backward_plan.cuh", "(p.grad_weight || p.grad_lam);", "p.grad_weight;", ONE),
    Mutant("backward.cu", "if (error != cudaSuccess || ticket != kNoTicket)", "", ONE),
    Mutant("tickets.h", "next == kStreamTickets ?", "next == kTickets ?", TICKETS),
    Mutant("tickets.h", "int next_ = kStreamTickets;", "int next_ = 0;", TICKETS),
    Mutant("tickets.h", "    free_.pop_back();\n", "", TICKETS),
    Mutant("tickets.h", "    if (found != streams_.end()) return found->second;\n", "", TICKETS),
    Mutant("tickets.h", "  if (!captured) {", "  if (true) {", TICKETS),
    Mutant("tickets.h", "    self->book->give_back(self->ticket);\n", "", TICKETS),
    Mutant("tickets.h", "next_ < kTickets ?", "next_ <= kTickets ?", TICKETS),
    Mutant("launch.h", "if (name == nullptr || *name == 0) return true;", "if (name == nullptr) return true;", TICKETS),
)
