"""Where the time of the CUDA backward goes: experiments that each confirm or disprove a prediction of gpu.md.

    python benchmarks/bench_backward.py --out experiments.json

All are of the exact backward in bf16, beside a copy with the same reads and writes, interleaved.
    E1  d = 4096, 2^25 elements: grad_x alone, with grad_lam, with grad_weight too: what each adds to the gap to a copy
    E2  8184, 8192 and 8448 rows of 4096, of which 132 blocks take 31, 31.03 and 32 turns: a last turn of four rows
    E3  d = 4096, 2^24 to 2^28 elements: the time is a fixed cost and the copy's slope
    E4  with --calls under ncu: what each of the two kernels takes and waits for
"""

import argparse
import time
from dataclasses import asdict
from typing import Any, Callable, Iterator, NamedTuple

import common
import common_cuda
import cuda_providers
import torch

D = 4096
MASKS = {"grad_x": [True, False, False], "and grad_lam": [True, False, True], "and grad_weight": [True] * 3}


class Prediction(NamedTuple):
    experiment: str
    text: str
    low: float
    high: float
    measured: Callable[[dict[str, dict[str, float]]], float]  # of us by problem and provider


def gap(times: dict[str, float], name: str = "and grad_weight") -> float:
    """Microseconds that a backward takes longer than a copy."""
    return times[name] - times["copy"]


def fixed_cost(us: dict[str, dict[str, float]]) -> float:
    """What is left of the gap at 2^24 .. 2^28 elements where a line through them meets no elements."""
    points = [(int(name.split("^")[1]), gap(times)) for name, times in us.items() if name.startswith("E3")]
    sizes = [2.0**power for power, _ in points]
    middle, mean = sum(sizes) / len(sizes), sum(y for _, y in points) / len(points)
    slope = sum((x - middle) * (y - mean) for x, (_, y) in zip(sizes, points)) / sum((x - middle) ** 2 for x in sizes)
    return mean - slope * middle


# Of an H100; what came before: 8 to 9 us with every gradient, 6.5 us of it fixed.
PREDICTIONS = (
    Prediction("E1", "grad_x alone: gap to a copy, us", 1, 4, lambda us: gap(us["E1"], "grad_x")),
    Prediction("E1", "grad_lam adds, us", 0, 1.5, lambda us: us["E1"]["and grad_lam"] - us["E1"]["grad_x"]),
    Prediction("E1", "grad_weight adds, us", 0.5, 3, lambda us: us["E1"]["and grad_weight"] - us["E1"]["and grad_lam"]),
    Prediction("E1", "all gradients: gap to a copy, us", 2, 6.5, lambda us: gap(us["E1"])),
    Prediction("E2", "8192 rows take longer than 8184, us (over 1 before blocks were even)", -0.5, 0.6,
               lambda us: gap(us["E2 8192"]) - gap(us["E2 8184"])),
    Prediction("E3", "fixed cost, us", 2, 6.5, fixed_cost),
)  # fmt: skip


def problems() -> Iterator[tuple[str, int, tuple[str, ...]]]:
    """(name, rows, masks), in order of worth."""
    yield "E1", 2**25 // D, tuple(MASKS)
    yield from ((f"E2 {rows}", rows, ("and grad_weight",)) for rows in (8184, 8192, 8448))
    yield from ((f"E3 2^{power}", 2**power // D, ("and grad_weight",)) for power in (24, 26, 27, 28, 25))


def backward(b: cuda_providers.Buffers, mask: list[bool]) -> Callable[[int], object]:
    return lambda i: torch.ops.bhyt.backward(
        b.grad_y[i], None, None, b.x[i], b.variance[i], b.weight, b.lam, cuda_providers.KAPPA, cuda_providers.EPS, mask
    )


def measure(rows: int, masks: tuple[str, ...], rounds: int) -> dict[str, Any]:
    """Of providers and copy, one table."""
    sets = common_cuda.sets_beyond_l2(common.minimal_bytes("backward", rows, D, 2))
    b = cuda_providers.Buffers(min(rows, common_cuda.MOST_ROWS), D, torch.bfloat16, sets, common_cuda.DEVICE)
    calls: dict[str, Any] = {name: backward(b, MASKS[name]) for name in masks}
    calls["copy"] = cuda_providers.copy("backward", b)
    failures: dict[str, str] = {}
    timings = common_cuda.interleave(calls, sets=sets, rounds=rounds, failures=failures)
    if failures:
        raise RuntimeError(str(failures))
    return {name: asdict(timing) for name, timing in timings.items()}


def judged(us: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Every prediction, with what was measured of it."""
    items = []
    for p in PREDICTIONS:
        missing = [name for name, *_ in problems() if name.startswith(p.experiment) and name not in us]
        measured = None if missing else p.measured(us)
        held = None if measured is None else p.low <= measured <= p.high
        items.append(common.goal(f"{p.experiment}: {p.text}", f"{p.low} to {p.high}", measured, held))
    return items


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no problem after so many")
    parser.add_argument("--rounds", type=int, default=15, help="samples of each provider")
    parser.add_argument("--calls", type=int, help="make so many calls and time nothing: for a profiler (E4)")
    parser.add_argument("--out", help="write here and not into results/<device>/experiments.json")
    parser.add_argument("--dry", action="store_true", help="without a GPU: few rows on the CPU, times are made up")
    options = parser.parse_args()
    if options.dry:
        common_cuda.dry_run()
    elif not torch.cuda.is_available():
        parser.exit(2, "bench_backward.py: no CUDA device\n")

    torch.manual_seed(0)
    if options.calls:
        b = cuda_providers.Buffers(min(2**25 // D, common_cuda.MOST_ROWS), D, torch.bfloat16, 1, common_cuda.DEVICE)
        print([type(backward(b, [True] * 3)(0)).__name__ for _ in range(options.calls)])
        return
    environment = common_cuda.environment()
    began, results = time.monotonic(), []
    us: dict[str, dict[str, float]] = {}
    for name, rows, masks in problems():
        if time.monotonic() - began > options.seconds:
            break
        providers = measure(rows, masks, options.rounds)
        us[name] = {provider: timing["us"] for provider, timing in providers.items()}
        results.append({"problem": name, "rows": rows, "d": D, "providers": providers})
        print(f"{name:8} {rows:6} x {D}" + "".join(f"  {n} {t:.2f} us" for n, t in us[name].items()), flush=True)
        payload = {"environment": environment, "results": results, "predictions": judged(us)}
        common.write_json("experiments", payload, device=common.slug(environment["device"]), out=options.out)
    for item in judged(us):
        print(common.goal_line(item).replace("met   ", "held  ").replace("MISSED", "WRONG "))


if __name__ == "__main__":
    main()
