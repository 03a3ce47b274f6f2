"""Random calls against float64.

    BHYT_EXAMPLES=20000 python -m pytest tests/ops/test_properties.py    # a long run, another one every time

Without it the examples are the same in every run.
"""

import math
import os
from dataclasses import replace
from typing import Dict, Optional, Sequence

import torch
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st
from torch import Tensor

from support import truth
from support.cases import DTYPES, FORMS, STRESSES, Call, Outputs, make_call, make_upstream, run_with_gradients
from support.checks import same_bits
from support.tolerances import (
    FLOAT64,
    GRAD_PARAMETER,
    GRAD_X_FLOAT32,
    GRAD_X_OVER_ROUNDING,
    assert_variance,
    assert_y,
)

LONG = "BHYT_EXAMPLES" in os.environ
EXAMPLES = int(os.environ.get("BHYT_EXAMPLES", "300"))
SIZES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 48, 64, 65, 127, 200, 257, 1000)
INPUTS = ("x", "residual", "variance", "weight", "lam")


@st.composite
def stored(draw: st.DrawFn, t: Optional[Tensor]) -> Optional[Tensor]:
    """`t` somewhere else in memory: `offset` elements into a buffer of NaN, its dimensions in any order and each of
    them every first, second or third element of a longer one, or (with other values) repeated by stride 0.

    torch has no negative strides: a flipped tensor is a copy.
    """
    if t is None or draw(st.integers(0, 3)) == 0:
        return t
    order = draw(st.permutations(range(t.dim())))
    steps = [draw(st.sampled_from((1, 1, 1, 2, 3))) for _ in order]
    repeated = [draw(st.integers(0, 7)) == 0 for _ in order]
    offset = draw(st.integers(0, 7))
    kept = t[tuple(slice(0, 1) if r else slice(None) for r in repeated)]
    longer = [kept.shape[i] * steps[i] for i in order]
    buffer = torch.full((offset + math.prod(longer),), float("nan"), dtype=t.dtype, device=t.device)
    view = buffer[offset:].view(longer).permute([order.index(i) for i in range(t.dim())])
    return view[tuple(slice(None, None, step) for step in steps)].copy_(kept).expand(t.shape)


@st.composite
def calls(draw: st.DrawFn, device: str) -> Call:
    """A call of any form: any rank, sizes, dtypes, constants, layouts; optional tensors given or not."""
    leading = draw(st.lists(st.sampled_from((1, 1, 2, 3, 5, 9)) | st.integers(0, 40), max_size=3))
    assume(math.prod(leading) <= 400)
    form, dtype = draw(st.sampled_from(FORMS)), draw(st.sampled_from(DTYPES))
    wider = [stream for stream in DTYPES if torch.promote_types(dtype, stream) == stream]
    rows, lam, kappa = draw(st.sampled_from(STRESSES))
    torch.manual_seed(draw(st.integers(0, 2**32)))
    call = make_call(
        form,
        (*leading, draw(st.sampled_from(SIZES))),
        dtype,
        device,
        rows=rows,
        lam=lam * draw(st.sampled_from((1, -1, 0.3, 0))),
        kappa=kappa,
        eps=draw(st.sampled_from((1e-6, 1e-5, 1.0))),
        stream=draw(st.sampled_from(wider)) if form.startswith("add") else None,
        weight=draw(st.sampled_from((None, *DTYPES))),
        lam_dtype=draw(st.sampled_from(DTYPES)),
        offset=draw(st.sampled_from((None, 0.0, 0.25, 3.0))),
    )
    if call.offset is not None:
        call = replace(call, offset=call.offset.to(draw(st.sampled_from(DTYPES))))
    call = replace(call, lam=call.lam.reshape(draw(st.sampled_from(((), (1,), (1, 1))))))
    return replace(call, **{name: draw(stored(getattr(call, name))) for name in INPUTS})


@st.composite
def upstreams(draw: st.DrawFn, call: Call) -> Outputs:
    """Gradients of some of the outputs, each in any layout."""
    given = make_upstream(call)
    outputs = [name for name, t in given._asdict().items() if t is not None]
    used = draw(st.lists(st.sampled_from(outputs), min_size=1, unique=True))
    return Outputs(**{"y": None, **{name: draw(stored(getattr(given, name))) for name in used}})


def magnitudes(call: Call, upstream: Outputs) -> Dict[str, Tensor]:
    """The sums that make up each gradient, with every term positive: what an error is relative to where terms
    cancel, as they do in short rows. In docs/mathematics.md's names, and like its derivatives float64.

    sech^2 turns a relative error of its argument z into 2|z| of its own: beyond |z| = 4 its terms count |z| / 4 times.
    """
    row = truth.stored_sum(call).double()
    v = truth.mean_square(row) if call.exact else call.variance.double()
    weight = None if call.weight is None else call.weight.double().abs()
    positive = Call(x=row.abs(), lam=call.lam.double().abs(), weight=weight, variance=v, offset=call.offset)
    positive = replace(positive, kappa=call.kappa, eps=call.eps)
    z = truth._scale(positive, row) * positive.lam.reshape(()) * positive.x
    grad_y = torch.zeros_like(row) if upstream.y is None else upstream.y.double().abs()
    sums = truth.gradients(positive, grad_y * (z / 4).clamp_min(1))
    if call.exact:
        through_v = sums.pop("variance").abs()
        if upstream.variance is not None:
            through_v = through_v + upstream.variance.double().abs()
        sums["x"] = sums["x"] + 2 * positive.x * through_v / row.shape[-1]
    if upstream.sum is not None:
        sums["x"] = sums["x"] + upstream.sum.double().abs()
    return {**sums, "residual": sums["x"]}


def assert_gradient(name: str, grad: Tensor, true: Tensor, magnitude: Tensor, accumulate: torch.dtype) -> None:
    """docs/numbers.md's relative L2 error, per row where there are rows, relative to the magnitude of the terms; a
    narrower dtype than that of the arithmetic adds 1.1x its own rounding. Below the smallest normal number of
    the arithmetic nothing is promised.
    """
    bound = GRAD_X_FLOAT32 if name in ("x", "residual") else GRAD_PARAMETER
    bound = FLOAT64 if accumulate == torch.float64 else bound
    dims = [] if name in ("weight", "lam") else [-1]
    rounding = (true.to(grad.dtype).double() - true) if grad.dtype != accumulate else torch.zeros_like(true)

    def norm(t: Tensor) -> Tensor:
        return t.norm(dim=dims) if dims else t.norm()

    underflow = 2.0**30 * torch.finfo(accumulate).tiny  # a factor's, times what the others may be
    allowed = GRAD_X_OVER_ROUNDING * norm(rounding) + bound * norm(magnitude.expand_as(true)) + underflow
    excess = norm(grad.double() - true) / allowed
    assert (excess <= 1).all(), f"grad_{name} ({grad.dtype}): {excess.max().item():.3g} of what is allowed"


def buffers(call: Call, upstream: Outputs) -> Sequence[Tensor]:
    """The whole memory that each tensor of a call lies in."""
    tensors = [t for t in (*call.differentiable().values(), call.offset, *upstream) if t is not None]
    return [torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage()) for t in tensors]


@settings(
    max_examples=EXAMPLES,
    derandomize=not LONG,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_random_calls(device: str, data: st.DataObject) -> None:
    """Any call within docs/numbers.md's bounds against float64: every output, and the gradients of any subset of inputs
    given those of any subset of outputs; without a graph the same bits; no input written. USERS rows 6, 7, 10,
    11, 16 and 17."""
    call = data.draw(calls(device))
    note(f"{call.form} on {device}")
    upstream = data.draw(upstreams(call))
    possible = list(call.differentiable())
    names = data.draw(st.lists(st.sampled_from(possible), min_size=1, unique=True))
    before = [t.clone() for t in buffers(call, upstream)]

    out, grads = run_with_gradients(call, *upstream, names=names)

    assert all(map(torch.equal, buffers(call, upstream), before)), "an input was written"
    assert all(map(same_bits, out, call.run())), "with and without a graph"
    true, true_grads = truth.outputs(call), truth.gradients(call, *upstream)
    magnitude = magnitudes(call, upstream)
    assert out.y.shape == true.y.shape and out.y.dtype == call.x.dtype
    assert out.sum is None or same_bits(out.sum, true.sum)
    if out.y.numel():
        assert_y(out.y, true.y)
        if call.exact:
            assert_variance(out.variance, true.variance)
    assert set(grads) == set(names)
    for name, grad in grads.items():
        tensor = call.differentiable()[name]
        assert (grad.dtype, grad.shape) == (tensor.dtype, tensor.shape), name
        if true_grads[name].to(grad.dtype).isfinite().all():  # a sum over rows may leave float16
            assert_gradient(name, grad, true_grads[name], magnitude[name], call.accumulate)
