"""The problems of bench_cpu.py: cases, the tensors of a problem, and every provider's call of a case."""

import functools
from typing import Sequence

import common
import torch
from cpu_providers import Compiler, Formula, formulas, out_call, vllm_call
from torch import Tensor

import bhyt

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
GIVEN = {"out": out_call, "vllm": vllm_call}  # providers that allocate nothing
DIFFERENTIABLE = ("x", "residual", "variance", "weight", "bias", "lam", "alpha")


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
    if "backward" not in op and not only_compiled:
        calls |= {name: call(op, buffers.inputs) for name, call in GIVEN.items() if name in peers}
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
