"""The formulas of arXiv 2601.09719 in plain PyTorch: the definition that the kernels are tested against.

Each function takes the arguments of its namesake in `bhyt.functional`, and returns the same tuple. Arithmetic is
float32 for narrower rows and float64 for float64 rows, as in the kernels. Autograd differentiates the functions like
any other code. They check nothing: the errors are PyTorch's. The quantised functions are not in the paper.
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
    """Exact site: y = weight * tanh(a x), a = lam / (kappa sqrt(v + eps)), v = mean(x^2).

    Args:
        x: [..., d], any floating dtype.
        weight: [d] or None (gain 1).
        lam: one element.
        kappa: > 0.
        eps: >= 0, added to the variance.

    Returns:
        y: [..., d] in x's dtype.
        variance: v, [..., 1] float32 (float64 for float64 rows).
    """
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
    """Approximate site: y = weight * tanh(a x), a = lam / (kappa sqrt(variance + variance_offset + eps)).

    Args:
        x: [..., d], any floating dtype.
        variance: [..., 1] float32 (float64 for float64 rows).
        variance_offset: one element, or None (0). It gets no gradient.
        weight: [d] or None (gain 1).
        lam: one element.
        kappa: > 0.
        eps: >= 0, added to the variance.

    Returns:
        y: [..., d] in x's dtype.
    """
    return _site(x, _shifted(variance, variance_offset), weight, lam, kappa, eps, x.dtype)


def add_forward(
    x: Tensor, residual: Tensor, weight: Optional[Tensor], lam: Tensor, kappa: float = 10.0, eps: float = 1e-6
) -> Tuple[Tensor, Tensor, Tensor]:
    """sum = x + residual, then `forward` on the sum.

    Args:
        x: [..., d], the branch to add, any floating dtype.
        residual: [..., d], the stream, of x's dtype or a wider one.
        weight: [d] or None (gain 1).
        lam: one element.
        kappa: > 0.
        eps: >= 0, added to the variance.

    Returns:
        y: [..., d] in x's dtype.
        sum: [..., d] in residual's dtype.
        variance: of the sum, [..., 1] float32 (float64 for float64 rows).
    """
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
    """sum = x + residual, then `forward_approx` on the sum.

    Args:
        x: [..., d], the branch to add, any floating dtype.
        residual: [..., d], the stream, of x's dtype or a wider one.
        variance: [..., 1] float32 (float64 for float64 rows).
        variance_offset: one element, or None (0). It gets no gradient.
        weight: [d] or None (gain 1).
        lam: one element.
        kappa: > 0.
        eps: >= 0, added to the variance.

    Returns:
        y: [..., d] in x's dtype.
        sum: [..., d] in residual's dtype.
    """
    total = residual + x
    return _site(total, _shifted(variance, variance_offset), weight, lam, kappa, eps, x.dtype), total


def _quantized(y: Tensor, scale: float, zero_point: int, dtype: torch.dtype) -> Tensor:
    """saturate(round_half_even(y / scale) + zero_point). A NaN becomes zero_point; in float8 it stays NaN."""
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
    """q = saturate(round_half_even(y / scale) + zero_point), with the y of `forward` before any rounding.

    Args:
        x: [..., d], any floating dtype.
        weight: [d] or None (gain 1).
        lam: one element.
        scale: the step of q, > 0.
        zero_point: an integer that dtype holds; 0 for float8_e4m3fn.
        dtype: int8, uint8 or float8_e4m3fn.
        kappa: > 0.
        eps: >= 0, added to the variance.

    Returns:
        q: [..., d] of dtype.
        variance: v, [..., 1] float32 (float64 for float64 rows).
    """
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
    """q as in `forward_quantized`, with the y of `forward_approx` before any rounding.

    Args:
        x: [..., d], any floating dtype.
        variance: [..., 1] float32 (float64 for float64 rows).
        variance_offset: one element, or None (0). It gets no gradient.
        weight: [d] or None (gain 1).
        lam: one element.
        scale: the step of q, > 0.
        zero_point: an integer that dtype holds; 0 for float8_e4m3fn.
        dtype: int8, uint8 or float8_e4m3fn.
        kappa: > 0.
        eps: >= 0, added to the variance.

    Returns:
        q: [..., d] of dtype.
    """
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
    """sum = x + residual, then `forward_quantized` on the sum.

    Args:
        x: [..., d], the branch to add, any floating dtype.
        residual: [..., d], the stream, of x's dtype or a wider one.
        weight: [d] or None (gain 1).
        lam: one element.
        scale: the step of q, > 0.
        zero_point: an integer that dtype holds; 0 for float8_e4m3fn.
        dtype: int8, uint8 or float8_e4m3fn.
        kappa: > 0.
        eps: >= 0, added to the variance.

    Returns:
        q: [..., d] of dtype.
        sum: [..., d] in residual's dtype.
        variance: of the sum, [..., 1] float32 (float64 for float64 rows).
    """
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
    """sum = x + residual, then `forward_approx_quantized` on the sum.

    Args:
        x: [..., d], the branch to add, any floating dtype.
        residual: [..., d], the stream, of x's dtype or a wider one.
        variance: [..., 1] float32 (float64 for float64 rows).
        variance_offset: one element, or None (0). It gets no gradient.
        weight: [d] or None (gain 1).
        lam: one element.
        scale: the step of q, > 0.
        zero_point: an integer that dtype holds; 0 for float8_e4m3fn.
        dtype: int8, uint8 or float8_e4m3fn.
        kappa: > 0.
        eps: >= 0, added to the variance.

    Returns:
        q: [..., d] of dtype.
        sum: [..., d] in residual's dtype.
    """
    total = residual + x
    return forward_approx_quantized(
        total, variance, variance_offset, weight, lam, scale, zero_point, dtype, kappa, eps
    ), total
