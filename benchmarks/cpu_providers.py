"""Who bench_cpu.py measures: each provider's function of a case, by the names of its inputs."""

import functools
import importlib.util
from typing import Any, Callable, Mapping, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import bhyt


class Formula(NamedTuple):
    """A function of named inputs; returns (y,) or, in add cases, (y, sum)."""

    inputs: tuple[str, ...]
    function: Callable[..., Sequence[Tensor]]


def site(forward_case: str, ops: Any) -> Formula:
    """The site of a forward case, by `bhyt.functional` or by `bhyt.reference`."""
    op = getattr(ops, forward_case)
    if forward_case == "forward":
        return Formula(("x", "weight", "lam"), lambda x, w, lam: op(x, w, lam)[:1])
    if forward_case == "forward_approx":
        return Formula(
            ("x", "variance", "offset", "weight", "lam"), lambda x, v, o, w, lam: (op(x, v, o, w, lam),)
        )
    if forward_case == "add_forward":
        return Formula(("x", "residual", "weight", "lam"), lambda x, r, w, lam: op(x, r, w, lam)[:2])
    return Formula(("x", "residual", "variance", "offset", "weight", "lam"), op)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return (F.layer_norm(x, x.shape[-1:], weight, bias),)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    total = x + residual
    return F.layer_norm(total, x.shape[-1:], weight, bias), total


def rms_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return (F.rms_norm(x, x.shape[-1:], weight),)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    total = x + residual
    return F.rms_norm(total, x.shape[-1:], weight), total


def dyt(x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return (weight * torch.tanh(alpha * x) + bias,)


def formulas(forward_case: str) -> dict[str, Formula]:
    """Every provider of a forward case but the copy; Inductor's are still to be compiled."""
    adds = forward_case.startswith("add")
    rows = ("x", "residual") if adds else ("x",)
    reference = site(forward_case, bhyt.reference)
    rms = Formula((*rows, "weight"), add_rms_norm if adds else rms_norm)
    table = {
        "bhyt": site(forward_case, bhyt.functional),
        "layer_norm": Formula((*rows, "weight", "bias"), add_layer_norm if adds else layer_norm),
        "rms_norm": rms,
        "eager": reference,
        "inductor": reference,
        "inductor_rms_norm": rms,
    }
    if not adds:
        table["inductor_dyt"] = Formula(("x", "alpha", "weight", "bias"), dyt)
    return table


def has_vllm() -> bool:
    """Whether vLLM is here; its kernels are loaded then: those of the CPU's best instruction set, whatever the tier."""
    if importlib.util.find_spec("vllm") is None:
        return False
    from vllm.platforms import current_platform  # seconds

    current_platform.import_kernels()
    return hasattr(torch.ops._C, "fused_add_rms_norm")


def given(forward_case: str, inputs: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Inputs of calls that write over their own memory again and again: the gain leaves the residual as it is."""
    sets = []
    for named in inputs:
        own = dict(named, x=named["x"].clone(), residual=named["residual"].clone(), weight=named["weight"] * 2**-60)
        own["y"] = own["x"] if forward_case.startswith("add") else torch.empty_like(own["x"])
        own["variance"] = bhyt.reference.mean_square(own["residual" if forward_case.startswith("add") else "x"])
        sets.append(own)
    return sets


def vllm_call(forward_case: str, inputs: Sequence[Mapping[str, Tensor]]) -> Callable[[int], object]:
    """vLLM's kernels return nothing: they write into an output that is given, in add cases over both inputs."""
    own = [(named["y"], named["residual" if forward_case.startswith("add") else "x"], named["weight"])
           for named in given(forward_case, inputs)]  # fmt: skip
    kernel = torch.ops._C.fused_add_rms_norm if forward_case.startswith("add") else torch.ops._C.rms_norm
    return lambda i: kernel(*own[i], 1e-6)


def out_call(forward_case: str, inputs: Sequence[Mapping[str, Tensor]]) -> Callable[[int], object]:
    """The `out` overload of a forward case, over the memory that vLLM's kernels write to."""
    op = getattr(torch.ops.bhyt, forward_case).out
    calls = []
    for named in given(forward_case, inputs):
        arguments = [named[name] for name in site(forward_case, bhyt.functional).inputs]
        outputs = {"y": named["y"]}
        if forward_case.startswith("add"):
            outputs["sum"] = named["residual"]
        if not forward_case.endswith("approx"):
            outputs["variance"] = torch.empty_like(named["variance"])
        calls.append(functools.partial(op, *arguments, **outputs))
    return lambda i: calls[i]()


class Compiler:
    """torch.compile for one shape at a time, each formula at most twice: with and without gradients."""

    def __init__(self) -> None:
        self._compiled: dict[tuple[str, str], Formula] = {}

    def new_shape(self) -> None:
        if self._compiled:
            torch._dynamo.reset()
            self._compiled.clear()

    def __call__(self, provider: str, forward_case: str, formula: Formula) -> Formula:
        key = (provider, forward_case if provider == "inductor" else str(formula.inputs))
        if key not in self._compiled:
            import torch._functorch.config as config  # here: it takes seconds that others need not wait

            # The backward cases run a recorded graph again and again, which donated buffers forbid. These
            # formulas save their inputs and row statistics only, so there is nothing large to donate.
            config.donated_buffer = False
            compiled = torch.compile(formula.function, dynamic=False, fullgraph=True)
            self._compiled[key] = Formula(formula.inputs, compiled)
        return self._compiled[key]
