"""Same call, same bits; a row does not know its batch or the number of threads; nothing is written but the
outputs."""

from dataclasses import replace
from typing import Dict, List, Tuple

import pytest
import torch
from torch import Tensor

from support.cases import FORMS, Call, Outputs, make_call, make_upstream, run_with_gradients
from support.checks import same_bits

pytestmark = pytest.mark.every_tier
PARAMETERS = ("weight", "lam")


def bits(call: Call, upstream: Outputs) -> List[Tensor]:
    """Every output and gradient."""
    out, grads = run_with_gradients(call, *upstream)
    return [t for t in (*out, *grads.values()) if t is not None]


def row_bits(call: Call, upstream: Outputs) -> Dict[str, Tensor]:
    """Every output and gradient that has rows."""
    out, grads = run_with_gradients(call, *upstream)
    rows = {name: t for name, t in out._asdict().items() if t is not None}
    return {**rows, **{f"grad_{name}": grad for name, grad in grads.items() if name not in PARAMETERS}}


def only_rows(call: Call, upstream: Outputs, at: slice) -> Tuple[Call, Outputs]:
    """The same call on some of its rows."""
    rows = {name: t[at] for name, t in call.differentiable().items() if name not in PARAMETERS}
    return replace(call, **rows), Outputs(*(None if t is None else t[at] for t in upstream))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_row_alone_and_in_a_batch(form: str, dtype: torch.dtype, device: str) -> None:
    """y, sum, variance and grad_x have the same bits alone, in any slice and in the batch. USERS row 18."""
    for d in (7, 129, 1536):
        call = make_call(form, (67, d), dtype, device)
        upstream = make_upstream(call)
        whole = row_bits(call, upstream)
        for at in (slice(0, 1), slice(1, 2), slice(66, 67), slice(3, 20), slice(31, 67)):
            for name, t in row_bits(*only_rows(call, upstream, at)).items():
                assert same_bits(t, whole[name][at]), f"{name} of rows {at} at d = {d}"


@pytest.mark.parametrize("form", FORMS)
def test_a_row_in_a_batch_of_another_rank(form: str, device: str) -> None:
    """A decoding step [d] or [1, 1, d] gives the bits it has within [4, 8, d]. USERS row 18."""
    call = make_call(form, (4, 8, 384), torch.bfloat16, device)
    upstream = make_upstream(call)
    whole = row_bits(call, upstream)
    step = only_rows(call, upstream, (slice(2, 3), slice(5, 6)))
    vector = only_rows(call, upstream, (2, 5))
    for name, t in row_bits(*step).items():
        assert same_bits(t, whole[name][2:3, 5:6]), name
    for name, t in row_bits(*vector).items():
        assert same_bits(t, whole[name][2, 5]), name


@pytest.mark.parametrize("shape", ((1, 4096), (3, 100_000), (1000, 96), (5000, 7)), ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_any_number_of_threads(form: str, shape: Tuple[int, int]) -> None:
    """Outputs and all gradients, those of weight and lam too, have the same bits with 1, 2, 3 and 5 threads.
    USERS rows 17 and 18."""
    call = make_call(form, shape)
    upstream = make_upstream(call)
    torch.set_num_threads(1)
    one = bits(call, upstream)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert all(map(same_bits, one, bits(call, upstream))), f"{threads} threads"


@pytest.mark.parametrize("form", FORMS)
def test_fifty_runs(form: str, device: str) -> None:
    """Fifty runs give the same bits, gradients included, with all threads at work. USERS row 18."""
    torch.set_num_threads(4)
    call = make_call(form, (600, 200), torch.bfloat16, device)
    upstream = make_upstream(call)
    first = bits(call, upstream)
    for run in range(49):
        # Other memory than the last time.
        kept = torch.empty(run * 1000 + 1, device=device)
        assert all(map(same_bits, first, bits(call, upstream))), f"run {run}"
        del kept


@pytest.mark.parametrize("adds", ("", "add_"))
def test_both_kinds_of_site_are_one_formula(adds: str, device: str) -> None:
    """The approximate form, given an exact form's variance and no offset, gives its bits: v as stored."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        exact = make_call(f"{adds}forward", (40, 333), dtype, device, lam=5.0)
        out = exact.run()
        approximate = replace(exact, variance=out.variance)
        assert not approximate.exact and same_bits(approximate.run().y, out.y)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_written_but_the_outputs(form: str, device: str) -> None:
    """Inputs and incoming gradients are byte-identical afterwards, and so is memory beside them. USERS row
    17."""
    for dtype in (torch.float32, torch.bfloat16):
        call = make_call(form, (6, 77), dtype, device)
        upstream = make_upstream(call)

        def guarded(t: Tensor) -> Tensor:
            buffer = torch.full((t.numel() + 128,), 3.0, dtype=t.dtype, device=device)
            return buffer[64:-64].view(t.shape).copy_(t)

        call = replace(call, **{name: guarded(t) for name, t in call.differentiable().items()})
        upstream = Outputs(*(None if t is None else guarded(t) for t in upstream))
        watched = [t._base for t in (*call.differentiable().values(), *upstream) if t is not None]
        before = [t.clone() for t in watched]
        out, grads = run_with_gradients(call, *upstream)
        assert all(map(same_bits, watched, before))
        addresses = {t.untyped_storage().data_ptr() for t in watched}
        for t in (*out, *grads.values()):
            assert t is None or t.untyped_storage().data_ptr() not in addresses


@pytest.mark.parametrize("form", FORMS)
def test_a_second_backward_sees_the_same(form: str, device: str) -> None:
    """Two backward passes through one graph give the same bits: the first has changed nothing saved. USERS
    row 17."""
    call = make_call(form, (6, 77), device=device).requiring_grad()
    y = call.run().y
    inputs, grad_y = list(call.differentiable().values()), torch.randn_like(y)
    first = torch.autograd.grad(y, inputs, grad_y, retain_graph=True)
    assert all(map(same_bits, first, torch.autograd.grad(y, inputs, grad_y)))
