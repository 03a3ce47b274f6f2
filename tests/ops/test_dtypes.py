"""Every mix of dtypes in one fused call, each right and each with the dtypes that SPEC.md section 2
states."""

from dataclasses import replace
from typing import Optional, Tuple

import pytest
import torch
from torch import Tensor

import bhyt
from support.cases import DTYPES, FORMS, Call, make_call, make_rows, make_upstream, run_with_gradients
from support.checks import OpsCalled, check_against_truth, same_bits

SHAPE = (9, 45)
WIDER = {
    torch.float16: (torch.float16, torch.float32, torch.float64),
    torch.bfloat16: (torch.bfloat16, torch.float32, torch.float64),
    torch.float32: (torch.float32, torch.float64),
    torch.float64: (torch.float64,),
}
STREAMS = [(x, stream) for x, streams in WIDER.items() for stream in streams]


@pytest.mark.every_tier
@pytest.mark.parametrize("x_dtype, stream", STREAMS, ids=str)
@pytest.mark.parametrize("form", ("add_forward", "add_forward_approx"))
def test_every_mix_with_a_residual(form: str, x_dtype: torch.dtype, stream: torch.dtype, device: str) -> None:
    """x under a residual stream at least as wide, with every dtype of weight (or none) and of lam: right,
    with sum and variance in the stream's dtypes and y in x's. USERS row 11."""
    for weight in (None, *DTYPES):
        for lam in DTYPES:
            call = make_call(form, SHAPE, x_dtype, device, stream=stream, weight=weight, lam_dtype=lam)
            out, _ = check_against_truth(call)
            assert out.sum.dtype == stream
            wide = torch.float64 if stream == torch.float64 else torch.float32
            assert out.variance is None or out.variance.dtype == wide


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ("forward", "forward_approx"))
def test_every_mix(form: str, x_dtype: torch.dtype, device: str) -> None:
    """x with every dtype of weight (or none), of lam and of the variance offset. USERS row 11."""
    for weight in (None, *DTYPES):
        for lam in DTYPES:
            call = make_call(form, SHAPE, x_dtype, device, weight=weight, lam_dtype=lam)
            if not call.exact:
                call = replace(call, offset=call.offset.to(lam))
            check_against_truth(call)


@pytest.mark.parametrize("shape", ((), (1,), (1, 1)))
@pytest.mark.parametrize("form", FORMS)
def test_shapes_of_one_element(form: str, shape: tuple, device: str) -> None:
    """lam and variance_offset are one element of any shape; lam's gradient keeps it."""
    call = make_call(form, SHAPE, device=device)
    offset = None if call.exact else torch.full(shape, 0.5, device=device)
    check_against_truth(replace(call, lam=torch.full(shape, 1.5, device=device), offset=offset))


@pytest.mark.parametrize("form", FORMS)
def test_optional_tensors_left_out(form: str, device: str) -> None:
    """No weight is gain 1, no offset is 0: the bits of giving ones and zero."""
    call = replace(make_call(form, SHAPE, torch.bfloat16, device), weight=None, offset=None)
    ones = torch.ones(SHAPE[-1], device=device)
    zero = None if call.exact else torch.zeros((), device=device)
    upstream = make_upstream(call)
    out, grads = check_against_truth(call, upstream)
    explicit, explicit_grads = run_with_gradients(replace(call, weight=ones, offset=zero), *upstream)
    assert all(map(same_bits, out, explicit))
    assert all(same_bits(grads[name], explicit_grads[name]) for name in grads)


@pytest.mark.every_tier
@pytest.mark.parametrize("form", ("forward", "add_forward"))
def test_large_float16(form: str, device: str) -> None:
    """x = 6e4 in float16, whose square is beyond float16 from 256 on: y and gradients right. USERS row 13."""
    signs = make_rows("normal", (4, 96), device=device).sign()
    call = make_call(form, (4, 96), torch.float16, device)
    residual = None if call.residual is None else (signs * 3e4).half()
    call = replace(call, x=(signs * (3e4 if call.adds else 6e4)).half(), residual=residual)
    out, _ = check_against_truth(call)
    assert out.y.isfinite().all() and out.variance.min() > 3e9


def unfused(call: Call) -> Tuple[Tensor, Tensor, Optional[Tensor]]:
    """(y, sum, variance) of adding, then calling the site on the sum; y in the sum's dtype."""
    total = call.residual + call.x
    rest = call.arguments()[2:]
    out = getattr(bhyt.functional, call.form.removeprefix("add_"))(total, *rest)
    y, variance = out if call.exact else (out, None)
    return y, total, variance


@pytest.mark.every_tier
@pytest.mark.parametrize("x_dtype, stream", STREAMS, ids=str)
@pytest.mark.parametrize("form", ("add_forward", "add_forward_approx"))
def test_fused_add_is_add_then_forward(
    form: str, x_dtype: torch.dtype, stream: torch.dtype, device: str
) -> None:
    """Bit for bit: sum and variance for every mix; y and the gradient where both streams have one dtype (a
    wider stream's unfused y is in the stream's dtype, and rounding it gives the fused y). USERS row 14."""
    for d in (7, 48, 1536):
        call = make_call(form, (5, d), x_dtype, device, stream=stream)
        out = call.run()
        y, total, variance = unfused(call)
        assert same_bits(out.sum, total) and same_bits(out.variance, variance)
        assert same_bits(out.y, y.to(x_dtype))
        if x_dtype == stream:
            grad_y = torch.randn(5, d).to(out.y)
            leaf = call.requiring_grad(["x", "residual"])
            two_steps = torch.autograd.grad(unfused(leaf)[0], leaf.x, grad_y)[0]
            assert same_bits(torch.autograd.grad(leaf.run().y, leaf.x, grad_y)[0], two_steps)


def fused(ops: OpsCalled) -> list:
    """The ops called, less those that make autograd's views of saved tensors."""
    return [name for name in ops.names if name != "aten.detach.default"]


@pytest.mark.parametrize("form", FORMS)
def test_autocast_adds_nothing(form: str, device: str) -> None:
    """Under autocast the op still is one op, forward and backward, with the same bits, in x's dtype. USERS
    row 12."""
    for dtype in (torch.float32, torch.bfloat16):
        call = make_call(form, SHAPE, dtype, device).requiring_grad()
        expected = call.run()
        with OpsCalled() as ops, torch.autocast(device, dtype=torch.bfloat16):
            out = call.run()
        assert fused(ops) == [f"bhyt.{form}.default"]
        assert out.y.dtype == dtype and same_bits(out.y.detach(), expected.y.detach())
        inputs, grad_y = list(call.differentiable().values()), torch.ones_like(out.y)
        with OpsCalled() as ops:
            torch.autograd.grad(out.y, inputs, grad_y)
        backward = "bhyt.backward.default" if call.exact else "bhyt.backward_approx.default"
        assert fused(ops) == [backward]


def test_mixed_dtypes_cast_nothing(device: str) -> None:
    """bfloat16 rows with float32 parameters go into the op as they are: one op and no copy. USERS row 11."""
    call = make_call("add_forward", SHAPE, torch.bfloat16, device, stream=torch.float32)
    with OpsCalled() as ops:
        call.run()
    assert fused(ops) == ["bhyt.add_forward.default"]


@pytest.mark.parametrize("form", ("forward", "add_forward_approx"))
def test_bfloat16_parameters_over_many_rows(form: str, device: str) -> None:
    """A bfloat16 gain's gradient is summed in float32 and rounded once, over 20000 rows. USERS row 15."""
    call = make_call(
        form, (20_000, 40), torch.bfloat16, device, weight=torch.bfloat16, lam_dtype=torch.bfloat16
    )
    check_against_truth(call)


def test_grad_of_a_narrow_branch(device: str) -> None:
    """A bfloat16 branch on a float32 stream gets the stream's gradient, rounded once. USERS row 14."""
    call = make_call("add_forward", SHAPE, torch.bfloat16, device, stream=torch.float32)
    _, grads = check_against_truth(call)
    rounded: Tensor = grads["residual"].to(torch.bfloat16)
    assert grads["x"].dtype == torch.bfloat16 and torch.equal(grads["x"], rounded)
