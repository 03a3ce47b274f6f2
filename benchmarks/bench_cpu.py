"""The six ops on the CPU, beside a copy, ATen's norms, the eager formula and Inductor's code.

    python benchmarks/bench_cpu.py                    everything, into results/<device>/cpu.json
    python benchmarks/bench_cpu.py --tier avx2        the AVX2 kernels (of all providers), into cpu-avx2.json
    python benchmarks/bench_cpu.py --masks            what gradients left out save, into cpu-masks.json
    python benchmarks/bench_cpu.py --given            outputs given, beside vLLM's kernels, into cpu-given.json
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
    out                --given: the `out` overloads, which allocate nothing; in add cases y lies where x was, and the
                       sum where the residual was
    vllm               --given, where vLLM is installed, without --tier: its kernels rms_norm and fused_add_rms_norm,
                       which do the same
    all_gradients      cases in brackets: bhyt's backward with every gradient
"""
import argparse
import subprocess
import sys
import time
from typing import Any, Callable, Iterator, Optional, Sequence

import common
import torch
from cpu_problems import CASES, MASKED, Buffers, provider_calls, unmasked
from cpu_providers import Compiler, has_vllm
from cpu_results import goals, header, line

ROWS = (1, 64, 4096)
DIMS = (256, 2048, 4096, 16384)
PEERS = (
    "copy", "layer_norm", "rms_norm", "eager", "inductor", "inductor_rms_norm", "inductor_dyt", "all_gradients",
    "out", "vllm",
)  # fmt: skip
GIVEN = ["out", "vllm"]


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
    parser.add_argument("--peers", type=comma(str, PEERS), help="default all that the mode has")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--tier", choices=("default", "avx2", "avx512"), help="instruction set of all providers"
    )
    parser.add_argument("--seconds", type=float, help="measuring time per problem; default 0.8")
    parser.add_argument(
        "--quick", action="store_true", help="a look: 1 and 64 rows of 256 and 2048, 0.1 s each"
    )
    parser.add_argument("--masks", action="store_true", help="all cases in brackets, 64 and 2048 rows of 2048")
    parser.add_argument("--given", action="store_true", help="the four forwards into given outputs")
    parser.add_argument("--device", help="name of the results folder; default: the CPU's")
    parser.add_argument("--out", help="write the JSON here instead")
    parser.add_argument("--compile-only", metavar="K/N", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.masks:
        args.ops, args.rows, args.dims = list(MASKED), args.rows or [64, 2048], args.dims or [2048]
    # What a mask saves is a pair of calls: other peers between the two would leave them different caches.
    own = ["all_gradients"] if args.masks else GIVEN if args.given else [p for p in PEERS if p not in GIVEN]
    args.peers = args.peers or list(own)
    if args.given:
        args.ops = CASES[:4]
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
    kind = "cpu-given" if args.given else "cpu"
    payload = {"benchmark": kind, "environment": environment, "settings": settings, "goals": items}
    name = "-".join([kind, *(["masks"] if args.masks else []), *([args.tier] if args.tier else [])])
    path = common.write_json(name, payload | {"problems": records}, device=args.device, out=args.out)
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
