"""bhyt.BHyT and bhyt.BHyTApprox: the surface of SPEC.md section 6."""

import copy
import io
import pickle
from typing import Tuple, Union

import pytest
import torch
from torch import Tensor, nn

import bhyt
from checks import same_bits

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
    """Defaults and every option of SPEC.md section 6; dtype and device are those of weight and lam."""
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
    assert "lam" in dict(site.named_buffers()) and list(site.state_dict()) == ["weight", "lam"]
    run(site, torch.randn(3, D)).sum().backward()
    assert site.lam.grad is None and site.weight.grad is not None


@pytest.mark.parametrize("kind", SITES)
def test_without_gain(kind: type) -> None:
    """elementwise_affine=False: weight is None, as torch.nn.RMSNorm has it."""
    site = ready(kind, elementwise_affine=False)
    assert site.weight is None and list(site.state_dict()) == ["lam"]
    assert run(site, torch.randn(3, D)).shape == (3, D)


@pytest.mark.parametrize("kind", SITES)
@pytest.mark.parametrize(
    "size, options, message",
    ((0, {}, "hidden_size.*0"), (D, {"kappa": 0}, "kappa.*0"), (D, {"eps": -1}, "eps.*-1")),
)
def test_bad_options(kind: type, size: int, options: dict, message: str) -> None:
    """Refused when constructed, not when first run."""
    with pytest.raises(ValueError, match=message):
        kind(size, **options)


@pytest.mark.parametrize("kind", SITES)
def test_repr(kind: type) -> None:
    """extra_repr names size and options."""
    text = repr(kind(D, lam=2.0, kappa=5.0, learnable_lam=False))
    assert text.startswith(kind.__name__)
    assert all(part in text for part in (str(D), "lam=2.0", "kappa=5.0", "eps=1e-06", "learnable_lam=False"))


@pytest.mark.parametrize("kind", SITES)
def test_state_dict(kind: type) -> None:
    """Exactly weight [d] and lam [1] (SPEC.md section 4); strict load; a missing or foreign key is an
    error."""
    site = ready(kind, lam=2.0)
    state = site.state_dict()
    assert {name: t.shape for name, t in state.items()} == {"weight": (D,), "lam": (1,)}
    other = ready(kind)
    other.load_state_dict(state, strict=True)
    x = torch.randn(3, D)
    assert same_bits(run(other, x), run(site, x))
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({"weight": state["weight"]})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict({**state, "bias": state["weight"]})


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


def test_meta_after_the_offset_was_set() -> None:
    """An offset set while on meta has no value: after to_empty, and reset_parameters or a loaded state dict,
    the site refuses to run rather than to use undefined memory. USERS row 27."""
    state = ready(bhyt.BHyTApprox).state_dict()
    for finish in (lambda site: site.reset_parameters(), lambda site: site.load_state_dict(state)):
        site = bhyt.BHyTApprox(D, device="meta")
        site.set_variance_offset(0.25)
        site = site.to_empty(device="cpu")
        finish(site)
        with pytest.raises(RuntimeError, match="offset"):
            run(site, torch.randn(3, D))


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


def test_offset_set_under_inference_mode_then_training() -> None:
    """The offset refreshed while inferring is a plain buffer when training. USERS row 27."""
    site = bhyt.BHyTApprox(D)
    with torch.inference_mode():
        site.set_variance_offset(torch.tensor(0.25))
    run(site, torch.randn(3, D, requires_grad=True)).sum().backward()
    assert site.lam.grad is not None
    site.set_variance_offset(0.5)
    assert site.variance_offset.item() == 0.5


def test_approximate_site_refuses_before_its_offset() -> None:
    """Every way of running it raises, with the two methods that help; after loading a state dict too."""
    site = bhyt.BHyTApprox(D)
    x, v = torch.randn(3, D), torch.ones(3, 1)
    for call in (lambda: site(x, v), lambda: site.forward_add(x, x, v)):
        with pytest.raises(RuntimeError, match="update_variance_offset.*set_variance_offset"):
            call()
    site.load_state_dict(ready(bhyt.BHyTApprox).state_dict())
    with pytest.raises(RuntimeError, match="offset"):
        site(x, v)
    site.set_variance_offset(0.0)
    assert site(x, v).shape == x.shape


def test_variance_offset() -> None:
    """update_variance_offset gives c lam1^2 / kappa1^2 of the exact site, detached, in the buffer's place."""
    first, second = bhyt.BHyT(D, lam=3.0, kappa=5.0), bhyt.BHyTApprox(D, lam=1.0, kappa=10.0)
    buffer = second.variance_offset
    second.update_variance_offset(torch.tensor(2.0), first)
    assert second.variance_offset is buffer and not buffer.requires_grad
    assert buffer.item() == pytest.approx(2.0 * 9 / 25, rel=1e-6)
    assert "variance_offset" not in second.state_dict()
    with pytest.raises(ValueError, match="one element.*2"):
        second.set_variance_offset(torch.zeros(2))


def test_casting_a_model_keeps_the_offset_right() -> None:
    """.to(bfloat16) and .half() leave a site that runs, its offset rounded at most."""
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        site = ready(bhyt.BHyTApprox).to(dtype)
        x = torch.randn(3, D, dtype=dtype)
        v = (
            x.double()
            .square()
            .mean(-1, keepdim=True)
            .to(torch.float64 if dtype == torch.float64 else torch.float32)
        )
        assert site(x, v).dtype == dtype
        assert site.variance_offset.item() == 0.25


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


class Block(nn.Module):
    """Both sites as a decoder block uses them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = ready(bhyt.BHyT, lam=2.0), ready(bhyt.BHyTApprox)
        self.mix, self.mlp = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, branch: Tensor, stream: Tensor) -> Tuple[Tensor, Tensor]:
        y, stream, v = self.first.forward_add_with_variance(branch, stream)
        y, stream = self.second.forward_add(self.mix(y), stream, v)
        return self.mlp(y), stream


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", SITES)
def test_script(kind: type) -> None:
    """torch.jit.script of a site, saved and loaded: the same bits. USERS row 23."""
    site = ready(kind, lam=2.0)
    stream = io.BytesIO()
    torch.jit.save(torch.jit.script(site), stream)
    stream.seek(0)
    loaded = torch.jit.load(stream)
    x = torch.randn(3, D)
    v = x.square().mean(-1, keepdim=True)
    arguments = (x,) if kind is bhyt.BHyT else (x, v)
    assert same_bits(loaded(*arguments), site(*arguments))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_script_block() -> None:
    """A scripted block through save and load: same bits, same gradients. USERS row 23."""
    block = Block()
    stream = io.BytesIO()
    torch.jit.save(torch.jit.script(block), stream)
    stream.seek(0)
    loaded = torch.jit.load(stream)
    results = []
    for model in (block, loaded):
        torch.manual_seed(1)
        x, r = torch.randn(4, D, requires_grad=True), torch.randn(4, D, requires_grad=True)
        branch, total = model(x, r)
        (branch.square().sum() + total.square().sum()).backward()
        grads = [p.grad for _, p in sorted(model.named_parameters())]
        results.append([branch.detach(), total.detach(), x.grad, r.grad, *grads])
        assert all(grad is not None and grad.any() for grad in results[-1])
    assert all(map(same_bits, *results))
