"""The six ops on the CPU, beside a copy, ATen's norms, the eager formula and Inductor's code.

    python benchmarks/bench_cpu.py                    everything, into results/<device>/cpu.json
    python benchmarks/bench_cpu.py --tier avx2        the AVX2 kernels (of all providers), into cpu-avx2.json
    python benchmarks/bench_cpu.py --masks            what gradients left out save, into cpu-masks.json
    python benchmarks/bench_cpu.py --quick --out /tmp/quick.json

Cases
    forward, forward_approx, add_forward, add_forward_approx    one call without gradients
    backward, backward_approx                                   torch.autograd.grad of a graph recorded before
    <any of the four forwards>+backward                         both together, as in training
    backward[x], backward_approx[x variance], ..                the gradients named alone: [x] with frozen gains (LoRA)
Backward goes through autograd for every provider, with a fixed gradient, and gives the gradients of all
inputs that have one: x, residual, variance, and the parameters; of those named in brackets.

Providers
    bhyt               the ops of this package
    copy               the fastest plain-PyTorch mover of as many tensors; the result says which
    layer_norm         F.layer_norm with gain and bias (add cases: of x + residual, which is an output too)
    rms_norm           F.rms_norm with gain (likewise)
    eager              the formula in plain PyTorch (bhyt.reference)
    inductor           torch.compile of the same formula, for each shape (dynamic shapes were slower)
    inductor_rms_norm  torch.compile of F.rms_norm (for add cases: with the addition)
    inductor_dyt       torch.compile of DyT, weight * tanh(alpha * x) + bias (not for add cases)
    vllm               vLLM's kernels rms_norm and fused_add_rms_norm, which allocate nothing: where vLLM is
                       installed, for forwards alone, without --tier
    all_gradients      cases in brackets: bhyt's backward with every gradient
"""

import argparse
import functools
import subprocess
import sys
import time
from typing import Any, Callable, Iterator, Mapping, Optional, Sequence

import common
import torch
from cpu_providers import Compiler, Formula, formulas, has_vllm, vllm_call
from torch import Tensor

import bhyt

ROWS = (1, 64, 4096)
DIMS = (256, 2048, 4096, 16384)
CASES = (
    "forward",
    "forward_approx",
    "add_forward",
    "add_forward_approx",
    "backward",
    "backward_approx",
    "forward+backward",
    "forward_approx+backward",
    "add_forward+backward",
    "add_forward_approx+backward",
)
MASKED = tuple(
    f"{op}[{names}]"
    for op, masks in {
        "backward": ("x", "x lam", "x weight", "weight", "lam", "weight lam"),
        "backward_approx": ("x", "x variance", "x variance lam", "x variance weight", "weight", "lam", "weight lam"),
    }.items()
    for names in masks
)
PEERS = (
    "copy", "layer_norm", "rms_norm", "eager", "inductor", "inductor_rms_norm", "inductor_dyt", "vllm", "all_gradients",
)  # fmt: skip
DIFFERENTIABLE = ("x", "residual", "variance", "weight", "bias", "lam", "alpha")


# ---- problems


@functools.lru_cache(maxsize=1)
def gaussian(rows: int, d: int) -> Tensor:
    """Two tensors of Gaussian rows: tanh may be cheaper for small arguments, so the spread matters."""
    return torch.randn(2, rows, d, generator=torch.Generator().manual_seed(0))


class Buffers:
    """`sets` sets of inputs and gradients for one problem; parameters are shared by all sets."""

    def __init__(self, rows: int, d: int, dtype: torch.dtype, sets: int, grad: bool) -> None:
        normal = gaussian(rows, d)
        # Rows lie one behind the other, so that one copy can move x and residual together.
        self.stacked = [normal.to(dtype, copy=True) for _ in range(sets)]
        self.grads = [normal.flip(0).to(dtype) for _ in range(sets)]
        parameters = {
            "weight": torch.linspace(0.5, 1.5, d).to(dtype),
            "bias": torch.zeros(d, dtype=dtype),
            "lam": torch.full((1,), 2.0, dtype=dtype),
            "alpha": torch.full((1,), 0.5, dtype=dtype),
            "offset": torch.tensor(0.01),
        }
        self.inputs: list[dict[str, Tensor]] = []
        for stack in self.stacked:
            variance = bhyt.reference.mean_square(stack[0])
            self.inputs.append({"x": stack[0], "residual": stack[1], "variance": variance, **parameters})
        if grad:
            for named in self.inputs:
                for name in DIFFERENTIABLE:
                    named[name] = named[name].detach().requires_grad_()
            for name in parameters:  # one leaf for all sets
                for named in self.inputs:
                    named[name] = self.inputs[0][name]

    def arguments(self, formula: Formula) -> list[tuple[Tensor, ...]]:
        return [tuple(named[name] for name in formula.inputs) for named in self.inputs]

    def leaves(self, formula: Formula, wanted: Sequence[str] = DIFFERENTIABLE) -> list[tuple[Tensor, ...]]:
        names = [name for name in formula.inputs if name in wanted and name in DIFFERENTIABLE]
        return [tuple(named[name] for name in names) for named in self.inputs]


def unmasked(case: str) -> tuple[str, Sequence[str]]:
    """"backward[x lam]" -> ("backward", ["x", "lam"]): the op, and the gradients wanted."""
    op, _, names = case.partition("[")
    return op, names.rstrip("]").split() or DIFFERENTIABLE


def formula_call(case: str, formula: Formula, buffers: Buffers) -> common.Call:
    """What is timed of a provider other than the copy."""
    case, wanted = unmasked(case)
    function, arguments = formula.function, buffers.arguments(formula)
    if "backward" not in case:
        return lambda i: function(*arguments[i])
    leaves = buffers.leaves(formula, wanted)
    outputs_per_set = 2 if "residual" in formula.inputs else 1
    grads = [tuple(pair[:outputs_per_set]) for pair in buffers.grads]
    if "+" in case:
        return lambda i: torch.autograd.grad(function(*arguments[i]), leaves[i], grads[i])
    outputs = [function(*each) for each in arguments]
    return lambda i: torch.autograd.grad(outputs[i], leaves[i], grads[i], retain_graph=True)


def movers(op: str, buffers: Buffers) -> dict[str, common.Call]:
    """Plain-PyTorch ways to read and write as many tensors as `op` does; the fastest is "the copy".

    The mixes: 1 read 1 write, 2 reads 2 writes, 2 reads 1 write, 3 reads 1 write. Each once with a fresh
    output, as the ops allocate theirs, and once into a given one.
    """
    stacked = buffers.stacked
    x, residual = [s[0] for s in stacked], [s[1] for s in stacked]
    grad, grad_sum = [g[0] for g in buffers.grads], [g[1] for g in buffers.grads]
    mix = common.MIX[op]
    if mix == (2, 2):
        both = [torch.empty_like(s) for s in stacked]
        y, total = [s[0] for s in both], [s[1] for s in both]
        return {
            "two clone": lambda i: (x[i].clone(), residual[i].clone()),
            "two copy_": lambda i: (y[i].copy_(x[i]), total[i].copy_(residual[i])),
            "one copy_ of both": lambda i: both[i].copy_(stacked[i]),
        }
    y = [torch.empty_like(each) for each in x]
    if mix == (1, 1):
        return {"clone": lambda i: x[i].clone(), "copy_": lambda i: y[i].copy_(x[i])}
    if mix == (2, 1):
        return {
            "add": lambda i: torch.add(grad[i], x[i]),
            "add out=": lambda i: torch.add(grad[i], x[i], out=y[i]),
        }
    return {
        "addcmul": lambda i: torch.addcmul(grad_sum[i], grad[i], x[i]),
        "addcmul out=": lambda i: torch.addcmul(grad_sum[i], grad[i], x[i], out=y[i]),
    }


def both(first: common.Call, second: common.Call) -> common.Call:
    return lambda i: (first(i), second(i))


def copy_calls(case: str, buffers: Buffers) -> dict[str, common.Call]:
    """Candidates for the copy of a case; for forward + backward every pair of their movers."""
    op, wanted = unmasked(case)
    if "x" not in wanted:
        return {}
    candidates = [movers(each, buffers) for each in common.parts(op)]
    if len(candidates) == 1:
        calls = candidates[0]
    else:
        forward, backward = candidates
        calls = {f"{f}, {b}": both(forward[f], backward[b]) for f in forward for b in backward}
    return {f"copy: {name}": call for name, call in calls.items()}


def provider_calls(
    case: str, buffers: Buffers, peers: Sequence[str], compiler: Compiler, only_compiled: bool = False
) -> dict[str, common.Call]:
    op, wanted = unmasked(case)
    forward_case = op.partition("+")[0].replace("backward", "forward")
    calls: dict[str, common.Call] = {}
    if "copy" in peers and not only_compiled:
        calls |= copy_calls(case, buffers)
    if "vllm" in peers and op in common.MIX and "backward" not in op and not only_compiled:
        calls["vllm"] = vllm_call(op, buffers.inputs)
    for name, formula in formulas(forward_case).items():
        if name != "bhyt" and name not in peers or only_compiled and not name.startswith("inductor"):
            continue
        if not set(wanted) & set(formula.inputs):
            continue
        if name.startswith("inductor"):
            formula = compiler(name, forward_case, formula)
        calls[name] = formula_call(case, formula, buffers)
        if name == "bhyt" and "all_gradients" in peers and op != case:
            calls["all_gradients"] = formula_call(op, formula, buffers)
    return calls


def measure(
    case: str, rows: int, d: int, dtype_name: str, peers: Sequence[str], seconds: float, compiler: Compiler
) -> dict[str, Any]:
    """Time one problem for everybody and return its record."""
    dtype, cache = common.DTYPES[dtype_name], common.last_level_cache()
    size = common.minimal_bytes(unmasked(case)[0], rows, d, dtype.itemsize)
    sets = common.rotation(size, cache)
    buffers = Buffers(rows, d, dtype, sets, grad="backward" in case)
    calls = provider_calls(case, buffers, peers, compiler)
    with torch.set_grad_enabled("backward" in case):
        timings = common.interleave(calls, sets=sets, seconds=seconds)
    copies = {name: timings.pop(name) for name in list(timings) if name.startswith("copy: ")}
    record: dict[str, Any] = {"case": case, "rows": rows, "d": d, "dtype": dtype_name}
    record |= {
        "bytes": size,
        "sets": sets,
        "beyond_cache": sets > 1 or size > cache,
        "exceeds_cache": size > cache,
    }
    if copies:
        best = min(copies, key=lambda name: copies[name].us)
        timings["copy"] = copies[best]
        record["copy_by"] = best.removeprefix("copy: ")
    record["providers"] = common.timings_record(timings)
    return record


# ---- results


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


def shapes(args: argparse.Namespace) -> Iterator[tuple[str, int, int]]:
    for dtype in args.dtypes:
        for rows in args.rows:
            for d in args.dims:
                yield dtype, rows, d


def fill_compile_cache(args: argparse.Namespace) -> None:
    """Compile all peers beforehand, one process per thread; Inductor's cache hands them to this one."""
    workers = [
        subprocess.Popen([sys.executable, *sys.orig_argv[1:], "--compile-only", f"{k}/{args.threads}"])
        for k in range(args.threads)
    ]
    if any([worker.wait() for worker in workers]):
        raise SystemExit("bench_cpu: compiling the peers failed")


def compile_only(args: argparse.Namespace) -> None:
    """One worker's share of the shapes: run every compiled provider once."""
    share, of = map(int, args.compile_only.split("/"))
    compiler = Compiler()
    for dtype, rows, d in list(shapes(args))[share::of]:
        compiler.new_shape()
        for case in args.ops:
            buffers = Buffers(rows, d, common.DTYPES[dtype], 1, grad="backward" in case)
            for call in provider_calls(case, buffers, args.peers, compiler, only_compiled=True).values():
                with torch.set_grad_enabled("backward" in case):
                    call(0)


def parse(arguments: Optional[Sequence[str]] = None) -> argparse.Namespace:
    def comma(
        kind: Callable[[str], Any], allowed: Optional[Sequence[Any]] = None
    ) -> Callable[[str], list[Any]]:
        def convert(text: str) -> list[Any]:
            values = [kind(item) for item in text.split(",") if item]
            for value in values:
                if allowed is not None and value not in allowed:
                    raise argparse.ArgumentTypeError(f"expected some of {', '.join(allowed)}, got {value}")
            return values

        return convert

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rows", type=comma(int), help="default 1,64,4096")
    parser.add_argument("--dims", type=comma(int), help="default 256,2048,4096,16384")
    parser.add_argument("--dtypes", type=comma(str, list(common.DTYPES)), default=["fp32", "bf16"])
    parser.add_argument(
        "--ops", type=comma(str, CASES + MASKED), default=list(CASES), help="cases; default all without brackets"
    )
    parser.add_argument("--peers", type=comma(str, PEERS), help="default all; with --masks all_gradients")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--tier", choices=("default", "avx2", "avx512"), help="instruction set of all providers"
    )
    parser.add_argument("--seconds", type=float, help="measuring time per problem; default 0.8")
    parser.add_argument(
        "--quick", action="store_true", help="a look: 1 and 64 rows of 256 and 2048, 0.1 s each"
    )
    parser.add_argument("--masks", action="store_true", help="all cases in brackets, 64 and 2048 rows of 2048")
    parser.add_argument("--device", help="name of the results folder; default: the CPU's")
    parser.add_argument("--out", help="write the JSON here instead")
    parser.add_argument("--compile-only", metavar="K/N", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.masks:
        args.ops, args.rows, args.dims = list(MASKED), args.rows or [64, 2048], args.dims or [2048]
    # What a mask saves is a pair of calls: other peers between the two would leave them different caches.
    args.peers = args.peers or (["all_gradients"] if args.masks else list(PEERS))
    args.rows = args.rows or ([1, 64] if args.quick else list(ROWS))
    args.dims = args.dims or ([256, 2048] if args.quick else list(DIMS))
    args.seconds = args.seconds or (0.1 if args.quick else 0.8)
    return args


def main() -> None:
    args = parse()
    common.reexecute(args.tier)
    if "vllm" in args.peers and (args.tier or args.compile_only or not has_vllm()):
        args.peers.remove("vllm")
    torch.set_num_threads(args.threads)
    if args.compile_only:
        return compile_only(args)
    started, environment = time.perf_counter(), common.environment()
    print(", ".join(f"{key} {value}" for key, value in environment.items()))
    if any(peer.startswith("inductor") for peer in args.peers):
        fill_compile_cache(args)
        print(f"peers compiled in {time.perf_counter() - started:.0f} s (kept in Inductor's cache)")
    print("\n" + header(args.peers), flush=True)
    compiler, records = Compiler(), []
    for dtype, rows, d in shapes(args):
        compiler.new_shape()
        for case in args.ops:
            records.append(measure(case, rows, d, dtype, args.peers, args.seconds, compiler))
            print(line(records[-1], args.peers), flush=True)
    items = goals(records)
    print("\n* beyond cache: moves more than half of the last-level cache; inputs and outputs rotate\n")
    print("\n".join(map(common.goal_line, items)))
    settings = {"seconds_per_problem": args.seconds, "wall_seconds": round(time.perf_counter() - started)}
    payload = {"benchmark": "cpu", "environment": environment, "settings": settings, "goals": items}
    name = "-".join(["cpu", *(["masks"] if args.masks else []), *([args.tier] if args.tier else [])])
    path = common.write_json(name, payload | {"problems": records}, device=args.device, out=args.out)
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
