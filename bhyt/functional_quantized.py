"""The quantised twins of the four forward ops, to be called through `bhyt.functional`, which has dtypes and errors."""

from typing import Callable, Optional, Tuple

import torch
from torch import Tensor

from bhyt import reference
from bhyt.compiling import wants_formula

_scripting: Callable[[], bool] = torch.jit.is_scripting  # type: ignore[attr-defined]
_forward_quantized: Callable[..., Tuple[Tensor, Tensor]] = torch.ops.bhyt.forward_quantized
_forward_approx_quantized: Callable[..., Tensor] = torch.ops.bhyt.forward_approx_quantized
_add_forward_quantized: Callable[..., Tuple[Tensor, Tensor, Tensor]] = torch.ops.bhyt.add_forward_quantized
_add_forward_approx_quantized: Callable[..., Tuple[Tensor, Tensor]] = torch.ops.bhyt.add_forward_approx_quantized


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
    """`forward` with y in eight bits: q = saturate(round_half_even(y / scale) + zero_point). y is not rounded before.

    |y| <= |weight| for every input, so scale = max|weight| / 127 is right for int8 without calibration. The op is not
    differentiable, and not in the paper.

    Args:
        x: [..., d], any floating dtype.
        weight: [d] or None (gain 1).
        lam: one element.
        scale: a number from 2^-126 to 2^126.
        zero_point: an integer that dtype holds; 0 for float8_e4m3fn.
        dtype: int8, uint8 (oneDNN's linears read it with zero_point 128) or float8_e4m3fn, which saturates at 448.
        kappa: > 0; see `forward`.
        eps: >= 0, added to the variance.

    Returns:
        q: [..., d] of dtype. Where y is NaN, q is zero_point; in float8_e4m3fn it is NaN.
        variance: as from `forward`, the same bits.

    Raises:
        TypeError: a tensor, or `dtype`, of another dtype.
        ValueError: a shape or device that does not fit x; kappa, eps, scale or zero_point out of range.
        RuntimeError: a gradient would have to be recorded.

    Examples:
        >>> import torch, bhyt
        >>> q, _ = bhyt.functional.forward_quantized(torch.ones(1, 4), None, torch.tensor([2.0]), scale=1 / 127)
        >>> q
        tensor([[25, 25, 25, 25]], dtype=torch.int8)
    """
    if not _scripting():
        if wants_formula("forward_quantized"):
            return reference.forward_quantized(x, weight, lam, scale, zero_point, dtype, kappa, eps)
    return _forward_quantized(x, weight, lam, scale, zero_point, dtype, kappa, eps)


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
    """`forward_approx` with y in eight bits; see `forward_quantized`.

    Args:
        x: [..., d], any floating dtype.
        variance: [..., 1] float32 (float64 for float64 rows), as the exact site of the block returned it.
        variance_offset: one element, or None (0); c * lam1^2 / kappa^2, see `attention_gain`. It gets no gradient.
        weight: [d] or None (gain 1).
        lam: one element.
        scale: a number from 2^-126 to 2^126; see `forward_quantized`.
        zero_point: an integer that dtype holds; 0 for float8_e4m3fn.
        dtype: int8, uint8 or float8_e4m3fn.
        kappa: > 0; see `forward`.
        eps: >= 0, added to the variance.

    Returns:
        q: [..., d] of dtype.

    Raises:
        TypeError: a tensor, or `dtype`, of another dtype.
        ValueError: a shape or device that does not fit x; kappa, eps, scale or zero_point out of range.
        RuntimeError: a gradient would have to be recorded.
    """
    if not _scripting():
        if wants_formula("forward_approx_quantized"):
            return reference.forward_approx_quantized(
                x, variance, variance_offset, weight, lam, scale, zero_point, dtype, kappa, eps
            )
    return _forward_approx_quantized(
        x, variance, variance_offset, weight, lam, scale, zero_point, dtype, kappa, eps
    )


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
    """`add_forward` with y in eight bits; see `forward_quantized`.

    Args:
        x: [..., d], the branch to add, any floating dtype.
        residual: [..., d], the stream that x is added to, of x's dtype or a wider one.
        weight: [d] or None (gain 1).
        lam: one element.
        scale: a number from 2^-126 to 2^126; see `forward_quantized`.
        zero_point: an integer that dtype holds; 0 for float8_e4m3fn.
        dtype: int8, uint8 or float8_e4m3fn.
        kappa: > 0; see `forward`.
        eps: >= 0, added to the variance.

    Returns:
        q: [..., d] of dtype.
        sum: as from `add_forward`, the same bits.
        variance: as from `add_forward`, the same bits.

    Raises:
        TypeError: a tensor, or `dtype`, of another dtype.
        ValueError: a shape or device that does not fit x; kappa, eps, scale or zero_point out of range.
        RuntimeError: a gradient would have to be recorded.
    """
    if not _scripting():
        if wants_formula("add_forward_quantized"):
            return reference.add_forward_quantized(x, residual, weight, lam, scale, zero_point, dtype, kappa, eps)
    return _add_forward_quantized(x, residual, weight, lam, scale, zero_point, dtype, kappa, eps)


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
    """`add_forward_approx` with y in eight bits; see `forward_quantized`.

    Args:
        x: [..., d], the branch to add, any floating dtype.
        residual: [..., d], the stream that x is added to, of x's dtype or a wider one.
        variance: [..., 1] float32 (float64 for float64 rows), as the exact site of the block returned it.
        variance_offset: one element, or None (0); c * lam1^2 / kappa^2, see `attention_gain`. It gets no gradient.
        weight: [d] or None (gain 1).
        lam: one element.
        scale: a number from 2^-126 to 2^126; see `forward_quantized`.
        zero_point: an integer that dtype holds; 0 for float8_e4m3fn.
        dtype: int8, uint8 or float8_e4m3fn.
        kappa: > 0; see `forward`.
        eps: >= 0, added to the variance.

    Returns:
        q: [..., d] of dtype.
        sum: as from `add_forward_approx`, the same bits.

    Raises:
        TypeError: a tensor, or `dtype`, of another dtype.
        ValueError: a shape or device that does not fit x; kappa, eps, scale or zero_point out of range.
        RuntimeError: a gradient would have to be recorded.
    """
    if not _scripting():
        if wants_formula("add_forward_approx_quantized"):
            return reference.add_forward_approx_quantized(
                x, residual, variance, variance_offset, weight, lam, scale, zero_point, dtype, kappa, eps
            )
    return _add_forward_approx_quantized(
        x, residual, variance, variance_offset, weight, lam, scale, zero_point, dtype, kappa, eps
    )
