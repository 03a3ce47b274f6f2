"""The numbers of SPEC.md section 3, and the measures they are stated in.

Truth is always float64 arithmetic on the inputs as they were already rounded (see truth.py). Where SPEC.md
has no number of its own, the constant says what it is derived from.
"""

import torch
from torch import Tensor

# tanh alone, in float32, over all floats.
TANH_ULP = 2.5
# y, in units of the last place of the true value. 0.5 is perfect rounding.
Y_ULP = {
    ("cpu", torch.float32): 6.0,
    ("cuda", torch.float32): 8.0,
    ("cpu", torch.bfloat16): 0.55,
    ("cuda", torch.bfloat16): 0.55,
    ("cpu", torch.float16): 0.55,
    ("cuda", torch.float16): 0.55,
}
# Relative L2 error of grad_x in float32, for every row.
GRAD_X_FLOAT32 = 2e-6
# In bfloat16 and float16: this many times the error of rounding the float64 result.
GRAD_X_OVER_ROUNDING = 1.1
# grad_weight and grad_lam, relative L2 error at 10^5 rows, before the rounding to their dtype.
GRAD_PARAMETER = 1e-5
ROWS_FOR_GRAD_PARAMETER = 100_000

# Derived: an error of n ulp in v is one of n/2 in a; half of y's 6 ulp may come from the statistic.
VARIANCE_ULP = 6.0
# Derived: grad_variance = -a S / (2 (v' + eps)) is a sum like grad_lam, over one row.
GRAD_VARIANCE = 1e-5
# Derived: under narrow rows 0.55 ulp of y leaves 0.05 ulp for the arithmetic before the rounding; so does
# this.
GRAD_VARIANCE_ULP = 0.05
# Derived: 45 float64 epsilons, for a dozen operations and the sums of both sides.
FLOAT64 = 1e-14


def ulp_of(true: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of `dtype` at each (float64) value."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(true.double())
    smallest = torch.frexp(torch.tensor(info.smallest_normal, dtype=torch.float64))[1].to(exponent)
    exponent = torch.where(true == 0, smallest, torch.maximum(exponent, smallest))
    return torch.ldexp(torch.full_like(true, info.eps, dtype=torch.float64), exponent - 1)


def ulp_error(actual: Tensor, true: Tensor) -> float:
    """The largest distance of `actual` from the float64 `true`, in ulps of actual's dtype; NaN gives
    infinity."""
    assert true.dtype == torch.float64 and actual.shape == true.shape
    if true.numel() == 0:
        return 0.0
    error = (actual.double() - true).abs() / ulp_of(true, actual.dtype)
    return error.nan_to_num(nan=float("inf")).max().item()


def relative_l2(actual: Tensor, true: Tensor) -> float:
    """||actual - true|| / ||true||; 0 / 0 is 0, NaN gives infinity."""
    assert true.dtype == torch.float64 and actual.shape == true.shape
    distance, norm = (actual.double() - true).norm().item(), true.norm().item()
    if distance == 0:
        return 0.0
    return distance / norm if norm > 0 and distance == distance else float("inf")


def worst_row_l2(actual: Tensor, true: Tensor) -> float:
    """The largest relative L2 error of any row (last dimension): a tensor's norm can hide its small rows."""
    if true.numel() == 0:
        return 0.0
    distance, norm = (actual.double() - true).norm(dim=-1), true.norm(dim=-1)
    ratio = torch.where(distance == 0, 0.0, distance / norm)
    return ratio.nan_to_num(nan=float("inf")).max().item()


def rounding_error(true: Tensor, dtype: torch.dtype) -> float:
    """The relative L2 error of perfectly rounding `true` to `dtype`."""
    return relative_l2(true.to(dtype), true)


def assert_y(y: Tensor, true: Tensor, what: str = "y") -> None:
    """y within SPEC.md's ulps of its dtype on its device (float64: 1e-14 relative, elementwise)."""
    if y.dtype == torch.float64:
        error = ((y - true).abs() / true.abs().clamp_min(torch.finfo(torch.float64).tiny)).max().item()
        assert error <= FLOAT64, f"{what}: relative error {error:.3g} > {FLOAT64}"
        return
    bound = Y_ULP[y.device.type, y.dtype]
    error = ulp_error(y, true)
    assert error <= bound, f"{what}: {error:.3f} ulp of {y.dtype} > {bound}"


def assert_variance(variance: Tensor, true: Tensor) -> None:
    """v = mean(x^2) within 6 ulp of float32 (float64: 1e-14 relative)."""
    if variance.dtype == torch.float64:
        assert relative_l2(variance, true) <= FLOAT64
        return
    error = ulp_error(variance, true)
    assert error <= VARIANCE_ULP, f"variance: {error:.2f} ulp > {VARIANCE_ULP}"


def assert_grad(grad: Tensor, true: Tensor, bound: float, accumulate: torch.dtype, what: str) -> None:
    """Relative L2 error at most `bound`, SPEC.md's for a result in float32 (1e-14 if arithmetic is float64).

    A gradient rounded to a narrower dtype than it was computed in has 1.1x the error of rounding the truth,
    and beside it `bound` where that is for the sum before the rounding. In float32 grad_x is held to it row
    by row.
    """
    per_row = bound == GRAD_X_FLOAT32
    if accumulate == torch.float64:
        bound = FLOAT64
    error = relative_l2(grad, true)
    if torch.finfo(grad.dtype).bits < torch.finfo(accumulate).bits:
        bound = GRAD_X_OVER_ROUNDING * rounding_error(true, grad.dtype) + (0.0 if per_row else bound)
    elif per_row and accumulate == torch.float32:
        error = worst_row_l2(grad, true)
    assert error <= bound, f"{what} ({grad.dtype}): relative L2 error {error:.3g} > {bound:.3g}"


def assert_grads(grads: dict, true: dict, branch: torch.dtype, accumulate: torch.dtype) -> None:
    """Every gradient in `grads` within SPEC.md's number for its kind; `branch` is the dtype of y."""
    narrow = torch.finfo(branch).bits < 32 and accumulate == torch.float32
    bounds = {
        "x": GRAD_X_FLOAT32,
        "residual": GRAD_X_FLOAT32,
        "variance": GRAD_VARIANCE_ULP * torch.finfo(branch).eps if narrow else GRAD_VARIANCE,
        "weight": GRAD_PARAMETER,
        "lam": GRAD_PARAMETER,
    }
    for name, grad in grads.items():
        assert_grad(grad, true[name], bounds[name], accumulate, f"grad_{name}")
