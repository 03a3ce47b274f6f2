"""bhyt.BHyT and bhyt.BHyTApprox: the surface of docs/api/modules.md."""

import copy
import io
import pickle
from typing import Any, Union

import pytest
import torch
from torch import Tensor, nn

import bhyt
from support.checks import same_bits

Site = Union[bhyt.BHyT, bhyt.BHyTApprox]
SITES = (bhyt.BHyT, bhyt.BHyTApprox)
D = 24


def ready(kind: type, **options) -> Site:
    """A site that runs: an approximate one with its offset set; weights that are not all 1."""
    site = kind(D, **options)
    if site.weight is not None:
        nn.init.uniform_(site.weight, 0.5, 1.5)
    if isinstance(site, bhyt.BHyTApprox):
        site.set_variance_offset(0.25)
    return site


def run(site: Site, x: Tensor) -> Tensor:
    return site(x) if isinstance(site, bhyt.BHyT) else site(x, x.float().square().mean(-1, keepdim=True))


@pytest.mark.parametrize("kind", SITES)
def test_construction(kind: type) -> None:
    """Defaults and every option of docs/api/modules.md; dtype and device are those of weight and lam."""
    site = kind(D)
    assert isinstance(site.weight, nn.Parameter) and torch.equal(site.weight, torch.ones(D))
    assert isinstance(site.lam, nn.Parameter) and torch.equal(site.lam, torch.ones(1))
    assert (site.kappa, site.eps) == (10.0, 1e-6)
    site = kind(D, lam=2.5, kappa=5, eps=1e-5, device="meta", dtype=torch.bfloat16)
    assert site.weight.is_meta and site.lam.is_meta and site.weight.dtype == site.lam.dtype == torch.bfloat16
    assert (site.kappa, site.eps) == (5.0, 1e-5)
    assert kind(D, lam=2.5).lam.item() == 2.5
    with pytest.raises(TypeError):
        kind(D, 2.5)  # options are keyword-only


@pytest.mark.parametrize("kind", SITES)
def test_frozen_lam_is_a_buffer(kind: type) -> None:
    """learnable_lam=False: no parameter, but in the state dict; training never changes it."""
    site = ready(kind, lam=2.0, learnable_lam=False)
    assert [name for name, _ in site.named_parameters()] == ["weight"]
    assert "lam" in dict(site.named_buffers()) and list(site.state_dict())[:2] == ["weight", "lam"]
    run(site, torch.randn(3, D)).sum().backward()
    assert site.lam.grad is None and site.weight.grad is not None


@pytest.mark.parametrize("kind", SITES)
def test_without_gain(kind: type) -> None:
    """elementwise_affine=False: weight is None, as torch.nn.RMSNorm has it."""
    site = ready(kind, elementwise_affine=False)
    assert site.weight is None and list(site.state_dict())[:1] == ["lam"]
    assert run(site, torch.randn(3, D)).shape == (3, D)
    with pytest.raises(TypeError, match=rf"x: expected a tensor \[..., {D}\], got list"):
        site([1.0] * D) if kind is bhyt.BHyT else site([1.0] * D, torch.ones(1))
    for wrong in (torch.randn(3, D + 1), torch.randn(3, 1), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=rf"x: expected \[..., {D}\]"):
            site(wrong) if kind is bhyt.BHyT else site(wrong, torch.ones(3, 1))


@pytest.mark.parametrize("kind", SITES)
@pytest.mark.parametrize(
    "size, options, message",
    (
        (0, {}, "hidden_size.*0"), ((D, D), {}, "hidden_size.*24, 24"), (2.5, {}, "hidden_size.*2.5"),
        (D, {"kappa": 0}, "kappa.*0"), (D, {"eps": -1}, "eps.*-1"), (D, {"eps": None}, "eps.*None"),
    ),
)
def test_bad_options(kind: type, size: Any, options: dict, message: str) -> None:
    """Refused when constructed, not when first run."""
    with pytest.raises(ValueError, match=message):
        kind(size, **options)


@pytest.mark.parametrize("kind", SITES)
def test_shape_of_one_dimension(kind: type) -> None:
    """A shape, as torch.nn.RMSNorm takes it."""
    assert kind((D,)).hidden_size == kind([D]).hidden_size == D


@pytest.mark.parametrize("kind", SITES)
def test_repr(kind: type) -> None:
    """extra_repr names size and options."""
    text = repr(kind(D, lam=2.0, kappa=5.0, learnable_lam=False))
    assert text.startswith(kind.__name__)
    assert all(part in text for part in (str(D), "lam=2.0", "kappa=5.0", "eps=1e-06", "learnable_lam=False"))


@pytest.mark.parametrize("kind", SITES)
def test_state_dict(kind: type) -> None:
    """weight [d] and lam [1], and an approximate site's offset, a float32 scalar; strict load; a missing or foreign key
    is an error, and so is the state of an approximate site in an exact one."""
    site = ready(kind, lam=2.0)
    state = site.state_dict()
    offset = {} if kind is bhyt.BHyT else {"variance_offset": (1,)}
    assert {name: t.shape for name, t in state.items()} == {"weight": (D,), "lam": (1,)} | offset
    other = ready(kind)
    other.load_state_dict(state, strict=True)
    x = torch.randn(3, D)
    assert same_bits(run(other, x), run(site, x))
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({"weight": state["weight"]})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict({**state, "bias": state["weight"]})
    if offset:
        with pytest.raises(RuntimeError, match="Unexpected key.*variance_offset"):
            bhyt.BHyT(D).load_state_dict(state)


@pytest.mark.parametrize("learnable", (True, False))
@pytest.mark.parametrize("kind", SITES)
def test_copies(kind: type, learnable: bool) -> None:
    """deepcopy, pickle and torch.save give a site that runs and trains alike, and shares nothing. USERS row
    28."""
    site = ready(kind, lam=2.0, learnable_lam=learnable)
    stream = io.BytesIO()
    torch.save(site, stream)
    stream.seek(0)
    x = torch.randn(3, D)
    for twin in (
        copy.deepcopy(site),
        pickle.loads(pickle.dumps(site)),
        torch.load(stream, weights_only=False),
    ):
        assert same_bits(run(twin, x), run(site, x))
        with torch.no_grad():
            twin.weight.zero_()
            twin.lam.zero_()
        assert site.weight.all() and site.lam.item() == 2.0


@pytest.mark.parametrize("learnable", (True, False))
@pytest.mark.parametrize("kind", SITES)
def test_meta_initialisation(kind: type, learnable: bool) -> None:
    """meta -> to_empty -> reset_parameters leaves nothing undefined, the frozen lam and the offset included;
    the approximate site still wants its offset. USERS row 27."""
    site = kind(D, lam=2.0, learnable_lam=learnable, device="meta").to_empty(device="cpu")
    for t in (*site.parameters(), *site.buffers()):
        t.detach().fill_(float("nan"))
    site.reset_parameters()
    if isinstance(site, bhyt.BHyTApprox):
        with pytest.raises(RuntimeError, match="offset"):
            run(site, torch.randn(3, D))
        site.set_variance_offset(0.25)
    expected = kind(D, lam=2.0)
    if isinstance(expected, bhyt.BHyTApprox):
        expected.set_variance_offset(0.25)
    x = torch.randn(3, D)
    assert same_bits(run(site, x), run(expected, x))


@pytest.mark.parametrize("kind", SITES)
def test_inference_then_training(kind: type) -> None:
    """A first call under inference_mode leaves nothing behind that training trips over. USERS row 27."""
    site = ready(kind)
    x = torch.randn(3, D)
    with torch.inference_mode():
        inferred = run(site, x)
    y = run(site, x.requires_grad_())
    y.sum().backward()
    assert torch.equal(inferred, y) and site.weight.grad is not None and site.lam.grad is not None


def test_methods_agree() -> None:
    """The four ways into each op give the same bits, and one fixed return type each."""
    first, second = ready(bhyt.BHyT), ready(bhyt.BHyTApprox)
    x, residual = torch.randn(3, D), torch.randn(3, D)
    y, v = first.forward_with_variance(x)
    assert same_bits(first(x), y) and v.shape == (3, 1)
    y, total, v = first.forward_add_with_variance(x, residual)
    assert all(map(same_bits, first.forward_add(x, residual), (y, total)))
    assert same_bits(total, x + residual) and same_bits(first(total), y)
    y2, total2 = second.forward_add(x, residual, v)
    assert same_bits(total2, total) and same_bits(second(total, v), y2)
    assert all(map(same_bits, first(x, residual, return_variance=True), (y, total, v)))
    assert all(map(same_bits, first(x, return_variance=True), first.forward_with_variance(x)))
    assert all(map(same_bits, second(x, v, residual), (y2, total2)))
