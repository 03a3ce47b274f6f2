"""NaN, infinity, zero, tiny and saturated rows (docs/numbers.md, "Non-finite")."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from support import truth
from support.cases import DTYPES, FORMS, Call, make_call, make_upstream, run_with_gradients
from support.checks import check_against_truth, same_bits
from support.tolerances import assert_y

pytestmark = pytest.mark.every_tier
INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("value", (NAN, INF, -INF))
@pytest.mark.parametrize("column", (0, 17, 76))
@pytest.mark.parametrize("form", FORMS)
def test_a_bad_element_stays_in_its_row(form: str, column: int, value: float, device: str) -> None:
    """NaN in a row's x gives NaN in that row's y, infinity too where the statistic sees it; every other row
    keeps its bits, in y, sum, variance and grad_x."""
    for dtype in (torch.float32, torch.float16):
        good = make_call(form, (5, 77), dtype, device)
        upstream = make_upstream(good)
        x = good.x.clone()
        x[2, column] = value
        bad = replace(good, x=x)
        out, grads = run_with_gradients(bad, *upstream, names=("x",))
        expected, expected_grads = run_with_gradients(good, *upstream, names=("x",))
        others = [0, 1, 3, 4]
        for a, b in zip((*out, grads["x"]), (*expected, expected_grads["x"])):
            assert a is None or same_bits(a[others], b[others])
        if bad.exact or value != value:
            assert out.y[2, column].isnan()
        if bad.exact and value != value:
            assert out.y[2].isnan().all() and out.variance[2].isnan().all()


@pytest.mark.parametrize("bits", (0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000), ids=hex)
@pytest.mark.parametrize("form", ("add_forward", "add_forward_approx"))
def test_every_nan_of_the_stream(form: str, bits: int, device: str) -> None:
    """A NaN of a float32 stream is one in a bfloat16 or float16 y, whatever its bits: rounding those of 0x7fffffff as a
    number would carry into the sign."""
    for dtype in (torch.bfloat16, torch.float16):
        call = make_call(form, (3, 77), dtype, device, stream=torch.float32)
        call.residual.view(torch.int32)[1, 5] = bits
        out = call.run()
        assert out.sum[1, 5].isnan() and out.y[1, 5].isnan()
        assert out.y[0].isfinite().all()


@pytest.mark.parametrize("bits", (0x7FFFFFFF, -1, 0x7F800001), ids=hex)
@pytest.mark.parametrize("form", FORMS)
def test_every_nan_of_a_parameter(form: str, bits: int, device: str) -> None:
    """A NaN in a float32 gain or lam of bfloat16 rows is one in y and grad_x, whatever its bits, and stays in its
    column if it is the gain's; at d = 77, whose last elements fill no vector."""
    good = make_call(form, (3, 77), torch.bfloat16, device)
    upstream = make_upstream(good)
    for column in (4, 5, 76):
        weight = good.weight.float().clone()
        weight.view(torch.int32)[column] = bits
        out, grads = run_with_gradients(replace(good, weight=weight), *upstream, names=("x",))
        others = torch.arange(77) != column
        assert out.y[:, column].isnan().all() and out.y[:, others].isfinite().all()
        assert grads["x"][:, column].isnan().all()
    lam = good.lam.float().clone()
    lam.view(torch.int32).fill_(bits)
    out, grads = run_with_gradients(replace(good, lam=lam), *upstream, names=("x",))
    assert out.y.isnan().all() and grads["x"].isnan().all()


@pytest.mark.parametrize("value", (NAN, INF))
@pytest.mark.parametrize("form", ("forward_approx", "add_forward_approx"))
def test_a_bad_variance_stays_in_its_row(form: str, value: float, device: str) -> None:
    """A given variance of NaN makes its row NaN, one of infinity its row 0; other rows keep their bits."""
    good = make_call(form, (5, 77), device=device)
    variance = good.variance.clone()
    variance[2] = value
    y, expected = replace(good, variance=variance).run().y, good.run().y
    assert y[2].isnan().all() if value != value else (y[2] == 0).all()
    assert same_bits(y[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_zero_rows(form: str, dtype: torch.dtype, device: str) -> None:
    """A zero row gives y = 0 and a right, finite gradient; among others or alone."""
    call = make_call(form, (3, 50), dtype, device)
    x = call.x.clone()
    x[1] = 0
    residual = None if call.residual is None else torch.where(x == 0, 0, call.residual)
    out, grads = check_against_truth(replace(call, x=x, residual=residual))
    assert (out.y[1] == 0).all()
    assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bounded(dtype: torch.dtype, device: str) -> None:
    """|y| <= |weight| whatever lam: tanh never exceeds 1, and reaches it."""
    for lam in (2.0, 30.0, 1e4, 3e38 if dtype != torch.float16 else 6e4):
        call = make_call("forward", (20, 100), dtype, device, lam=lam, kappa=1.0, weight=dtype)
        y = call.run().y
        assert (y.abs() <= call.weight.abs()).all()
        if lam > 1e3:
            far = call.x.abs() > 0.1
            assert same_bits(y[far], (call.weight * call.x.sign())[far])


def elementwise_bound(call: Call, true: Tensor) -> Tensor:
    """What a float32 evaluation of a g owes: z = a x is off by at most 4 roundings, sech^2 amplifies them
    2|z| times, and 16 roundings are its own; below the smallest normal number nothing is promised."""
    rounding = 2.0**-24
    scale = 1 / (call.kappa * (call.variance.double() + call.eps).sqrt())
    a = scale * call.lam.double()
    factor = (a * call.weight.double()).abs()
    z = (a * call.x.double()).abs()
    return true.abs() * (8 * z + 16) * rounding + 4 * torch.finfo(torch.float32).tiny * factor.clamp_min(1)


@pytest.mark.parametrize("sign", (1.0, -1.0))
def test_saturated_gradients(sign: float, device: str) -> None:
    """Where |z| is large 1 - t^2 = 4 r (1 - r) does not cancel: grad_x is right elementwise from z = 0 to 40,
    where 1 - t^2 in float32 would be 0 from 9 on."""
    x = sign * torch.linspace(0, 40, 4001, device=device).reshape(1, -1)
    call = make_call("forward_approx", (1, 4001), device=device, lam=1.0, kappa=1.0, offset=None)
    call = replace(call, x=x, variance=torch.ones(1, 1, device=device), weight=torch.full_like(x[0], 0.5))
    _, grads = run_with_gradients(call, torch.ones_like(x), names=("x",))
    true = truth.gradients(call, torch.ones_like(x))["x"]
    excess = ((grads["x"].double() - true).abs() - elementwise_bound(call, true)).max().item()
    assert excess <= 0
    assert (grads["x"] > 0).all(), "z = 40 has a gradient of about 1e-35, which float32 holds"


@pytest.mark.parametrize("form", FORMS)
def test_saturated_rows(form: str, device: str) -> None:
    """lam = 1e4: every argument is far out; gradients are finite and nowhere NaN, y is the sign times the
    gain."""
    call = make_call(form, (8, 64), device=device, lam=1e4, kappa=1.0)
    out, grads = run_with_gradients(call, *make_upstream(call))
    assert_y(out.y, truth.outputs(call).y)
    assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("scale", (1e-6, 1e-15, 1e-25, 1e-38, 1e-44))
@pytest.mark.parametrize("form", FORMS)
def test_tiny_rows(form: str, scale: float, device: str) -> None:
    """x down to subnormal: v underflows to 0, eps remains, y stays right; gradients too."""
    call = make_call(form, (4, 60), device=device)
    residual = None if call.residual is None else call.residual * scale
    call = replace(call, x=call.x * scale, residual=residual)
    upstream = make_upstream(call)
    out, grads = run_with_gradients(call, *upstream)
    assert_y(out.y, truth.outputs(call).y)
    assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("lam", (0.0, -2.0, -30.0))
@pytest.mark.parametrize("form", FORMS)
def test_zero_and_negative_lam(form: str, lam: float, device: str) -> None:
    """lam = 0 gives y = 0 and lam's gradient all the same; a negative lam gives -y. Both learn, so both can
    happen."""
    for dtype in (torch.float32, torch.bfloat16):
        call = make_call(form, (6, 90), dtype, device, lam=lam)
        out, grads = check_against_truth(call)
        assert lam != 0 or ((out.y == 0).all() and grads["lam"].abs() > 0)
        if lam < 0:
            assert torch.equal(out.y, -replace(call, lam=-call.lam).run().y)


@pytest.mark.parametrize("form", FORMS)
def test_no_eps(form: str, device: str) -> None:
    """eps = 0 is allowed: right for rows that are not zero, however small."""
    call = make_call(form, (6, 90), device=device, eps=0.0, offset=None)
    check_against_truth(call)
    small = {name: t * 1e-12 for name, t in {"x": call.x, "residual": call.residual}.items() if t is not None}
    call = replace(call, **small)
    assert_y(call.run().y, truth.outputs(call).y)


@pytest.mark.parametrize("form", FORMS)
def test_flushed_denormals(form: str) -> None:
    """torch.set_flush_denormal changes no bit of ordinary rows; subnormal ones become zeros, not NaN. USERS row 68."""
    call = make_call(form, (4, 60))
    residual = None if call.residual is None else call.residual * 1e-40
    tiny = replace(call, x=call.x * 1e-40, residual=residual)
    upstream = make_upstream(call)
    expected, expected_grads = run_with_gradients(call, *upstream)
    torch.set_num_threads(1)  # the setting is one of a thread
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU has no such setting")
    try:
        out, grads = run_with_gradients(call, *upstream)
        small, small_grads = run_with_gradients(tiny, *upstream)
    finally:
        torch.set_flush_denormal(False)
    assert same_bits(out.y, expected.y)
    assert all(same_bits(grads[name], grad) for name, grad in expected_grads.items())
    assert (small.y.abs() <= 1e-36).all() and all(grad.isfinite().all() for grad in small_grads.values())
