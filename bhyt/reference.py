"""The formulas in plain PyTorch: the definition the kernels are tested against, in float64 if given float64.

Each function takes what its namesake in `bhyt.functional` takes and returns the same tuple. Arithmetic is float32
for narrower rows, as in the kernels. Autograd differentiates them like any other code.
"""

from typing import Optional, Tuple

import torch
from torch import Tensor


def _accumulate(row: Tensor) -> Tensor:
    return row if row.dtype == torch.float64 else row.float()


def _site(
    row: Tensor, variance: Tensor, weight: Optional[Tensor], lam: Tensor, kappa: float, eps: float, dtype: torch.dtype
) -> Tensor:
    row = _accumulate(row)
    a = lam.to(row.dtype).reshape(()) / (kappa * torch.sqrt(variance + eps))
    y = torch.tanh(a * row)
    if weight is not None:
        y = weight.to(row.dtype) * y
    return y.to(dtype)


def _shifted(variance: Tensor, offset: Optional[Tensor]) -> Tensor:
    return variance if offset is None else variance + offset.detach().to(variance.dtype).reshape(())


def mean_square(row: Tensor) -> Tensor:
    """v = mean(x^2) over the last dimension, [..., 1]."""
    return _accumulate(row).square().mean(-1, keepdim=True)


def forward(
    x: Tensor, weight: Optional[Tensor], lam: Tensor, kappa: float = 10.0, eps: float = 1e-6
) -> Tuple[Tensor, Tensor]:
    """y = weight * tanh(a x), a = lam / (kappa sqrt(v + eps)), v = mean(x^2)."""
    variance = mean_square(x)
    return _site(x, variance, weight, lam, kappa, eps, x.dtype), variance


def forward_approx(
    x: Tensor,
    variance: Tensor,
    variance_offset: Optional[Tensor],
    weight: Optional[Tensor],
    lam: Tensor,
    kappa: float = 10.0,
    eps: float = 1e-6,
) -> Tensor:
    """y = weight * tanh(a x) with a from the given variance and its offset."""
    return _site(x, _shifted(variance, variance_offset), weight, lam, kappa, eps, x.dtype)


def add_forward(
    x: Tensor, residual: Tensor, weight: Optional[Tensor], lam: Tensor, kappa: float = 10.0, eps: float = 1e-6
) -> Tuple[Tensor, Tensor, Tensor]:
    """sum = x + residual, then `forward` on the sum; y in x's dtype."""
    total = residual + x
    variance = mean_square(total)
    return _site(total, variance, weight, lam, kappa, eps, x.dtype), total, variance


def add_forward_approx(
    x: Tensor,
    residual: Tensor,
    variance: Tensor,
    variance_offset: Optional[Tensor],
    weight: Optional[Tensor],
    lam: Tensor,
    kappa: float = 10.0,
    eps: float = 1e-6,
) -> Tuple[Tensor, Tensor]:
    """sum = x + residual, then `forward_approx` on the sum; y in x's dtype."""
    total = residual + x
    return _site(total, _shifted(variance, variance_offset), weight, lam, kappa, eps, x.dtype), total
