"""Every gradient, of every subset, to second order and through functorch; and what the forward saves for
them."""

from dataclasses import replace
from itertools import chain, combinations
from typing import Iterable, List, Optional, Tuple

import pytest
import torch
from torch import Tensor

import bhyt
from support import truth
from support.cases import FORMS, Call, make_call, make_upstream, run_with_gradients
from support.checks import OpsCalled
from support.tolerances import assert_grads, relative_l2


def subsets(items: Iterable) -> List[tuple]:
    """Every subset but the empty one."""
    items = list(items)
    return list(chain.from_iterable(combinations(items, n) for n in range(1, len(items) + 1)))


def double_call(form: str, device: str, shape: Tuple[int, ...] = (2, 3), weight: bool = True) -> Call:
    dtype = torch.float64
    return make_call(form, shape, dtype, device, weight=dtype if weight else None, lam_dtype=dtype)


def as_function(call: Call, names: Optional[List[str]] = None):
    """(function of the tensors named, those tensors): what gradcheck and torch.func want."""
    names = names or list(call.differentiable())

    def function(*tensors: Tensor) -> Tuple[Tensor, ...]:
        return tuple(t for t in replace(call, **dict(zip(names, tensors))).run() if t is not None)

    return function, tuple(call.differentiable()[name].detach().requires_grad_() for name in names)


@pytest.mark.parametrize("weight", (True, False))
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: str, weight: bool, device: str) -> None:
    """Numerical derivatives of every output in every differentiable input, backward, forward-mode and
    batched. USERS row 16."""
    function, tensors = as_function(double_call(form, device, weight=weight))
    assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True, check_batched_grad=True)


@pytest.mark.parametrize("form", FORMS)
def test_gradgradcheck(form: str, device: str) -> None:
    """Numerical second derivatives of every output in every differentiable input. USERS row 19."""
    function, tensors = as_function(double_call(form, device))
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_of_each_input_alone(form: str, device: str) -> None:
    """First and second derivatives in one input while the others are constants. USERS row 16."""
    call = double_call(form, device)
    for name in call.differentiable():
        function, tensors = as_function(call, [name])
        assert torch.autograd.gradcheck(function, tensors)
        assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_subset(form: str, dtype: torch.dtype, device: str) -> None:
    """Every subset of inputs requiring grad, for every subset of outputs used, gives exactly those gradients,
    right. USERS row 16."""
    call = make_call(form, (4, 21), dtype, device)
    upstream = make_upstream(call)
    outputs = [name for name, grad in upstream._asdict().items() if grad is not None]
    for used in subsets(outputs):
        grads_in = [grad if name in used else None for name, grad in upstream._asdict().items()]
        true = truth.gradients(call, *grads_in)
        for names in subsets(call.differentiable()):
            if "y" not in used and not {"x", "residual"} & set(names):
                continue  # sum and variance depend on the rows only
            _, grads = run_with_gradients(call, *grads_in, names=names)
            assert set(grads) == set(names)
            unused = {name for name in names if "y" not in used and name not in ("x", "residual")}
            for name in unused:
                assert grads.pop(name, None) is None or not true[name].any()
            grads = {name: grad for name, grad in grads.items() if name not in unused}
            assert_grads(grads, true, call.x.dtype, call.accumulate)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_against_backward_op_masks(form: str, device: str) -> None:
    """The backward ops compute what output_mask asks for and leave the rest undefined; a weight of None
    too."""
    call = make_call(form, (4, 21), device=device)
    upstream = make_upstream(call)
    true = truth.gradients(call, *upstream)
    row = truth.stored_sum(call)
    for weight in (call.weight, None):
        if weight is None:
            true = truth.gradients(replace(call, weight=None), *upstream)
        if call.exact:
            variance, op = truth.mean_square(row).to(call.accumulate), torch.ops.bhyt.backward
            given, names = (
                [upstream.y, upstream.variance, upstream.sum, row, variance],
                ["x", "weight", "lam"],
            )
        else:
            op, given = (
                torch.ops.bhyt.backward_approx,
                [upstream.y, upstream.sum, row, call.variance, call.offset],
            )
            names = ["x", "variance", "weight", "lam"]
        for bits in range(1 << len(names)):
            mask = [bool(bits >> i & 1) for i in range(len(names))]
            grads = op(*given, weight, call.lam, call.kappa, call.eps, mask)
            wanted = {n for n, m in zip(names, mask) if m and not (n == "weight" and weight is None)}
            returned = {n: g for n, g in zip(names, grads) if g is not None}
            assert set(returned) == wanted
            assert_grads(returned, true, call.x.dtype, call.accumulate)


@pytest.mark.parametrize("form", FORMS)
def test_a_frozen_gain_costs_nothing(form: str, device: str) -> None:
    """No graph without grad; and backward is asked only for what requires grad."""
    call = make_call(form, (4, 21), device=device)
    assert not any(t.requires_grad for t in call.run() if t is not None)
    masks = []

    class Masks(OpsCalled):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "backward" in str(func):
                masks.append(list(args[-1]))
            return super().__torch_dispatch__(func, types, args, kwargs)

    leaves = call.requiring_grad(["x"])
    y = leaves.run().y
    with Masks():
        y.backward(torch.ones_like(y))
    assert masks == [[True, False, False] if call.exact else [True, False, False, False]]


@pytest.mark.parametrize("form", FORMS)
def test_no_gradient_for_the_offset(form: str, device: str) -> None:
    """variance_offset gets no gradient, even if it requires one; the others are what they are without."""
    if not form.endswith("_approx"):
        pytest.skip("exact forms have no variance_offset")
    call = make_call(form, (4, 21), device=device)
    leaves = replace(call.requiring_grad(), offset=torch.tensor(0.25, device=device, requires_grad=True))
    upstream = make_upstream(call)
    out = leaves.run()
    torch.autograd.backward([t for t in out if t is not None], [g for g in upstream if g is not None])
    assert leaves.offset.grad is None
    grads = {name: t.grad for name, t in leaves.differentiable().items()}
    assert_grads(grads, truth.gradients(call, *upstream), call.x.dtype, call.accumulate)


@pytest.mark.parametrize("form", FORMS)
def test_forward_mode(form: str, device: str) -> None:
    """Dual numbers: the directional derivative in all inputs at once is that of reverse mode, and not
    silently 0. USERS row 19."""
    function, tensors = as_function(double_call(form, device, (3, 8)))
    directions = tuple(torch.randn_like(t) for t in tensors)
    _, tangents = torch.func.jvp(function, tensors, directions)
    outputs = function(*tensors)
    upstream = tuple(torch.randn_like(t) for t in outputs)
    grads = torch.autograd.grad(outputs, tensors, upstream)
    forward = sum((t * g).sum() for t, g in zip(tangents, upstream))
    reverse = sum((d * g).sum() for d, g in zip(directions, grads))
    torch.testing.assert_close(forward, reverse, rtol=1e-12, atol=1e-12)
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(t.detach(), d) for t, d in zip(tensors, directions)]
        for out, expected in zip(function(*duals), tangents):
            tangent = torch.autograd.forward_ad.unpack_dual(out).tangent
            torch.testing.assert_close(tangent, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_func_grad(form: str, device: str) -> None:
    """torch.func.grad gives the gradients of truth.py. USERS row 19."""
    call = double_call(form, device, (3, 8))
    function, tensors = as_function(call)
    upstream = make_upstream(call)
    weights = [g for g in upstream if g is not None]

    def loss(*args: Tensor) -> Tensor:
        return sum((out * w).sum() for out, w in zip(function(*args), weights))

    grads = torch.func.grad(loss, argnums=tuple(range(len(tensors))))(*tensors)
    assert_grads(
        dict(zip(call.differentiable(), grads)),
        truth.gradients(call, *upstream),
        torch.float64,
        torch.float64,
    )


@pytest.mark.parametrize("form", FORMS)
def test_vmap(form: str, device: str) -> None:
    """vmap over the rows, over lam, and vmap(grad) for per-sample gradients, against a loop. USERS row 19."""
    call = double_call(form, device, (4, 8))
    function, tensors = as_function(call)
    tensors = tuple(t.detach() for t in tensors)
    names = list(call.differentiable())
    dims = tuple(None if name in ("weight", "lam") else 0 for name in names)

    def loss(*args: Tensor) -> Tensor:
        return sum(out.square().sum() for out in function(*args))

    def sample(i: int) -> Tuple[Tensor, ...]:
        return tuple(t if dim is None else t[i] for t, dim in zip(tensors, dims))

    for mapped, plain in (
        (function, function),
        (torch.func.grad(loss, argnums=tuple(range(len(names)))),) * 2,
    ):
        together = torch.vmap(mapped, in_dims=dims)(*tensors)
        for i in range(4):
            for a, b in zip(together, plain(*sample(i))):
                assert relative_l2(a[i], b.double()) <= 1e-12
    lams = torch.tensor([[0.5], [2.0], [0.0]], dtype=torch.float64, device=device)
    stacked = torch.vmap(lambda lam: replace(call, lam=lam).run().y)(lams)
    for lam, y in zip(lams, stacked):
        assert relative_l2(y, truth.outputs(replace(call, lam=lam)).y) <= 1e-14


@pytest.mark.parametrize("form", FORMS)
def test_a_hessian(form: str, device: str) -> None:
    """torch.func.hessian (forward over reverse) agrees with reverse over reverse. USERS row 19."""
    call = double_call(form, device, (1, 5))

    def loss(x: Tensor) -> Tensor:
        return replace(call, x=x).run().y.square().sum()

    expected = torch.autograd.functional.hessian(loss, call.x)
    torch.testing.assert_close(torch.func.hessian(loss)(call.x), expected, rtol=1e-10, atol=1e-12)


def test_double_backward_keeps_saturated_terms(device: str) -> None:
    """A gradient penalty on a saturated row: finite, and right in float32. USERS row 19."""
    call = make_call("forward", (3, 40), device=device, lam=8.0, kappa=1.0)

    def penalty(call: Call, functions) -> Tensor:
        leaves = call.requiring_grad(["x"])
        grad = torch.autograd.grad(leaves.run(functions).y.sum(), leaves.x, create_graph=True)[0]
        return torch.autograd.grad(grad.square().sum(), leaves.x)[0]

    wide = replace(call, x=call.x.double(), lam=call.lam.double(), weight=call.weight.double())
    assert relative_l2(penalty(call, bhyt.functional), penalty(wide, bhyt.reference)) <= 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_what_is_saved(form: str, device: str) -> None:
    """Saved: the stream (the caller's own x, or the sum it is handed), one float32 per row, the parameters.
    No y, no copy, nothing else, byte for byte. USERS row 24."""
    rows, d = 6, 64
    call = make_call(form, (rows, d), torch.bfloat16, device, stream=torch.float32 if "add" in form else None)
    call = call.requiring_grad()
    saved: List[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = call.run()
    stream = out.sum if call.adds else call.x
    expected = stream.numel() * stream.element_size() + 4 * rows + 4 * d + 4 + (0 if call.exact else 4)
    assert sum(t.numel() * t.element_size() for t in saved) == expected
    addresses = [t.data_ptr() for t in saved]
    assert stream.data_ptr() in addresses and out.y.data_ptr() not in addresses
    for tensor in (call.weight, call.lam, out.variance if call.exact else call.variance):
        assert tensor.data_ptr() in addresses, "a copy was saved"
