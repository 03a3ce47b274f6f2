"""Errors against float64 on the same (already rounded) inputs: SPEC.md section 3, first bullet."""

from dataclasses import replace

import pytest
import torch

import bhyt
from support import truth
from support.cases import DTYPES, FORMS, STRESSES, Call, make_call, make_rows, make_upstream, run_with_gradients
from support.checks import check_against_truth
from support.tolerances import (
    GRAD_PARAMETER,
    ROWS_FOR_GRAD_PARAMETER,
    TANH_ULP,
    assert_grad,
    assert_variance,
    assert_y,
    relative_l2,
    ulp_error,
)

pytestmark = pytest.mark.every_tier
NARROW = (torch.float16, torch.bfloat16)
SIZES = (1, 2, 7, 15, 16, 17, 31, 33, 48, 63, 127, 128, 257, 1536, 3584)


def sizes_call(form: str, d: int, dtype: torch.dtype, device: str, rows: int = 5) -> Call:
    # At d = 1 the terms of dx cancel but for eps / (v + eps): a large eps keeps the problem well conditioned.
    return make_call(form, (rows, d), dtype, device, eps=1.0 if d <= 2 else 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_size_of_row(form: str, dtype: torch.dtype, device: str) -> None:
    """Outputs and gradients at SPEC.md's numbers for d from 1 to 3584. USERS row 7."""
    for d in SIZES:
        check_against_truth(sizes_call(form, d, dtype, device))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_very_long_rows(form: str, dtype: torch.dtype, device: str) -> None:
    """d = 131072 (and one less, which no vector divides), both directions, at SPEC.md's numbers. USERS row
    8."""
    for d in (131071, 131072):
        check_against_truth(sizes_call(form, d, dtype, device, rows=2))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_many_rows(form: str, dtype: torch.dtype, device: str) -> None:
    """Tensors beyond a core's own caches, for which the CPU has loops of its own: outputs and gradients at SPEC.md's
    numbers, a gradient of the sum included."""
    check_against_truth(sizes_call(form, 1536, dtype, device, rows=300))


@pytest.mark.parametrize("d", (1536, 131072))
def test_long_constant_rows(d: int, device: str) -> None:
    """A constant row rounds the same way at every addition of mean(x^2): y stays within SPEC.md's ulps all
    the same."""
    for value in (0.1, 0.3, 1.7, 1e-3):
        call = replace(
            make_call("forward", (1, d), device=device), x=torch.full((1, d), value, device=device)
        )
        out, true = call.run(), truth.outputs(call)
        assert_variance(out.variance, true.variance)
        assert_y(out.y, true.y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, lam, kappa", STRESSES)
def test_stressed_rows(rows: str, lam: float, kappa: float, dtype: torch.dtype, device: str) -> None:
    """SPEC.md's numbers where the statistic, the argument of tanh or the gradient is under stress, for all
    forms."""
    for form in FORMS:
        check_against_truth(make_call(form, (64, 384), dtype, device, rows=rows, lam=lam, kappa=kappa))


def test_tanh_over_all_floats(device: str) -> None:
    """tanh alone (a = 1, no gain) within 2.5 ulp in float32, on every 509th float, of both signs."""
    bits = torch.arange(0, 0x7F800000, 509, dtype=torch.int64).to(torch.int32)
    x = bits.view(torch.float32).to(device)
    assert_tanh(x)
    assert_tanh(-x)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_tanh_over_all_narrow_floats(dtype: torch.dtype, device: str) -> None:
    """tanh alone on every finite float16 or bfloat16: within 0.55 ulp."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype)
    x = x[x.isfinite()].to(device)
    assert_y(tanh_of(x), torch.tanh(x.double()), "tanh")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tanh_at_its_edges(dtype: torch.dtype) -> None:
    """The contract beside the ulps: tanh(+-0) = +-0, tanh(+-inf) = +-1, tanh(NaN) = NaN."""
    x = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan")], dtype=dtype)
    one = torch.ones(1, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    y = bhyt.functional.forward_approx(x, one, None, None, one, 1.0, 0.0)
    assert torch.equal(y[:4], torch.tensor([0.0, 0.0, 1.0, -1.0], dtype=dtype)) and y[4].isnan()
    assert not y[0].signbit() and y[1].signbit()


def tanh_of(x: torch.Tensor) -> torch.Tensor:
    one = torch.ones(1, device=x.device)
    return bhyt.functional.forward_approx(x, one, None, None, one, 1.0, 0.0)


def assert_tanh(x: torch.Tensor) -> None:
    error = ulp_error(tanh_of(x), torch.tanh(x.double()))
    assert error <= TANH_ULP, f"tanh: {error:.3f} ulp > {TANH_ULP}"


@pytest.mark.parametrize("form", ("forward", "add_forward_approx"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_parameter_gradients_over_many_rows(form: str, dtype: torch.dtype, device: str) -> None:
    """grad_weight and grad_lam within 1e-5 at 10^5 rows, in float32 parameters. USERS row 15."""
    call = make_call(form, (ROWS_FOR_GRAD_PARAMETER, 48), dtype, device)
    upstream = make_upstream(call).y
    _, grads = run_with_gradients(call, upstream, names=("weight", "lam"))
    true = truth.gradients(call, upstream)
    for name, grad in grads.items():
        assert relative_l2(grad, true[name]) <= GRAD_PARAMETER, name


def test_parameter_gradients_do_not_drift(device: str) -> None:
    """The same gradient from each of 10^5 rows: a sum in fewer than float32's bits, or a long naive one,
    drifts. Within 1e-5. USERS row 15."""
    x = make_rows("normal", (1, 48), torch.bfloat16, device).expand(ROWS_FOR_GRAD_PARAMETER, 48)
    call = replace(make_call("forward", (1, 48), torch.bfloat16, device), x=x)
    upstream = torch.full((), 0.7, dtype=torch.bfloat16, device=device).expand_as(x)
    _, grads = run_with_gradients(call, upstream)
    true = truth.gradients(call, upstream)
    for name in ("weight", "lam"):
        assert_grad(grads[name], true[name], GRAD_PARAMETER, call.accumulate, name)


@pytest.mark.parametrize("form", FORMS)
def test_truth_is_the_derivative_of_the_formula(form: str) -> None:
    """The closed derivatives of truth.py (SPEC.md section 1) are those of bhyt.reference in float64: to
    1e-13."""
    call = make_call(form, (3, 17), torch.float64, weight=torch.float64, lam_dtype=torch.float64)
    upstream = make_upstream(call)
    out, grads = run_with_gradients(call, *upstream, functions=bhyt.reference)
    true = truth.outputs(call)
    assert relative_l2(out.y, true.y) <= 1e-15
    for name, expected in truth.gradients(call, *upstream).items():
        assert relative_l2(grads[name], expected) <= 1e-13, name
