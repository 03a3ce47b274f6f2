"""Calls of the four forward ops as values, and the rows they are given: tests vary one field and leave the
rest."""

from dataclasses import dataclass, replace
from typing import Dict, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

import bhyt

FORMS = ("forward", "forward_approx", "add_forward", "add_forward_approx")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# kind of rows, lam, kappa: each stresses the statistic, the argument of tanh or the gradient in its own way.
STRESSES = (
    ("normal", 2.0, 10.0),
    ("normal", 30.0, 1.0),  # saturated
    ("normal", 1e-3, 10.0),  # nearly linear
    ("outlier", 2.0, 10.0),
    ("constant", 2.0, 10.0),
    ("scales", 2.0, 10.0),
)


class Outputs(NamedTuple):
    y: Tensor
    sum: Optional[Tensor] = None
    variance: Optional[Tensor] = None


@dataclass(frozen=True)
class Call:
    """One call of a forward op. Approximate forms have a variance, adding forms a residual."""

    x: Tensor
    lam: Tensor
    weight: Optional[Tensor] = None
    residual: Optional[Tensor] = None
    variance: Optional[Tensor] = None
    offset: Optional[Tensor] = None
    kappa: float = 10.0
    eps: float = 1e-6

    @property
    def exact(self) -> bool:
        return self.variance is None

    @property
    def adds(self) -> bool:
        return self.residual is not None

    @property
    def accumulate(self) -> torch.dtype:
        """The dtype of arithmetic, statistics and sums: float64 for a float64 stream, else float32."""
        stream = self.residual if self.adds else self.x
        return torch.float64 if stream.dtype == torch.float64 else torch.float32

    @property
    def form(self) -> str:
        return ("add_" if self.adds else "") + "forward" + ("" if self.exact else "_approx")

    def arguments(self) -> list:
        """The op's arguments, in the schema's order."""
        rows = [self.x, self.residual] if self.adds else [self.x]
        given = [] if self.exact else [self.variance, self.offset]
        return [*rows, *given, self.weight, self.lam, self.kappa, self.eps]

    def run(self, functions=bhyt.functional) -> Outputs:
        out = getattr(functions, self.form)(*self.arguments())
        if self.exact:
            return Outputs(*out) if self.adds else Outputs(out[0], None, out[1])
        return Outputs(*out) if self.adds else Outputs(out)

    def differentiable(self) -> Dict[str, Tensor]:
        """The tensors given that can have a gradient, by name."""
        named = {"x": self.x, "residual": self.residual, "variance": self.variance, "weight": self.weight}
        return {name: t for name, t in {**named, "lam": self.lam}.items() if t is not None}

    def requiring_grad(self, names: Optional[Sequence[str]] = None) -> "Call":
        """The same call on leaves of the same memory; those named (None: all) require grad."""
        leaves = {
            name: t.detach().requires_grad_(names is None or name in names)
            for name, t in self.differentiable().items()
        }
        return replace(self, **leaves)


def run_with_gradients(
    call: Call,
    grad_y: Optional[Tensor],
    grad_sum: Optional[Tensor] = None,
    grad_variance: Optional[Tensor] = None,
    names: Optional[Sequence[str]] = None,
    functions=bhyt.functional,
) -> Tuple[Outputs, Dict[str, Tensor]]:
    """The outputs, and the gradients of the inputs named (None: all) given those of the outputs (None: not
    used)."""
    leaves = call.requiring_grad(names)
    out = leaves.run(functions)
    wanted = {name: t for name, t in leaves.differentiable().items() if t.requires_grad}
    used = [(o, g) for o, g in zip(out, (grad_y, grad_sum, grad_variance)) if o is not None and g is not None]
    grads = torch.autograd.grad(
        [o for o, _ in used], list(wanted.values()), [g for _, g in used], allow_unused=True
    )
    detached = Outputs(*(o if o is None else o.detach() for o in out))
    return detached, dict(zip(wanted, grads))


def make_rows(
    kind: str, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Tensor:
    """Rows [..., d]: normal; one element of 1000 sigma in each; constant; or rows 2^-8 to 2^8 apart in
    scale."""
    x = torch.randn(*shape)
    if kind == "outlier" and x.numel():
        x.select(-1, shape[-1] // 2).fill_(1000.0)
    elif kind == "constant":
        x = x[..., :1].expand(*shape)
    elif kind == "scales":
        x = x * 2.0 ** torch.randint(-8, 9, (*shape[:-1], 1))
    return x.to(dtype).to(device).contiguous()


def make_call(
    form: str,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    rows: str = "normal",
    lam: float = 2.0,
    kappa: float = 10.0,
    eps: float = 1e-6,
    stream: Optional[torch.dtype] = None,
    weight: Optional[torch.dtype] = torch.float32,
    lam_dtype: torch.dtype = torch.float32,
    offset: Optional[float] = 0.25,
) -> Call:
    """A call of `form` on random rows; weight is the gain's dtype (None: no gain), stream the residual's."""
    adds, exact = form.startswith("add_"), not form.endswith("_approx")
    stream = stream or dtype
    accumulate = torch.float64 if stream == torch.float64 else torch.float32
    on = {"device": device}
    x = make_rows(rows, shape, dtype, device)
    residual = make_rows(rows, shape, stream, device) if adds else None
    variance = offset_tensor = None
    if not exact:
        variance = (torch.rand(*shape[:-1], 1) + 0.5).to(**on, dtype=accumulate)
        offset_tensor = None if offset is None else torch.tensor(offset, **on)
    return Call(
        x=x,
        lam=torch.tensor([lam]).to(**on, dtype=lam_dtype),
        weight=None if weight is None else (torch.randn(shape[-1]) * 0.5 + 1).to(**on, dtype=weight),
        residual=residual,
        variance=variance,
        offset=offset_tensor,
        kappa=kappa,
        eps=eps,
    )


def make_upstream(call: Call) -> Outputs:
    """Random gradients for every output of `call`, in the outputs' dtypes.

    That of y leans towards the sign of the row: S = sum g x then does not cancel, and an error relative to it
    means something.
    """
    stream = call.residual if call.adds else call.x
    row = call.x + call.residual if call.adds else call.x

    def normal(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.randn(*shape).to(device=stream.device, dtype=dtype)

    return Outputs(
        (normal(torch.float32, *row.shape) + row.sign()).to(call.x.dtype),
        normal(stream.dtype, *row.shape) if call.adds else None,
        normal(call.accumulate, *row.shape[:-1], 1) if call.exact else None,
    )
