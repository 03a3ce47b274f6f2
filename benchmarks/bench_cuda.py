"""All kernels on a GPU, beside a copy of the same reads and writes, ATen's norms, Inductor, Liger and QuACK.

    python benchmarks/bench_cuda.py                     everything, into results/<device>/cuda.json
    python benchmarks/bench_cuda.py --quick --out /tmp/quick.json

Problems
    beyond L2    every op at d = 64 .. 131072 with 2^25 elements, bf16; some in fp32. Buffers rotate beyond L2.
    decode       1, 16, 128 rows: latency, beside an empty kernel.
Each provider's calls are captured in a CUDA graph and replayed, so that no host time is in the figures; where a
provider cannot be captured its calls are timed eagerly (`mode` says which). Backward calls are the backward alone.

Providers
    bhyt           the ops of this package
    copy           plain PyTorch moving as many tensors: copy_, add, addcmul
    rms_norm, layer_norm        ATen's
    inductor       torch.compile of the formula, at some sizes (each shape compiles for seconds)
    liger_rms_norm, liger_add_rms_norm, liger_dyt, quack_rms_norm     when installed
    empty          a kernel that does nothing (decode only)
"""

import argparse
from dataclasses import asdict
from itertools import groupby
from typing import Any, Callable, Iterator, Optional

import common
import common_cuda
import torch
import torch.nn.functional as F
from torch import Tensor

import bhyt

OPS = tuple(common.MIX)
DIMS = tuple(2**k for k in range(6, 18))
ELEMENTS = 2**25
COMPILED_DIMS = (4096,)
DECODE_ROWS, DECODE_DIMS = (1, 16, 128), (2048, 4096, 8192)
KAPPA, EPS = 10.0, 1e-6

Call = Callable[[int], object]


class Buffers:
    """`sets` sets of rows for one problem; parameters are shared."""

    def __init__(self, rows: int, d: int, dtype: torch.dtype, sets: int) -> None:
        normal = torch.randn(2, rows, d, device="cuda", dtype=dtype)
        # One behind the other, so that one copy can move both.
        self.pairs = [normal.clone() for _ in range(sets)]
        self.x = [pair[0] for pair in self.pairs]
        self.residual = [pair[1] for pair in self.pairs]
        self.grad_y = [normal[1].clone() for _ in range(sets)]
        self.grad_sum = [normal[0].clone() for _ in range(sets)]
        self.variance = [x.float().square().mean(-1, keepdim=True) for x in self.x]
        self.weight = torch.linspace(0.5, 1.5, d, device="cuda", dtype=dtype)
        self.bias = torch.zeros(d, device="cuda", dtype=dtype)
        self.lam = torch.full((1,), 2.0, device="cuda", dtype=dtype)
        self.alpha = torch.full((1,), 0.5, device="cuda", dtype=dtype)
        self.offset = torch.tensor(0.01, device="cuda")


def bhyt_call(op: str, b: Buffers) -> Call:
    ops, w, lam = torch.ops.bhyt, b.weight, b.lam
    if op == "forward":
        return lambda i: ops.forward(b.x[i], w, lam, KAPPA, EPS)
    if op == "forward_approx":
        return lambda i: ops.forward_approx(b.x[i], b.variance[i], b.offset, w, lam, KAPPA, EPS)
    if op == "add_forward":
        return lambda i: ops.add_forward(b.x[i], b.residual[i], w, lam, KAPPA, EPS)
    if op == "add_forward_approx":
        return lambda i: ops.add_forward_approx(b.x[i], b.residual[i], b.variance[i], b.offset, w, lam, KAPPA, EPS)
    with_sum = op.startswith("add")
    if op.endswith("approx"):
        return lambda i: ops.backward_approx(
            b.grad_y[i], b.grad_sum[i] if with_sum else None, b.x[i], b.variance[i], b.offset, w, lam, KAPPA, EPS,
            [True] * 4,
        )  # fmt: skip
    return lambda i: ops.backward(
        b.grad_y[i], None, b.grad_sum[i] if with_sum else None, b.x[i], b.variance[i], w, lam, KAPPA, EPS, [True] * 3
    )


def copy_call(op: str, b: Buffers) -> Call:
    """Plain PyTorch with the same reads and writes."""
    reads_writes = common.MIX[op]
    if reads_writes == (1, 1):
        return lambda i: torch.empty_like(b.x[i]).copy_(b.x[i])
    if reads_writes == (2, 2):
        return lambda i: torch.empty_like(b.pairs[i]).copy_(b.pairs[i])
    if reads_writes == (2, 1):
        return lambda i: torch.add(b.x[i], b.grad_y[i])
    return lambda i: torch.addcmul(b.x[i], b.grad_y[i], b.grad_sum[i])


def through_autograd(function: Callable[..., Any], inputs: list[list[Tensor]], grads: list[tuple[Tensor, ...]]) -> Call:
    """The backward alone of a graph recorded now, on the current stream; recorded at the set's first call."""
    outputs: dict[int, Any] = {}
    leaves: dict[int, list[Tensor]] = {}

    def call(i: int) -> object:
        if i not in outputs:
            leaves[i] = [t.detach().requires_grad_() for t in inputs[i]]
            result = function(*leaves[i])
            outputs[i] = result if isinstance(result, tuple) else (result,)
        return torch.autograd.grad(outputs[i], leaves[i], grads[i], retain_graph=True)

    return call


def norms(op: str) -> dict[str, tuple[Callable[..., Any], tuple[str, ...]]]:
    """Peers by name: a function and the inputs it takes; add cases return (y, sum)."""
    adds = op.startswith("add")
    table: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {}

    def rms(x: Tensor, w: Tensor) -> Tensor:
        return F.rms_norm(x, w.shape, w, EPS)

    def layer(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, w.shape, w, bias)

    if adds:
        table["rms_norm"] = (lambda x, r, w: (rms(s := x + r, w), s), ("x", "residual", "weight"))
        table["layer_norm"] = (lambda x, r, w, b: (layer(s := x + r, w, b), s), ("x", "residual", "weight", "bias"))
    else:
        table["rms_norm"] = (rms, ("x", "weight"))
        table["layer_norm"] = (layer, ("x", "weight", "bias"))
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        if not adds:
            table["liger_rms_norm"] = (
                lambda x, w: LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False), ("x", "weight"))  # fmt: skip
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

        if adds:
            table["liger_add_rms_norm"] = (
                lambda x, r, w: LigerFusedAddRMSNormFunction.apply(x, r, w, EPS, 0.0, "llama", False),
                ("x", "residual", "weight"))  # fmt: skip
        from liger_kernel.ops.dyt import LigerDyTFunction

        if not adds:
            table["liger_dyt"] = (
                lambda x, a, w, b: LigerDyTFunction.apply(x, a, w, b), ("x", "alpha", "weight", "bias"))  # fmt: skip
    except ImportError:
        pass
    try:
        from quack import rmsnorm

        if not adds:
            table["quack_rms_norm"] = (lambda x, w: rmsnorm(x, w, eps=EPS), ("x", "weight"))
    except ImportError:
        pass
    return table


def compiled_site(op: str) -> tuple[Callable[..., Any], tuple[str, ...]]:
    """torch.compile of the formula in plain PyTorch."""
    forward = op.replace("backward", "forward")
    if forward == "add_forward_approx":
        inputs = ("x", "residual", "variance", "offset", "weight", "lam")
    elif forward == "forward_approx":
        inputs = ("x", "variance", "offset", "weight", "lam")
    else:
        inputs = ("x", "residual", "weight", "lam") if forward.startswith("add") else ("x", "weight", "lam")
    reference = getattr(bhyt.reference, forward)

    def site(*tensors: Tensor) -> Any:
        result = reference(*tensors)
        return result[:-1] if forward in ("forward", "add_forward") else result

    return torch.compile(site, dynamic=False, fullgraph=True), inputs


def calls_for(op: str, b: Buffers, compiled: bool, peers: bool) -> dict[str, Call]:
    calls = {"bhyt": bhyt_call(op, b), "copy": copy_call(op, b)}
    table = norms(op) if peers else {}
    if compiled and peers:
        torch._dynamo.reset()
        torch._functorch.config.donated_buffer = False  # the recorded graph is run again and again
        table["inductor"] = compiled_site(op)
    for name, (function, names) in table.items():
        inputs = [
            [value[i] if isinstance(value := getattr(b, each), list) else value for each in names]
            for i in range(len(b.x))
        ]
        if "backward" not in op:
            calls[name] = lambda i, f=function, a=inputs: f(*a[i])  # type: ignore[misc]
        else:
            adds = op.startswith("add")
            grads = [(b.grad_y[i], b.grad_sum[i]) if adds else (b.grad_y[i],) for i in range(len(b.x))]
            leaves = [[t for t, each in zip(own, names) if each != "offset"] for own in inputs]
            if "offset" in names:
                at = names.index("offset")
                plain = function

                def with_offset(*tensors: Tensor, f: Callable[..., Any] = plain, at: int = at) -> Any:
                    return f(*tensors[:at], b.offset, *tensors[at:])

                function = with_offset
            calls[name] = through_autograd(function, leaves, grads)
    return calls


def problems(options: argparse.Namespace) -> Iterator[tuple[str, int, int, str]]:
    """(op, rows, d, dtype)"""
    for op in options.ops:
        for d in options.dims:
            yield op, ELEMENTS // d, d, "bf16"
        for d in (1024, 4096, 16384):
            if d in options.dims and not options.quick:
                yield op, ELEMENTS // d // 2, d, "fp32"
        if "backward" not in op:
            for d in DECODE_DIMS[1:2] if options.quick else DECODE_DIMS:
                for rows in DECODE_ROWS:
                    yield op, rows, d, "bf16"


def measure(op: str, rows: int, d: int, dtype_name: str, options: argparse.Namespace) -> dict[str, Any]:
    dtype = common.DTYPES[dtype_name]
    moved = common.minimal_bytes(op, rows, d, dtype.itemsize)
    decode = rows <= max(DECODE_ROWS)
    # A decode step finds its rows in L2, where the layer before left them.
    sets = 4 if decode else common_cuda.sets_beyond_l2(moved)
    buffers = Buffers(rows, d, dtype, sets)
    compiled = not options.quick and dtype_name == "bf16" and d in COMPILED_DIMS and not decode
    calls = calls_for(op, buffers, compiled, not options.no_peers)
    if decode:
        calls["empty"] = lambda i: torch.cuda._sleep(0)
    timings = common_cuda.interleave(calls, sets=sets, rounds=7 if options.quick else 15)
    own, copy = timings["bhyt"].us, timings["copy"].us
    line = f"{op:19} {dtype_name} {rows:7} x {d:6} {own:9.2f} us {moved / own / 1e3:7.0f} GB/s  copy {copy / own:5.2f}"
    others = {name: t.us / own for name, t in timings.items() if name not in ("bhyt", "copy")}
    print(line + "".join(f"  {name} {ratio:.2f}" for name, ratio in others.items()), flush=True)
    return {
        "op": op, "rows": rows, "d": d, "dtype": dtype_name, "bytes": moved, "sets": sets, "decode": decode,
        "providers": {name: asdict(timing) for name, timing in timings.items()},
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
    ("decode, at most 1.15x an empty kernel", OPS[:4], 0, 1 << 30, "empty", 1 / 1.15),
)


def goals(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """PERFORMANCE.md's, each with the worst figure found; "rms" is the best RMSNorm of the same run."""
    items = []
    for text, ops, low, high, against, wanted in GOALS:
        worst: Optional[tuple[float, str]] = None
        for r in results:
            if r["op"] not in ops or not low <= r["d"] <= high or r["dtype"] != "bf16":
                continue
            if r["decode"] != (against == "empty"):
                continue
            times = {name: t["us"] for name, t in r["providers"].items()}
            rivals = [us for name, us in times.items() if name == against or (against == "rms" and "rms_norm" in name)]
            if rivals and (worst is None or min(rivals) / times["bhyt"] < worst[0]):
                worst = min(rivals) / times["bhyt"], f"{r['rows']}x{r['d']}"
        measured, where = worst or (None, "")
        met = None if measured is None else measured >= wanted
        items.append(common.goal(f"{text}, against {against}", f">= {wanted:.2f}x", measured, met, where))
    return items


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds, nothing compiled")
    parser.add_argument("--no-peers", action="store_true", help="bhyt and the copy alone")
    parser.add_argument("--ops", type=lambda s: s.split(","), default=list(OPS))
    parser.add_argument("--dims", type=lambda s: [int(d) for d in s.split(",")], default=None)
    parser.add_argument("--out", help="write here and not into results/<device>/cuda.json")
    options = parser.parse_args()
    options.dims = options.dims or (list(DIMS[::3]) if options.quick else list(DIMS))
    if not torch.cuda.is_available():
        parser.exit(2, "bench_cuda.py: no CUDA device\n")

    torch.manual_seed(0)
    device = common.slug(torch.cuda.get_device_name())
    environment = common_cuda.environment()
    results: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []

    def write() -> Any:
        payload = {"environment": environment, "results": results, "failed": failed, "goals": goals(results)}
        return common.write_json("cuda", payload, device=device, out=options.out)

    for op, group in groupby(problems(options), key=lambda problem: problem[0]):
        for _, rows, d, dtype in group:
            try:
                results.append(measure(op, rows, d, dtype, options))
            except Exception as error:  # one problem must not cost the others
                print(f"{op} {rows}x{d} {dtype} failed: {str(error).splitlines()[0]}", flush=True)
                failed.append({"op": op, "rows": rows, "d": d, "dtype": dtype, "error": str(error)[:500]})
                torch.cuda.empty_cache()
        write()  # a run that is cut short leaves what it has
    for item in goals(results):
        print(common.goal_line(item))
    print(write())
    if failed:
        parser.exit(1, f"{len(failed)} problems failed\n")


if __name__ == "__main__":
    main()
