"""What bench_cpu.py makes of its records: ratios, goals and the lines of its table."""

from typing import Any, Mapping, Optional, Sequence

import common
from cpu_problems import MASKED


def ratio(record: Mapping[str, Any], peer: str) -> Optional[float]:
    """How many times faster than the peer bhyt is."""
    times = record["providers"]
    return times[peer]["us"] / times["bhyt"]["us"] if peer in times else None


def _worst(records: Sequence[Mapping[str, Any]], peer: str) -> tuple[Optional[float], str]:
    found = [(value, f"{r['rows']}x{r['d']}") for r in records if (value := ratio(r, peer)) is not None]
    return min(found, default=(None, ""))


def goals(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the kernels are held to, each with the worst ratio found."""

    def check(text: str, peer: str, bound: float, strict: bool, chosen: Sequence[Mapping[str, Any]]) -> None:
        value, where = _worst(chosen, peer)
        met = None if value is None else value > bound if strict else value >= bound
        items.append(common.goal(text, f"{'>' if strict else '>='} {bound:g}", value, met, where))

    items: list[dict[str, Any]] = []
    for dtype in dict.fromkeys(r["dtype"] for r in records):
        own = [r for r in records if r["dtype"] == dtype]
        exact = [r for r in own if r["case"] == "forward"]
        at_size = [r for r in exact if (r["rows"], r["d"]) == (64, 2048)]
        check(f"exact forward, 64x2048 {dtype}, times faster than Inductor", "inductor", 7, False, at_size)
        for case in ("forward", "forward+backward"):
            text = f"exact {case}, every size {dtype}, times faster than layer_norm"
            check(text, "layer_norm", 1, True, [r for r in own if r["case"] == case])
        for case in ("forward_approx", "add_forward", "add_forward_approx"):
            beyond = [r for r in own if r["case"] == case and r["beyond_cache"]]
            check(f"{case}, beyond cache {dtype}, of a copy's speed", "copy", 0.85, False, beyond)
        for case in ("backward[x]", "backward_approx[x]"):
            chosen = [r for r in own if r["case"] == case and r["d"] == 2048]
            if any(r["case"] in MASKED for r in own):
                text = f"{case}, d = 2048 {dtype}, times faster than all gradients"
                check(text, "all_gradients", 1.15, False, chosen)
    return items


def header(peers: Sequence[str]) -> str:
    columns = "".join(f"{peer.replace('inductor', 'ind.'):>14}" for peer in peers if peer != "copy")
    return f"{'case':28}{'dtype':>6}{'rows x d':>13}  {'us':>10}{'GB/s':>8}{'of copy':>9}{columns}"


def line(record: Mapping[str, Any], peers: Sequence[str]) -> str:
    """One row of the printed table; a star marks a problem beyond the cache, peers show times faster."""
    us, of_copy = record["providers"]["bhyt"]["us"], ratio(record, "copy")
    values = [ratio(record, peer) for peer in peers if peer != "copy"]
    columns = "".join(f"{'-':>14}" if value is None else f"{value:>13.2f}x" for value in values)
    star = "*" if record["beyond_cache"] else " "
    share = "-" if of_copy is None else f"{100 * of_copy:.1f} %"
    shape = f"{record['rows']}x{record['d']}{star}"
    speed = record["bytes"] / us / 1e3
    return f"{record['case']:28}{record['dtype']:>6}{shape:>14}{us:>11.2f}{speed:>8.1f}{share:>9}{columns}"
