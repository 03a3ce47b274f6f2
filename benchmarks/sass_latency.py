"""What a thread waits for, by a model of latencies: a warp alone issues in order, one instruction a cycle, each when
what it reads is there. Enough to tell code that waits for memory once from code that waits for it again and again."""

import re
from typing import Iterable, Iterator

from sass import Code, Instruction

# Cycles until a result can be used; of loads, of one that L2 has.
LATENCIES = (
    (r"LDG|LD\b|ATOM", 285), (r"LDS|S2U?R|SYNCS|BAR|U?LDC", 30), (r"SHFL|R2UR|VOTE", 24),
    (r"MUFU|I2F|F2I|F2F|I2I|POPC|FLO|DADD|DMUL|DFMA", 22), (r"", 5),
)  # fmt: skip
REGISTER = re.compile(r"\b(U?[RP])(\d+)(\.64)?")
WIDTHS = {"64": 2, "WIDE": 2, "128": 4}  # registers of a result


def registers_of(instruction: Instruction) -> tuple[set[str], set[str]]:
    """(written, read): an address or an offset of 64 bits is two registers."""
    name, operands = instruction.name, instruction.operands.split(",")
    results = 0 if re.match(r"ST|BRA|EXIT|RED|BAR|CCTL|NOP|ACQ|UBLK|PREEXIT", name) else 1
    while 0 < results < len(operands) and re.match(r"\s*!?U?P(\d|T)", operands[results]):
        results += 1  # predicates behind the first result: carries
    width = max((WIDTHS[part] for part in name.split(".") if part in WIDTHS), default=1)
    written, read = set(), set()
    for kind, number, _ in REGISTER.findall(",".join(operands[:results])):
        written |= {f"{kind}{int(number) + i}" for i in range(1 if kind.endswith("P") else width)}
    for kind, number, pair in REGISTER.findall(",".join([*operands[results:], instruction.predicate])):
        read |= {f"{kind}{int(number) + i}" for i in range(2 if pair else 1)}
    return written, read


def issued(path: Iterable[Instruction]) -> Iterator[tuple[int, Instruction, set[str], set[str]]]:
    """(the cycle that it is issued in, instruction, registers written, registers read) of each."""
    ready: dict[str, int] = {}
    cycle = 0
    for instruction in path:
        written, read = registers_of(instruction)
        cycle = max([cycle + 1] + [ready[r] for r in read if r in ready])
        yield cycle, instruction, written, read
        latency = next(cycles for names, cycles in LATENCIES if re.match(names, instruction.name))
        ready |= dict.fromkeys(written, cycle + latency)


def waiting_for_the_row(path: list[Instruction]) -> tuple[int, int]:
    """Cycles from the start, or behind the wait for the grid before, to the first and to the last load of a row and its
    gains: of those that stand before anything takes the result of one."""
    waits = [i for i, instruction in enumerate(path) if instruction.name.startswith("ACQBULK")]
    asked: list[int] = []
    of_the_row: set[str] = set()
    for cycle, instruction, written, read in issued(path[waits[0] if waits else 0 :]):
        if read & of_the_row:
            break
        if instruction.name.startswith("LDG") and instruction.bytes_accessed:
            asked.append(cycle)
            of_the_row |= written
    return (asked[0], asked[-1]) if asked else (0, 0)


def loops(code: Code) -> Iterator[list[Instruction]]:
    """The instructions between a branch back and its target."""
    for i, instruction in enumerate(code.instructions):
        target = instruction.target
        if target is not None and target < instruction.address:
            yield code.instructions[code.index[target] : i + 1]


def runs_of_loads(code: Code) -> list[int]:
    """Loads that are issued before anything waits for one: the longest run of each loop, the best first."""
    runs = []
    for body in loops(code):
        run, longest = 0, 0
        waited_for: set[str] = set()
        for instruction in body:
            written, read = registers_of(instruction)
            if read & waited_for:
                run, waited_for = 0, set()
            if instruction.name.startswith("LDG"):
                run, waited_for = run + 1, waited_for | written
            longest = max(longest, run)
        if longest:
            runs.append(longest)
    return sorted(runs, reverse=True)


def loads_in_a_row(code: Code) -> int:
    """The longest run of the worst loop."""
    return min(runs_of_loads(code), default=0)


def epilogue_turn(code: Code) -> int:
    """Cycles of a turn of the loop in which a block's groups add their sums in shared memory, 0 where there is none.
    Both sides of its branches are counted."""
    turns = []
    for body in loops(code):
        names = [instruction.name.split(".")[0] for instruction in body]
        if {"LDS", "STS", "BAR"} <= set(names) and not {"LDG", "STG", "SHFL"} & set(names):
            turns.append(max(cycle for cycle, *_ in issued(body)))
    return max(turns, default=0)
