"""The formulas in plain PyTorch: the definition that the kernels are tested against.

Each function takes the arguments of its namesake in `bhyt.functional`, with the same shapes and dtypes, and returns
the same tuple. Arithmetic is float32 for narrower rows and float64 for float64 rows, as in the kernels. Autograd
differentiates the functions like any other code. They check nothing: the errors are PyTorch's.
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
    """v = mean(x^2) over the last dimension.

    Args:
        row: [..., d], any floating dtype.

    Returns:
        v: [..., 1] float32 (float64 for float64 rows).
    """
    return _accumulate(row).square().mean(-1, keepdim=True)


def forward(
    x: Tensor, weight: Optional[Tensor], lam: Tensor, kappa: float = 10.0, eps: float = 1e-6
) -> Tuple[Tensor, Tensor]:
    """y = weight * tanh(a x), a = lam / (kappa sqrt(v + eps)), v = mean(x^2): (y [..., d], v [..., 1])."""
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
    """y [..., d] = weight * tanh(a x), with a from the given variance [..., 1] and its offset."""
    return _site(x, _shifted(variance, variance_offset), weight, lam, kappa, eps, x.dtype)


def add_forward(
    x: Tensor, residual: Tensor, weight: Optional[Tensor], lam: Tensor, kappa: float = 10.0, eps: float = 1e-6
) -> Tuple[Tensor, Tensor, Tensor]:
    """sum = x + residual, then `forward` on the sum: (y in x's dtype, sum in residual's, variance [..., 1])."""
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
    """sum = x + residual, then `forward_approx` on the sum: (y in x's dtype, sum in residual's)."""
    total = residual + x
    return _site(total, _shifted(variance, variance_offset), weight, lam, kappa, eps, x.dtype), total


def _quantized(y: Tensor, scale: float, zero_point: int, dtype: torch.dtype) -> Tensor:
    """saturate(round_half_even(y / scale) + zero_point); a NaN is zero_point, in float8 NaN."""
    if dtype == torch.float8_e4m3fn:
        return (y / scale).clamp(-448, 448).to(dtype)
    limits = torch.iinfo(dtype)
    q = (y / scale).round().nan_to_num(0.0).clamp(limits.min - zero_point, limits.max - zero_point)
    return (q + zero_point).to(dtype)


def forward_quantized(
    x: Tensor,
    weight: Optional[Tensor],
    lam: Tensor,
    scale: float,
    zero_point: int = 0,
    dtype: torch.dtype = torch.int8,
    kappa: float = 10.0,
    eps: float = 1e-6,
) -> Tuple[Tensor, Tensor]:
    """q = saturate(round_half_even(y / scale) + zero_point), y that of `forward` before any rounding: (q, variance)."""
    row, variance = _accumulate(x), mean_square(x)
    y = _site(row, variance, weight, lam, kappa, eps, row.dtype)
    return _quantized(y, scale, zero_point, dtype), variance


def forward_approx_quantized(
    x: Tensor,
    variance: Tensor,
    variance_offset: Optional[Tensor],
    weight: Optional[Tensor],
    lam: Tensor,
    scale: float,
    zero_point: int = 0,
    dtype: torch.dtype = torch.int8,
    kappa: float = 10.0,
    eps: float = 1e-6,
) -> Tensor:
    """q [..., d] as in `forward_quantized`, y that of `forward_approx` before any rounding."""
    row = _accumulate(x)
    y = _site(row, _shifted(variance, variance_offset), weight, lam, kappa, eps, row.dtype)
    return _quantized(y, scale, zero_point, dtype)


def add_forward_quantized(
    x: Tensor,
    residual: Tensor,
    weight: Optional[Tensor],
    lam: Tensor,
    scale: float,
    zero_point: int = 0,
    dtype: torch.dtype = torch.int8,
    kappa: float = 10.0,
    eps: float = 1e-6,
) -> Tuple[Tensor, Tensor, Tensor]:
    """sum = x + residual, then `forward_quantized` on the sum: (q, sum, variance)."""
    total = residual + x
    q, variance = forward_quantized(total, weight, lam, scale, zero_point, dtype, kappa, eps)
    return q, total, variance


def add_forward_approx_quantized(
    x: Tensor,
    residual: Tensor,
    variance: Tensor,
    variance_offset: Optional[Tensor],
    weight: Optional[Tensor],
    lam: Tensor,
    scale: float,
    zero_point: int = 0,
    dtype: torch.dtype = torch.int8,
    kappa: float = 10.0,
    eps: float = 1e-6,
) -> Tuple[Tensor, Tensor]:
    """sum = x + residual, then `forward_approx_quantized` on the sum: (q, sum)."""
    total = residual + x
    return forward_approx_quantized(
        total, variance, variance_offset, weight, lam, scale, zero_point, dtype, kappa, eps
    ), total
