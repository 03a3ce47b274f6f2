"""All kernels on a GPU, beside a copy with the same reads and writes, ATen, Inductor, Liger, QuACK and FlashInfer.

    python benchmarks/bench_cuda.py                     everything, into results/<device>/cuda.json
    python benchmarks/bench_cuda.py --seconds 150       what that time allows, in the order below
    python benchmarks/bench_cuda.py --parts goals,decode --out /tmp/some.json

Parts, in order of worth; the first are judged by PERFORMANCE.md's goals
    goals        every op beside a copy, bf16, 2^25 elements at some lengths
    decode       1, 16, 128 rows: latency, beside an empty kernel
    large        as goals, 2^28 elements
    quantized    the ops with integers, beside the unquantised ones
    peers        the other norms in the same run, 2^25 elements, then decode, then 2^28
    compiled     torch.compile of the formula and of RMSNorm; each shape compiles for seconds
    more         all other lengths, and float32
Every provider's outputs are compared with float64 before it is timed (cuda_providers.py); one that fails, or computes
something else, is recorded as such and the others go on. A problem is begun only where its estimated time is left; what
was left out is tried once more at the end, then printed and recorded. Results are written after each problem.

Each provider's calls are captured in a CUDA graph and replayed, so that no host time is in the figures; where a
provider cannot be captured its calls are timed eagerly (`mode` says which). Backward calls are the backward alone.
Buffers rotate beyond L2, but for decode.

Providers
    bhyt           the ops of this package; `unquantized`: the op without integers, where these are what is measured
    copy           plain PyTorch moving as many tensors: copy_, add, addcmul
    rms_norm, layer_norm        ATen's
    inductor, inductor_rms_norm     torch.compile of the formula, and of rms_norm
    liger_rms_norm, liger_add_rms_norm, liger_dyt, quack_rms_norm, flashinfer_rms_norm, flashinfer_add_rms_norm
                   where installed
    empty          a kernel that does nothing (decode only)
"""

import argparse
import time
from dataclasses import asdict
from typing import Any, Callable, Iterator, NamedTuple, Optional

import common
import common_cuda
import cuda_providers
import torch

OPS = tuple(common.MIX)
QUANTIZED = tuple(f"{op}_quantized" for op in OPS if "backward" not in op)
PARTS = ("goals", "decode", "large", "quantized", "peers", "compiled", "more")
DIMS = tuple(2**k for k in range(6, 18))
JUDGED_DIMS = (4096, 16384, 256, 8192, 1024, 65536, 2048)
LARGE_DIMS = (4096, 65536, 16384, 1024)
ELEMENTS, LARGE = 2**25, 2**28
DECODE_ROWS, DECODE_DIMS = (1, 16, 128), (4096, 2048, 8192)


class Problem(NamedTuple):
    part: str
    op: str
    rows: int
    d: int
    dtype: str = "bf16"

    def __str__(self) -> str:
        return f"{self.part} {self.op} {self.rows}x{self.d} {self.dtype}"

    @property
    def decode(self) -> bool:
        return self.rows <= max(DECODE_ROWS)


def kernels(op: str) -> bool:
    """Whether the op has CUDA kernels of its own, and no composite in their place."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"bhyt::{op}", "CUDA")


def problems(has_kernels: Callable[[str], bool] = kernels) -> Iterator[Problem]:
    """All of them, in order of worth."""
    forwards = [op for op in OPS if "backward" not in op]
    quantized = [op for op in QUANTIZED if has_kernels(op)]
    yield from (Problem("goals", op, ELEMENTS // d, d) for d in JUDGED_DIMS for op in OPS)
    yield from (Problem("decode", op, rows, d) for d in DECODE_DIMS for rows in DECODE_ROWS for op in forwards)
    yield from (Problem("large", op, LARGE // d, d) for d in LARGE_DIMS for op in OPS)
    yield from (Problem("quantized", op, ELEMENTS // d, d) for d in JUDGED_DIMS[:3] for op in quantized)
    yield from (Problem("quantized", op, rows, 4096) for rows in DECODE_ROWS for op in quantized)
    yield from (Problem("peers", op, ELEMENTS // d, d) for d in JUDGED_DIMS for op in OPS)
    yield from (Problem("peers", op, rows, 4096) for rows in DECODE_ROWS for op in forwards)
    yield from (Problem("peers", op, LARGE // d, d) for d in LARGE_DIMS[:2] for op in OPS)
    yield from (Problem("compiled", op, ELEMENTS // 4096, 4096) for op in OPS)
    yield from (Problem("more", op, ELEMENTS // d, d) for d in DIMS if d not in JUDGED_DIMS for op in OPS)
    yield from (Problem("more", op, ELEMENTS // d // 2, d, "fp32") for d in (4096, 1024, 16384) for op in OPS)


class Budget:
    """Seconds for a run. What a problem takes is guessed at first, then taken from the longest one of its kind."""

    GUESS = {"peers": 8.0, "compiled": 20.0}  # a shape's first call compiles

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.end = clock() + seconds
        self.longest: dict[tuple[str, bool], float] = {}

    def kind(self, problem: Problem) -> tuple[str, bool]:
        return problem.part, problem.rows * problem.d > ELEMENTS

    def estimate(self, problem: Problem) -> float:
        guess = self.GUESS.get(problem.part, 1.0) + (2.0 if problem.rows * problem.d > ELEMENTS else 0.0)
        return self.longest.get(self.kind(problem), guess)

    def allows(self, problem: Problem) -> bool:
        return self.estimate(problem) <= self.end - self.clock()

    def took(self, problem: Problem, seconds: float) -> None:
        kind = self.kind(problem)
        self.longest[kind] = max(seconds, self.longest.get(kind, 0.0))


def minimal_bytes(problem: Problem) -> int:
    itemsize = common.DTYPES[problem.dtype].itemsize
    plain = problem.op.removesuffix("_quantized")
    moved = common.minimal_bytes(plain, problem.rows, problem.d, itemsize)
    return moved if plain == problem.op else moved - problem.rows * problem.d * (itemsize - 1)


def measure(problem: Problem, rounds: int) -> dict[str, Any]:
    part, op, rows, d, dtype = problem
    moved = minimal_bytes(problem)
    # A decode step finds its rows in L2, where the layer before left them.
    sets = 4 if problem.decode else common_cuda.sets_beyond_l2(moved)
    b = cuda_providers.Buffers(min(rows, common_cuda.MOST_ROWS), d, common.DTYPES[dtype], sets, common_cuda.DEVICE)
    table = cuda_providers.own_providers(op, b)
    missing: dict[str, str] = {}
    if part in ("peers", "compiled"):
        if part == "peers":
            found, missing = cuda_providers.peers(op)
        else:
            found = cuda_providers.compiled(op, b)
        table |= {name: cuda_providers.provider(op, b, peer) for name, peer in found.items()}
    calls, wrong = cuda_providers.checked(op, b, table)
    if "bhyt" in wrong:
        raise RuntimeError(f"bhyt: {wrong['bhyt']}")
    if problem.decode:
        calls["empty"] = lambda i: torch.cuda._sleep(0)
    timings = common_cuda.interleave(calls, sets=sets, rounds=rounds, failures=wrong)
    own = timings["bhyt"].us
    line = f"{part:9} {op:28} {dtype} {rows:7} x {d:6} {own:9.2f} us {moved / own / 1e3:7.0f} GB/s"
    others = {name: t.us / own for name, t in timings.items() if name != "bhyt"}
    line += "".join(f"  {name} {ratio:.2f}" for name, ratio in others.items())
    print(line + "".join(f"\n    {name}: {why}" for name, why in wrong.items()), flush=True)
    return {
        "part": part, "op": op, "rows": rows, "d": d, "dtype": dtype, "bytes": moved, "sets": sets,
        "decode": problem.decode, "providers": {name: asdict(timing) for name, timing in timings.items()},
        "wrong": wrong, "missing": missing,
    }  # fmt: skip


GOALS = (  # text, ops, d from, d to, against, at least
    ("approximate forward", ("forward_approx",), 64, 131072, "copy", 0.99),
    ("exact forward, 2k-64k", ("forward",), 2048, 65536, "copy", 0.98),
    ("exact forward, 128-1k", ("forward",), 128, 1024, "copy", 0.93),
    ("forward + residual add", ("add_forward", "add_forward_approx"), 64, 131072, "copy", 0.98),
    ("exact backward, 1k-8k", ("backward",), 1024, 8192, "copy", 0.95),
    ("exact backward, 16k-64k", ("backward",), 16384, 65536, "copy", 0.92),
    ("approximate backward", ("backward_approx",), 64, 131072, "copy", 0.97),
    ("approximate forward at 4k", ("forward_approx",), 4096, 4096, "rms", 1.02),
    ("approximate forward at 256", ("forward_approx",), 256, 256, "quack_rms_norm", 1.4),
    ("exact forward, 128-1k", ("forward",), 128, 1024, "rms", 1.15),
    ("exact forward, 2k-64k", ("forward",), 2048, 65536, "rms", 1.0),
    ("forward + residual add", ("add_forward",), 64, 131072, "liger_add_rms_norm", 1.05),
    ("exact backward, 1k-8k", ("backward",), 1024, 8192, "rms_norm", 4.0),
    ("exact backward, 1k-8k", ("backward",), 1024, 8192, "quack_rms_norm", 1.0),
    ("exact backward, 16k-64k", ("backward",), 16384, 65536, "quack_rms_norm", 1.08),
    ("approximate backward", ("backward_approx",), 64, 131072, "liger_dyt", 1.5),
    ("decode, at most 1.5x an empty kernel", OPS[:4], 0, 1 << 30, "empty", 1 / 1.5),
    ("decode", ("forward", "forward_approx"), 0, 1 << 30, "flashinfer_rms_norm", 1 / 0.95),
    ("decode + residual add", ("add_forward", "add_forward_approx"), 0, 1 << 30, "flashinfer_add_rms_norm", 1 / 0.95),
    ("quantised", QUANTIZED, 0, 1 << 30, "unquantized", 1.0),
)
DECODE_GOALS = ("empty", "flashinfer_rms_norm", "flashinfer_add_rms_norm")


def goals(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """PERFORMANCE.md's, each with the worst figure found; "rms" is the best RMSNorm of the same run."""
    items = []
    for text, ops, low, high, against, wanted in GOALS:
        sizes = {"unquantized": ("decode", "2^25"), **dict.fromkeys(DECODE_GOALS, ("decode",))}
        for size in sizes.get(against, ("2^25", "2^28")):
            worst: Optional[tuple[float, str]] = None
            for r in results:
                if r["op"] not in ops or not low <= r["d"] <= high or r["dtype"] != "bf16":
                    continue
                if size != ("decode" if r["decode"] else "2^28" if r["rows"] * r["d"] > ELEMENTS else "2^25"):
                    continue
                times = {name: t["us"] for name, t in r["providers"].items()}
                rms = [us for name, us in times.items() if "rms_norm" in name]
                rivals = rms if against == "rms" else [times[against]] if against in times else []
                if rivals and (worst is None or min(rivals) / times["bhyt"] < worst[0]):
                    worst = min(rivals) / times["bhyt"], f"{r['rows']}x{r['d']}"
            measured, where = worst or (None, "")
            met = None if measured is None else measured >= wanted
            name = f"{text}, {size}, against {against}"
            items.append(common.goal(name, f">= {wanted:.2f}x", measured, met, where))
    return items


def run(
    chosen: list[Problem],
    budget: Budget,
    rounds: int,
    write: Callable[[dict[str, Any]], Any],
    before: Optional[dict[str, Any]] = None,
) -> dict[str, Any]:
    """Every problem that there is time for, and that `before`, an earlier payload, has no result of; `write` gets
    what there is after each. What is left out is tried once more: smaller ones have shown by then how long it takes."""
    before = before or {"results": [], "failed": [], "left_out": []}
    results, failed = list(before["results"]), list(before["failed"])
    done = {tuple(r[field] for field in Problem._fields) for r in results + failed}
    others = [text for text in before["left_out"] if text not in set(map(str, chosen))]
    todo = [problem for problem in chosen if tuple(problem) not in done]
    later: list[Problem] = []

    def payload() -> dict[str, Any]:
        left_out = [*others, *map(str, later)]
        return {"results": results, "failed": failed, "left_out": left_out, "goals": goals(results)}

    def attempt(problem: Problem) -> None:
        began = budget.clock()
        try:
            results.append(measure(problem, rounds))
        except Exception as error:  # one problem must not cost the others
            why = (str(error).splitlines() or [type(error).__name__])[0]
            print(f"{problem} failed: {why}", flush=True)
            failed.append({**problem._asdict(), "error": str(error)[:500]})
            torch.cuda.empty_cache()
        budget.took(problem, budget.clock() - began)
        write(payload())

    for problem in todo:
        attempt(problem) if budget.allows(problem) else later.append(problem)
    for problem in list(later):
        if budget.allows(problem):
            later.remove(problem)
            attempt(problem)
    write(payload())
    return payload()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commas = lambda s: s.split(",")  # noqa: E731
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing that would take longer")
    parser.add_argument("--rounds", type=int, default=9, help="samples of each provider")
    parser.add_argument("--parts", type=commas, default=list(PARTS), help="some of " + ",".join(PARTS))
    parser.add_argument("--ops", type=commas, default=[*OPS, *QUANTIZED])
    parser.add_argument("--dims", type=lambda s: [int(d) for d in s.split(",")], default=None)
    parser.add_argument("--resume", action="store_true", help="go on from what --out has of this commit")
    parser.add_argument("--out", help="write here and not into results/<device>/cuda.json")
    parser.add_argument("--dry", action="store_true", help="without a GPU: few rows on the CPU, times are made up")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))}: expected some of {', '.join(PARTS)}")
    if options.dry:
        common_cuda.dry_run()
    elif not torch.cuda.is_available():
        parser.exit(2, "bench_cuda.py: no CUDA device\n")

    torch.manual_seed(0)
    environment = common_cuda.environment()
    device = common.slug(environment["device"])
    chosen = [
        p for p in problems()
        if p.part in options.parts and p.op in options.ops and (options.dims is None or p.d in options.dims)
    ]  # fmt: skip

    def write(payload: dict[str, Any]) -> Any:
        return common.write_json("cuda", {"environment": environment, **payload}, device=device, out=options.out)

    before = common_cuda.earlier(options.out, environment) if options.resume else None
    payload = run(chosen, Budget(options.seconds), options.rounds, write, before)
    for item in payload["goals"]:
        print(common.goal_line(item))
    if payload["left_out"]:
        first, count = payload["left_out"][0], len(payload["left_out"])
        print(f"left out, no time: {count} problems, {first} first")
    if failures := len(payload["failed"]) - len(before["failed"] if before else []):
        parser.exit(1, f"{failures} problems failed\n")


if __name__ == "__main__":
    main()
