"""The four forward ops, differentiable in every tensor but `variance_offset`, and their quantised twins.

A row is the last dimension, of d elements; `[...]` is any number of leading dimensions.

Dtypes: rows are float32, float64, float16 or bfloat16. Arithmetic, variances and sums over rows are float32 (float64
for float64 rows), with one rounding at the end. `weight`, `lam` and `variance_offset` may have any of these dtypes,
whatever dtype the rows have; no tensor is cast before the kernel. Autocast changes nothing: y keeps x's dtype.

Errors: a wrong dtype raises TypeError. A wrong shape, device, kappa or eps raises ValueError. The message names the
argument, what was expected and what was given.

Formulas: "Bounded Hyperbolic Tangent: A Stable and Efficient Alternative to Pre-Layer Normalization in Large Language
Models", arXiv 2601.09719; `docs/mathematics.md` has them with their gradients.
"""

from typing import Callable, Optional, Tuple

import torch
from torch import Tensor

from bhyt import reference
from bhyt.compiling import wants_formula
from bhyt.functional_quantized import (
    add_forward_approx_quantized as add_forward_approx_quantized,
    add_forward_quantized as add_forward_quantized,
    forward_approx_quantized as forward_approx_quantized,
    forward_quantized as forward_quantized,
)

_scripting: Callable[[], bool] = torch.jit.is_scripting  # type: ignore[attr-defined]

# Looked up once: three attributes of torch.ops cost half a microsecond a call.
_forward: Callable[..., Tuple[Tensor, Tensor]] = torch.ops.bhyt.forward
_forward_approx: Callable[..., Tensor] = torch.ops.bhyt.forward_approx
_add_forward: Callable[..., Tuple[Tensor, Tensor, Tensor]] = torch.ops.bhyt.add_forward
_add_forward_approx: Callable[..., Tuple[Tensor, Tensor]] = torch.ops.bhyt.add_forward_approx


def forward(
    x: Tensor, weight: Optional[Tensor], lam: Tensor, kappa: float = 10.0, eps: float = 1e-6
) -> Tuple[Tensor, Tensor]:
    """Exact site: v = mean(x^2), y = weight * tanh(lam * x / (kappa * sqrt(v + eps))) (arXiv 2601.09719).

    Args:
        x: [..., d], any floating dtype.
        weight: [d] or None (gain 1).
        lam: one element.
        kappa: > 0; by Chebyshev's inequality the argument of tanh stays within [-lam, lam] with probability of at
            least 1 - 1/kappa^2, whatever the distribution of x.
        eps: >= 0, added to v.

    Returns:
        y: [..., d] in x's dtype, |y| <= |weight| rounded to that dtype.
        variance: v, [..., 1] float32 (float64 for float64 x), for the approximate site of the same block.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: a shape or device that does not fit x, kappa <= 0 or eps < 0.

    Examples:
        >>> import torch, bhyt
        >>> y, variance = bhyt.functional.forward(torch.ones(2, 4), None, torch.tensor([2.0]))
        >>> y.shape, variance.shape, round(y[0, 0].item(), 4)
        (torch.Size([2, 4]), torch.Size([2, 1]), 0.1974)
    """
    if not _scripting():
        if wants_formula("forward"):
            return reference.forward(x, weight, lam, kappa, eps)
    return _forward(x, weight, lam, kappa, eps)


def forward_approx(
    x: Tensor,
    variance: Tensor,
    variance_offset: Optional[Tensor],
    weight: Optional[Tensor],
    lam: Tensor,
    kappa: float = 10.0,
    eps: float = 1e-6,
) -> Tensor:
    """Approximate site: y = weight * tanh(lam * x / (kappa * sqrt(variance + variance_offset + eps))), no reduction.

    The formula is that of arXiv 2601.09719, with c from `attention_gain`.

    Args:
        x: [..., d], any floating dtype.
        variance: [..., 1] float32 (float64 for float64 rows), as the exact site of the block returned it.
        variance_offset: one element, or None (0); c * lam1^2 / kappa^2, see `attention_gain`. It gets no gradient.
        weight: [d] or None (gain 1).
        lam: one element.
        kappa: > 0; see `forward`.
        eps: >= 0, added to the variance.

    Returns:
        y: [..., d] in x's dtype.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: a shape or device that does not fit x, kappa <= 0 or eps < 0.
    """
    if not _scripting():
        if wants_formula("forward_approx"):
            return reference.forward_approx(x, variance, variance_offset, weight, lam, kappa, eps)
    return _forward_approx(x, variance, variance_offset, weight, lam, kappa, eps)


def add_forward(
    x: Tensor, residual: Tensor, weight: Optional[Tensor], lam: Tensor, kappa: float = 10.0, eps: float = 1e-6
) -> Tuple[Tensor, Tensor, Tensor]:
    """Residual add fused into an exact site: sum = x + residual, y = site(sum). The bits are those of the two steps.

    Args:
        x: [..., d], the branch to add, any floating dtype.
        residual: [..., d], the stream that x is added to, of x's dtype or a wider one.
        weight: [d] or None (gain 1).
        lam: one element.
        kappa: > 0; see `forward`.
        eps: >= 0, added to the variance.

    Returns:
        y: [..., d] in x's dtype.
        sum: [..., d] in residual's dtype, the new residual stream.
        variance: [..., 1], mean(sum^2) of the stored sum; float32 (float64 for a float64 stream).

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: a shape or device that does not fit x, kappa <= 0 or eps < 0.
    """
    if not _scripting():
        if wants_formula("add_forward"):
            return reference.add_forward(x, residual, weight, lam, kappa, eps)
    return _add_forward(x, residual, weight, lam, kappa, eps)


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
    """Residual add fused into an approximate site: sum = x + residual, y = site(sum) with the variance given.

    Args:
        x: [..., d], the branch to add, any floating dtype.
        residual: [..., d], the stream that x is added to, of x's dtype or a wider one.
        variance: [..., 1] float32 (float64 for float64 rows), as the exact site of the block returned it.
        variance_offset: one element, or None (0); c * lam1^2 / kappa^2, see `attention_gain`. It gets no gradient.
        weight: [d] or None (gain 1).
        lam: one element.
        kappa: > 0; see `forward`.
        eps: >= 0, added to the variance.

    Returns:
        y: [..., d] in x's dtype.
        sum: [..., d] in residual's dtype, the new residual stream.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: a shape or device that does not fit x, kappa <= 0 or eps < 0.
    """
    if not _scripting():
        if wants_formula("add_forward_approx"):
            return reference.add_forward_approx(x, residual, variance, variance_offset, weight, lam, kappa, eps)
    return _add_forward_approx(x, residual, variance, variance_offset, weight, lam, kappa, eps)
