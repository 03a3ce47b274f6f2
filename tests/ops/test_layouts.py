"""Strides, offsets, ranks and sizes: the answer never depends on how a tensor lies in memory (SPEC.md section
3)."""

from dataclasses import replace
from typing import Callable, Dict, Optional, Tuple

import pytest
import torch
from torch import Tensor

from support.cases import FORMS, Call, Outputs, make_call, make_upstream, run_with_gradients
from support.checks import check_against_truth, same_bits

SHAPE = (3, 5, 37)


def at_offset(t: Tensor, offset: int) -> Tensor:
    """The same values, `offset` elements into a buffer."""
    return torch.empty(t.numel() + offset, dtype=t.dtype, device=t.device)[offset:].view(t.shape).copy_(t)


def inside(t: Tensor, before: int, after: int) -> Tensor:
    """A split view: the columns before.. of a wider tensor."""
    d = t.shape[-1]
    wide = torch.full((*t.shape[:-1], before + d + after), float("nan"), dtype=t.dtype, device=t.device)
    return wide[..., before : before + d].copy_(t)


def every_other(t: Tensor) -> Tensor:
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), dtype=t.dtype, device=t.device)
    return wide[..., ::2].copy_(t)


def with_swapped(t: Tensor, i: int, j: int) -> Tensor:
    """The same values, stored with dimensions i and j swapped."""
    return t.transpose(i, j).contiguous().transpose(i, j)


LAYOUTS: Dict[str, Callable[[Tensor], Tensor]] = {
    **{f"offset {i}": (lambda t, i=i: at_offset(t, i)) for i in range(1, 8)},
    "split view": lambda t: inside(t, 3, 5),
    "padded rows": lambda t: inside(t, 0, 3),
    "every other element": every_other,
    "leading dimensions swapped": lambda t: with_swapped(t, 0, 1),
    "last dimensions swapped": lambda t: with_swapped(t, -1, -2),
    "reversed": lambda t: with_swapped(t, 0, -1),
    "every other row": lambda t: torch.stack([t, t], dim=-2).flatten(-3, -2)[..., ::2, :],
}


def laid_out(call: Call, upstream: Outputs, layout: Callable[[Tensor], Tensor]) -> Tuple[Call, Outputs]:
    """The same call and gradients with every tensor of rows stored otherwise."""

    def apply(t: Optional[Tensor]) -> Optional[Tensor]:
        return None if t is None else layout(t)

    weight = None if call.weight is None else every_other(call.weight)
    moved = replace(
        call, x=layout(call.x), residual=apply(call.residual), variance=apply(call.variance), weight=weight
    )
    return moved, Outputs(*map(apply, upstream))


def assert_same_rows(a: Tuple[Outputs, Dict[str, Tensor]], b: Tuple[Outputs, Dict[str, Tensor]]) -> None:
    """The outputs and the rows' gradients have the same bits."""
    assert all(map(same_bits, a[0], b[0]))
    for name in a[1].keys() & {"x", "residual", "variance"}:
        assert same_bits(a[1][name], b[1][name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_layouts(form: str, layout: str, device: str) -> None:
    """Offset, split, strided and transposed tensors: right against float64, and the bits of .contiguous(),
    both directions. USERS rows 6 and 7."""
    for dtype in (torch.float32, torch.bfloat16):
        call = make_call(form, SHAPE, dtype, device)
        upstream = make_upstream(call)
        moved = laid_out(call, upstream, LAYOUTS[layout])
        assert layout == "padded rows" or moved[0].x.storage_offset() or not moved[0].x.is_contiguous()
        assert_same_rows(check_against_truth(*moved), run_with_gradients(call, *upstream))


@pytest.mark.parametrize("form", FORMS)
def test_each_tensor_in_a_layout_of_its_own(form: str, device: str) -> None:
    """x, residual, variance and the gradients each stored differently, in one call. USERS row 6."""
    layouts = [
        LAYOUTS[name] for name in ("split view", "every other element", "reversed", "offset 3", "padded rows")
    ]
    call = make_call(form, SHAPE, torch.float16, device)
    upstream = make_upstream(call)
    for shift in range(len(layouts)):
        pick = iter(layouts[shift:] + layouts[:shift])
        check_against_truth(*laid_out(call, upstream, lambda t: next(pick)(t)))


@pytest.mark.parametrize("d", (1, 7, 48, 127, 1536, 3584))
@pytest.mark.parametrize("form", ("forward", "add_forward_approx"))
def test_sizes_at_every_offset(form: str, d: int, device: str) -> None:
    """d in 1, 7, 48, 127, 1536, 3584 at storage offsets 0 to 7 against float64, both directions. USERS row
    7."""
    for dtype in (torch.float32, torch.float16):
        call = make_call(form, (3, d), dtype, device, eps=1.0 if d == 1 else 1e-6)
        upstream = make_upstream(call)
        for offset in range(8):
            check_against_truth(*laid_out(call, upstream, lambda t: at_offset(t, offset)))


@pytest.mark.parametrize("form", FORMS)
def test_expanded_rows(form: str, device: str) -> None:
    """One row repeated by stride 0, as input and as gradient; and a gradient that is one number. USERS row
    6."""
    call = make_call(form, (1, 1, 65), device=device)
    upstream = make_upstream(call)
    check_against_truth(*laid_out(call, upstream, lambda t: t.expand(4, 3, t.shape[-1])))
    call = make_call(form, SHAPE, device=device)
    grad_y = torch.full((), 0.3, device=device).expand(SHAPE)
    check_against_truth(call, make_upstream(call)._replace(y=grad_y))
    out = call.requiring_grad()
    total = out.run().y.sum()  # its gradient is an expanded 1
    assert torch.autograd.grad(total, [out.x])[0].shape == SHAPE


@pytest.mark.parametrize("form", FORMS)
def test_columns_expanded(form: str, device: str) -> None:
    """A row of one number repeated by stride 0 within the row. USERS row 6."""
    call = make_call(form, (4, 1), torch.float32, device)
    wide = {name: t.expand(4, 33) for name, t in call.differentiable().items() if name in ("x", "residual")}
    check_against_truth(replace(call, **wide, weight=torch.ones(1, device=device).expand(33)))


@pytest.mark.parametrize("form", FORMS)
def test_dimensions_of_size_one_with_wild_strides(form: str, device: str) -> None:
    """The stride of a dimension of size 1 means nothing: it is never used. USERS row 6."""

    def wild(t: Tensor) -> Tensor:
        strides = tuple(10**9 + 7 if n == 1 else s for n, s in zip(t.shape, t.stride()))
        return t.as_strided(t.shape, strides)

    for shape in ((1, 1, 37), (1, 4, 37), (4, 1, 37), (4, 1, 1), (1,)):
        call = make_call(form, shape, device=device, eps=1.0)
        check_against_truth(*laid_out(call, make_upstream(call), wild))


@pytest.mark.parametrize("form", FORMS)
def test_ranks(form: str, device: str) -> None:
    """Any rank from 1 to 5; variance keeps the leading dimensions."""
    for shape in ((37,), (2, 37), (2, 3, 37), (2, 1, 3, 37), (2, 1, 3, 2, 37)):
        out, _ = check_against_truth(make_call(form, shape, device=device))
        assert out.y.shape == shape
        assert out.variance is None or out.variance.shape == (*shape[:-1], 1)


@pytest.mark.parametrize("shape", ((0, 37), (3, 0, 37), (0, 0, 1)))
@pytest.mark.parametrize("form", FORMS)
def test_empty(form: str, shape: Tuple[int, ...], device: str) -> None:
    """No rows: empty outputs and row gradients, zero gradients of weight and lam, not None. USERS row 10."""
    for dtype in (torch.float32, torch.bfloat16):
        call = make_call(form, shape, dtype, device, weight=dtype)
        out, grads = run_with_gradients(call, *make_upstream(call))
        assert out.y.shape == shape and out.y.dtype == dtype
        for name, tensor in call.differentiable().items():
            assert grads[name].shape == tensor.shape and grads[name].dtype == tensor.dtype
        assert (grads["weight"] == 0).all() and (grads["lam"] == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_no_elements(form: str, device: str) -> None:
    """d = 0: empty outputs, NaN as the mean of nothing, also beside a wider residual; nothing crashes. USERS row 10."""
    for residual in (torch.float32, torch.float64) if form.startswith("add") else (torch.float32,):
        call = make_call(form, (4, 0), device=device, stream=residual)
        out, grads = run_with_gradients(call, *make_upstream(call))
        assert out.y.shape == (4, 0) and grads["x"].shape == (4, 0) and grads["weight"].shape == (0,)
        assert (grads["lam"] == 0).all()
        assert out.variance is None or out.variance.isnan().all()
