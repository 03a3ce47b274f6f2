"""Who takes part in bench_cuda.py: this package's ops, a copy, and every norm that is installed, each with its float64.

A provider is a call on the i-th set of buffers. Before it is timed, its outputs on the first set are compared with the
same function of float64 tensors; nobody is timed who computes something else.
"""

from dataclasses import dataclass
from typing import Any, Callable, Mapping, Optional

import common
import torch
import torch.nn.functional as F
from torch import Tensor

import bhyt

KAPPA, EPS, SCALE = 10.0, 1e-6, 1 / 64
# Relative to the largest outputs' size, ||error|| / ||exact||: several roundings of the narrow dtype, none of another
# formula.
BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}
CHUNK = 2**24  # elements turned to float64 at a time

Call = Callable[[int], object]
Function = Callable[..., Any]


class Buffers:
    """`sets` sets of rows for one problem; parameters are shared."""

    def __init__(self, rows: int, d: int, dtype: torch.dtype, sets: int, device: str = "cuda") -> None:
        normal = torch.randn(2, rows, d, device=device, dtype=dtype)
        # One behind the other, so that one copy can move both.
        self.pairs = [normal.clone() for _ in range(sets)]
        self.x = [pair[0] for pair in self.pairs]
        self.residual = [pair[1] for pair in self.pairs]
        self.grad_y = [normal[1].clone() for _ in range(sets)]
        self.grad_sum = [normal[0].clone() for _ in range(sets)]
        self.variance = [x.float().square().mean(-1, keepdim=True) for x in self.x]
        self.weight = torch.linspace(0.5, 1.5, d, device=device, dtype=dtype)
        self.bias = torch.zeros(d, device=device, dtype=dtype)
        self.lam = torch.full((1,), 2.0, device=device, dtype=dtype)
        self.alpha = torch.full((1,), 0.5, device=device, dtype=dtype)
        self.offset = torch.tensor(0.01, device=device)

    def inputs(self, names: tuple[str, ...], i: int) -> list[Tensor]:
        values = [getattr(self, name) for name in names]
        return [value[i] if isinstance(value, list) else value for value in values]

    def grads(self, op: str, i: int) -> tuple[Tensor, ...]:
        return (self.grad_y[i], self.grad_sum[i]) if op.startswith("add") else (self.grad_y[i],)


@dataclass
class Provider:
    call: Call
    exact: Optional[Function] = None  # of float64 rows; None: nothing to compare, a copy
    inputs: tuple[str, ...] = ()  # of `exact`, in the order of the gradients


@dataclass
class Peer:
    function: Function
    inputs: tuple[str, ...]
    exact: Function
    backward: bool = True
    in_place: bool = False  # writes to what it is given: it gets rows of its own


# This package, and the copy -------------------------------------------------------------------------------------------


def formula(op: str) -> tuple[Function, tuple[str, ...]]:
    """The op's forward in plain PyTorch, or what its backward differentiates, and the names of its inputs."""
    forward = op.replace("backward", "forward").removesuffix("_quantized")
    reference = getattr(bhyt.reference, forward + op.removeprefix(forward) if "quantized" in op else forward)
    rows = ("x",) if "backward" in op or not op.startswith("add") else ("x", "residual")
    inputs = (*rows, "variance", "weight", "lam") if "approx" in op else (*rows, "weight", "lam")

    def site(*tensors: Tensor, offset: Optional[Tensor] = None) -> Any:
        row, rest = list(tensors[: len(rows)]), list(tensors[len(rows) :])
        if "approx" in op:
            rest.insert(1, torch.tensor(0.01, device=row[0].device) if offset is None else offset)
        extra = (SCALE,) if "quantized" in op else ()
        if "backward" not in op:
            return reference(*row, *rest, *extra, kappa=KAPPA, eps=EPS)
        one = getattr(bhyt.reference, forward.removeprefix("add_"))(*row, *rest, KAPPA, EPS)
        y = one[0] if isinstance(one, tuple) else one
        return (y, row[0] * 1) if op.startswith("add") else y

    return site, inputs


def own(op: str, b: Buffers) -> Call:
    ops, w, lam = torch.ops.bhyt, b.weight, b.lam
    if "backward" not in op:
        function, names = getattr(ops, op), formula(op)[1]
        extra = (SCALE, 0, torch.int8) if "quantized" in op else ()

        def forward(i: int) -> object:
            tensors = b.inputs(names, i)
            if "approx" in op:
                tensors.insert(-2, b.offset)
            return function(*tensors, *extra, KAPPA, EPS)

        return forward
    with_sum = op.startswith("add")
    if op.endswith("approx"):
        return lambda i: ops.backward_approx(
            b.grad_y[i], b.grad_sum[i] if with_sum else None, b.x[i], b.variance[i], b.offset, w, lam, KAPPA, EPS,
            [True] * 4,
        )  # fmt: skip
    return lambda i: ops.backward(
        b.grad_y[i], None, b.grad_sum[i] if with_sum else None, b.x[i], b.variance[i], w, lam, KAPPA, EPS, [True] * 3
    )


def copy(op: str, b: Buffers) -> Optional[Call]:
    """Plain PyTorch with the same reads and writes; none for integers, which no copy makes of rows."""
    if op not in common.MIX:
        return None
    reads_writes = common.MIX[op]
    if reads_writes == (1, 1):
        return lambda i: torch.empty_like(b.x[i]).copy_(b.x[i])
    if reads_writes == (2, 2):
        return lambda i: torch.empty_like(b.pairs[i]).copy_(b.pairs[i])
    if reads_writes == (2, 1):
        return lambda i: torch.add(b.x[i], b.grad_y[i])
    return lambda i: torch.addcmul(b.x[i], b.grad_y[i], b.grad_sum[i])


# Peers ----------------------------------------------------------------------------------------------------------------


def rms(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, w.shape, w, EPS)


def layer(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, w.shape, w, bias)


def add_rms(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    s = x + r
    return rms(s, w), s


def add_layer(x: Tensor, r: Tensor, w: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    s = x + r
    return layer(s, w, bias), s


def dyt(x: Tensor, alpha: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return torch.tanh(alpha * x) * w + bias


ROWS, ADDED = ("x", "weight"), ("x", "residual", "weight")


def aten(adds: bool) -> dict[str, Peer]:
    if adds:
        return {
            "rms_norm": Peer(add_rms, ADDED, add_rms),
            "layer_norm": Peer(add_layer, (*ADDED, "bias"), add_layer),
        }
    return {"rms_norm": Peer(rms, ROWS, rms), "layer_norm": Peer(layer, (*ROWS, "bias"), layer)}


def liger(adds: bool) -> dict[str, Peer]:
    if adds:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction as add

        return {"liger_add_rms_norm": Peer(lambda *t: add.apply(*t, EPS, 0.0, "llama", False), ADDED, add_rms)}
    from liger_kernel.ops.dyt import LigerDyTFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return {
        "liger_rms_norm": Peer(lambda *t: LigerRMSNormFunction.apply(*t, EPS, 0.0, "llama", False), ROWS, rms),
        "liger_dyt": Peer(LigerDyTFunction.apply, ("x", "alpha", "weight", "bias"), dyt),
    }


def quack(adds: bool) -> dict[str, Peer]:
    from quack import rmsnorm

    if adds:
        return {
            "quack_rms_norm": Peer(
                lambda x, r, w: rmsnorm(x, w, residual=r, eps=EPS, prenorm=True), ADDED, add_rms
            )
        }
    return {"quack_rms_norm": Peer(lambda x, w: rmsnorm(x, w, eps=EPS), ROWS, rms)}


def flashinfer(adds: bool) -> dict[str, Peer]:
    from flashinfer.norm import fused_add_rmsnorm, rmsnorm

    def add(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        fused_add_rmsnorm(x, r, w, EPS)
        return x, r

    if adds:
        return {"flashinfer_add_rms_norm": Peer(add, ADDED, add_rms, backward=False, in_place=True)}
    return {"flashinfer_rms_norm": Peer(lambda x, w: rmsnorm(x, w, EPS), ROWS, rms, backward=False)}


PEERS: dict[str, Callable[[bool], dict[str, Peer]]] = {
    "aten": aten, "liger": liger, "quack": quack, "flashinfer": flashinfer,
}  # fmt: skip


def peers(op: str) -> tuple[dict[str, Peer], dict[str, str]]:
    """Those that can take part in `op`, and why others of PEERS cannot."""
    found: dict[str, Peer] = {}
    missing: dict[str, str] = {}
    for name, load in PEERS.items():
        try:
            table = load(op.startswith("add"))
        except Exception as error:  # a package that is there may still not load on this machine
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            continue
        found |= {name: peer for name, peer in table.items() if peer.backward or "backward" not in op}
    return found, missing


def compiled(op: str, b: Buffers) -> dict[str, Peer]:
    """torch.compile of the formula, and of the RMSNorm beside it, in plain PyTorch."""
    site, inputs = formula(op)
    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False  # the recorded graph is run again and again
    adds = op.startswith("add")
    norm, names = (add_rms, ADDED) if adds else (rms, ROWS)

    def compile(function: Function) -> Function:
        return torch.compile(function, dynamic=False, fullgraph=True)

    return {
        "inductor": Peer(compile(lambda *t: site(*t, offset=b.offset)), inputs, site),
        "inductor_rms_norm": Peer(compile(norm), names, norm),
    }


def through_autograd(function: Function, inputs: list[list[Tensor]], grads: list[tuple[Tensor, ...]]) -> Call:
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


def provider(op: str, b: Buffers, peer: Peer) -> Provider:
    inputs = [b.inputs(peer.inputs, i) for i in range(len(b.x))]
    if peer.in_place:
        inputs = [[t.clone() for t in each] for each in inputs]
    if "backward" in op:
        call = through_autograd(peer.function, inputs, [b.grads(op, i) for i in range(len(b.x))])
    else:
        call = lambda i: peer.function(*inputs[i])  # noqa: E731
    return Provider(call, peer.exact, peer.inputs)


def own_providers(op: str, b: Buffers) -> dict[str, Provider]:
    table = {"bhyt": Provider(own(op, b), *formula(op))}
    plain = op.removesuffix("_quantized")
    if plain != op:
        table["unquantized"] = Provider(own(plain, b), *formula(plain))
    if moves := copy(op, b):
        table["copy"] = Provider(moves)
    return table


# Correct first --------------------------------------------------------------------------------------------------------


def error(op: str, b: Buffers, one: Provider) -> float:
    """The largest ||output - exact|| / ||exact|| among the outputs of the first set, summed in chunks of rows. Of one
    number, the gradient of lam or alpha, nothing is asked: its sum cancels."""
    found = one.call(0)
    outputs = [t.detach() for t in (found if isinstance(found, (tuple, list)) else (found,))]
    rows, d = b.x[0].shape
    given = b.inputs(one.inputs, 0)
    step = max(1, CHUNK // d)
    sums: dict[int, Tensor] = {}  # of parameters' gradients
    wrong, size = [0.0] * len(outputs), [0.0] * len(outputs)

    def compare(k: int, output: Tensor, exact: Tensor) -> None:
        wrong[k] += (output.double() - exact.double()).square().sum().item()
        size[k] += exact.double().square().sum().item()

    for start in range(0, rows, step):
        part = slice(start, start + step)
        tensors = [(t[part] if t.dim() == 2 else t).double() for t in given]
        assert one.exact is not None
        if "backward" in op:
            leaves = [t.requires_grad_() for t in tensors]
            result = one.exact(*leaves)
            result = result if isinstance(result, tuple) else (result,)
            exact = torch.autograd.grad(result, leaves, [g[part].double() for g in b.grads(op, 0)])
        else:
            result = one.exact(*tensors)
            exact = result if isinstance(result, tuple) else (result,)
        for k, (output, value) in enumerate(zip(outputs, exact, strict=True)):
            if value.dim() == 2:
                compare(k, output[part], value)
            else:
                sums[k] = sums.get(k, 0) + value.detach()
    for k, total in sums.items():
        if total.numel() > 1:
            compare(k, outputs[k], total)
    return max((w / s) ** 0.5 if s > 0 else float(w > 0) for w, s in zip(wrong, size))


def checked(op: str, b: Buffers, table: Mapping[str, Provider]) -> tuple[dict[str, Call], dict[str, str]]:
    """The calls of those that compute what they should, and what is wrong with the others."""
    bound = BOUNDS[b.x[0].dtype]
    calls: dict[str, Call] = {}
    wrong: dict[str, str] = {}
    for name, one in table.items():
        try:
            off = 0.0 if one.exact is None else error(op, b, one)
        except Exception as failure:  # one provider must not cost the others
            wrong[name] = f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
            continue
        if off <= bound:  # NaN is not
            calls[name] = one.call
        else:
            wrong[name] = f"relative error {off:.2g}, allowed {bound:.0e}"
    return calls, wrong
