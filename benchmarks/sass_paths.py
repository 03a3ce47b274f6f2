"""The way of a thread through a kernel's machine code: which instructions it meets."""

import re
from typing import Iterator, Optional

from sass import Code, Instruction


def worth(instruction: Instruction, large: bool) -> tuple[int, ...]:
    """What a path prefers to meet, most important first."""
    name = instruction.name
    return (
        instruction.bytes_accessed,
        -bool(re.match(r"UCGABAR|MAPA|ERRBAR|CCTL|MEMBAR|SYNCS|CALL|UBLK", name)),  # clusters; divisions' rare ends
        name.startswith("SHFL"),
        bool(re.match(r"MUFU\.EX2", name)) * (1 if large else -1),
        name.startswith("I2IP"),  # eight bits: the longer way, to integers
        # Arithmetic, so that no element is left out; but not what only looks for large arguments one by one.
        name.startswith(("FMUL", "FFMA")) - 4 * name.startswith("FSETP"),
        -1,
    )


def main_path(code: Code, loop: bool, large: bool = False) -> list[Instruction]:
    """The instructions of one thread: the way through the kernel, or round its row loop, that moves the most of a row.

    Of ways that move as much the one without clusters and without the rare ends of divisions, then the one with the
    most shuffles (rows longer than a warp), then the one without arguments of tanh above 0.9, or with `large` the one
    where all are; then int8 rather than float8; then the one with the most arithmetic, which
    leaves no element out; then the shortest.
    """
    nodes = len(code.instructions)
    order: list[int] = []  # every node behind its successors, but for edges back
    back: list[tuple[int, int]] = []
    state = [0] * nodes
    stack: list[tuple[int, Iterator[int]]] = [(0, iter(code.successors(0)))]
    state[0] = 1
    while stack:
        node, following = stack[-1]
        for successor in following:
            if state[successor] == 1:
                back.append((node, successor))
            elif state[successor] == 0:
                state[successor] = 1
                stack.append((successor, iter(code.successors(successor))))
                break
        else:
            state[node] = 2
            order.append(node)
            stack.pop()
    edges_back = set(back)

    def best(start: int, ends: Optional[set[int]], inside: Optional[set[int]]) -> list[int]:
        value: dict[int, tuple[int, ...]] = {}
        follow: dict[int, Optional[int]] = {}
        for node in order:
            if inside is not None and node not in inside:
                continue
            ways = [s for s in code.successors(node) if (node, s) not in edges_back and s in value]
            own = worth(code.instructions[node], large)
            if ends is None and not code.successors(node) or ends is not None and node in ends:
                value[node], follow[node] = own, None
            elif ways:
                chosen = max(ways, key=lambda s: value[s])
                value[node], follow[node] = tuple(map(sum, zip(own, value[chosen]))), chosen
        path, at = [], start
        while True:
            path.append(at)
            following = follow[at]
            if following is None:
                return path
            at = following

    if not loop:
        return [code.instructions[i] for i in best(0, None, None)]
    before: dict[int, list[int]] = {}
    for node in range(nodes):
        for successor in code.successors(node):
            before.setdefault(successor, []).append(node)
    bodies: dict[int, set[int]] = {}
    ends: dict[int, set[int]] = {}
    for node, head in back:
        body, new = {head, node}, [node]
        while new:
            if (at := new.pop()) != head:
                fresh = [p for p in before.get(at, []) if p not in body and state[p]]
                body.update(fresh)
                new += fresh
        bodies[head] = bodies.get(head, set()) | body
        ends.setdefault(head, set()).add(node)
    head = max(bodies, key=lambda h: sum(code.instructions[i].bytes_accessed for i in bodies[h]))
    return [code.instructions[i] for i in best(head, ends[head], bodies[head])]


def in_flight(path: list[Instruction], loop: bool) -> int:
    """The most bytes a thread has asked for and not yet touched."""
    most = 0
    waiting: dict[int, int] = {}  # by the number of the load's first register
    for instruction in path * (2 if loop else 1):
        touched = {int(r) for r in re.findall(r"\bR(\d+)\b", instruction.operands)}
        waiting = {r: size for r, size in waiting.items() if not touched & set(range(r, r + size // 4))}
        if instruction.name.startswith(("LDG.", "LD.")) and instruction.bytes_accessed:
            waiting[int(re.findall(r"\bR(\d+)\b", instruction.operands)[0])] = instruction.bytes_accessed
        most = max(most, sum(waiting.values()))
    return most
