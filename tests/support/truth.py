"""The layer and its derivatives in float64, written from SPEC.md section 1 and independently of bhyt.

Inputs are taken as they were rounded. 1 - t^2 is written as 1 / cosh^2, which does not cancel.
`test_accuracy.py` checks the closed derivatives against differentiating the formula.
"""

from typing import Dict, Optional

import torch
from torch import Tensor

from support.cases import Call, Outputs


def stored_sum(call: Call) -> Tensor:
    """The row a site sees: x, or x + residual rounded once to the stream's dtype."""
    if call.residual is None:
        return call.x
    return (call.x.double() + call.residual.double()).to(call.residual.dtype)


def mean_square(row: Tensor) -> Tensor:
    return row.double().square().mean(-1, keepdim=True)


def _scale(call: Call, row: Tensor) -> Tensor:
    """1 / (kappa sqrt(v + offset + eps)) = a / lam, [..., 1]."""
    v = mean_square(row) if call.variance is None else call.variance.double()
    if call.offset is not None:
        v = v + call.offset.double().reshape(())
    return 1 / (call.kappa * (v + call.eps).sqrt())


def outputs(call: Call) -> Outputs:
    """y and variance in float64; sum as it is stored."""
    total = stored_sum(call)
    row = total.double()
    y = torch.tanh(_scale(call, row) * call.lam.double().reshape(()) * row)
    if call.weight is not None:
        y = call.weight.double() * y
    variance = mean_square(row) if call.exact else None
    return Outputs(y, total if call.adds else None, variance)


def gradients(
    call: Call,
    grad_y: Optional[Tensor],
    grad_sum: Optional[Tensor] = None,
    grad_variance: Optional[Tensor] = None,
) -> Dict[str, Tensor]:
    """The gradient of every differentiable input, in float64, given those of the outputs (None: not used)."""
    row = stored_sum(call).double()
    d = row.shape[-1]
    scale, lam = _scale(call, row), call.lam.double().reshape(())
    a = scale * lam
    z = a * row
    upstream = torch.zeros_like(row) if grad_y is None else grad_y.double()
    g = upstream / torch.cosh(z).square()
    if call.weight is not None:
        g = g * call.weight.double()
    s = (g * row).sum(-1, keepdim=True)
    result = {"lam": (scale * s).sum().reshape(call.lam.shape)}
    if call.weight is not None:
        result["weight"] = (upstream * torch.tanh(z)).reshape(-1, d).sum(0)
    dv = -0.5 * a * s * (scale * call.kappa).square()  # 1 / (v' + eps) = (kappa scale)^2
    grad_row = a * g
    if call.exact:
        through_v = dv if grad_variance is None else dv + grad_variance.double()
        grad_row = grad_row + 2 * row * through_v / d
    else:
        result["variance"] = dv
    if grad_sum is not None:
        grad_row = grad_row + grad_sum.double()
    result["x"] = grad_row
    if call.adds:
        result["residual"] = grad_row
    return result
