"""bhyt.BHyT and bhyt.BHyTApprox: the surface of docs/api/modules.md."""

import copy
import io
import pickle
from typing import Any, Tuple, Union

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


def test_hooks_see_every_call() -> None:
    """Forward and backward hooks fire once for each way into a site."""
    first, second = ready(bhyt.BHyT), ready(bhyt.BHyTApprox)
    x, residual, v = torch.randn(3, D, requires_grad=True), torch.randn(3, D), torch.ones(3, 1)
    calls = [
        (first, lambda: first(x)), (first, lambda: first.forward_with_variance(x)),
        (first, lambda: first.forward_add(x, residual)), (first, lambda: first.forward_add_with_variance(x, residual)),
        (second, lambda: second(x, v)), (second, lambda: second.forward_add(x, residual, v)),
    ]
    for site, call in calls:
        seen: list = []
        handles = [
            site.register_forward_hook(lambda module, args, output: seen.append((args[0], output))),
            site.register_full_backward_hook(lambda module, grads_in, grads_out: seen.append(grads_in[0])),
        ]
        output = call()
        y = output[0] if isinstance(output, tuple) else output
        y.sum().backward()
        assert len(seen) == 2 and seen[0][0] is not None and torch.equal(seen[0][0], x)
        shown = seen[0][1][0] if isinstance(output, tuple) else seen[0][1]
        assert same_bits(shown, y) and same_bits(seen[1], x.grad)
        x.grad = None
        for handle in handles:
            handle.remove()


def test_jagged_nested_tensors() -> None:
    """Each sequence's rows as on their own, sum and variance too, and gradients; other raggedness is an error."""
    first, second = ready(bhyt.BHyT), ready(bhyt.BHyTApprox)
    rows = [torch.randn(n, D) for n in (3, 5, 1)]
    x = torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)
    y, total, v = first(x, residual=x * 2, return_variance=True)
    y2, _ = second(total, v, residual=x)
    for i, row in enumerate(rows):
        expected = first(row, residual=row * 2, return_variance=True)
        assert all(map(same_bits, (y.unbind()[i], total.unbind()[i], v.unbind()[i]), expected))
        assert same_bits(y2.unbind()[i], second(expected[1], expected[2], residual=row)[0])
    assert y.shape == x.shape and same_bits(first(x).values(), first(x.values()))
    y.values().square().sum().backward()
    flat = torch.cat(rows).requires_grad_()
    first(flat, residual=flat * 2)[0].square().sum().backward()
    assert torch.allclose(x.grad.values(), flat.grad)
    other = torch.nested.nested_tensor([torch.randn(n, D) for n in (3, 3, 3)], layout=torch.jagged)
    for wrong in (other, torch.randn(9, D)):
        with pytest.raises(ValueError, match="residual: expected"):
            first(x, residual=wrong)


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


def test_parameter_groups() -> None:
    """Matrices decay, gains, biases and lam do not; frozen ones are left out, shared ones come once. 200 steps of AdamW
    without gradients leave lam where it was."""
    block = Block()
    block.mlp.weight = block.mix.weight
    block.first.weight.requires_grad_(False)
    decayed, kept = bhyt.parameter_groups(block, weight_decay=0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert [id(p) for p in decayed["params"]] == [id(block.mix.weight)]
    names = {id(p): name for name, p in block.named_parameters()}
    assert {names[id(p)] for p in kept["params"]} == {
        "first.lam", "second.weight", "second.lam", "mix.bias", "mlp.bias",
    }
    optimizer = torch.optim.AdamW([decayed, kept], lr=1e-2)
    before = block.mix.weight.norm().item()
    for _ in range(200):
        for p in (*decayed["params"], *kept["params"]):
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert block.first.lam.item() == 2.0 and block.mix.weight.norm().item() < 0.9 * before
    for p in block.parameters():  # as DeepSpeed's ZeRO-3 leaves them
        p.ds_shape, p.data = p.shape, torch.empty(0)
    groups = bhyt.parameter_groups(block, 0.1)
    assert [[id(p) for p in group["params"]] for group in groups] == [[id(p) for p in g["params"]] for g in (decayed, kept)]
    with pytest.raises(ValueError, match="no parameter that requires"):
        bhyt.parameter_groups(block.requires_grad_(False), 0.1)


def test_vmap_over_stacked_modules() -> None:
    """An ensemble by stack_module_state: each member's outputs and gradients. USERS row 66."""
    members = [bhyt.BHyT(16, dtype=torch.float64) for _ in range(3)]
    for member in members:
        nn.init.uniform_(member.weight, 0.5, 1.5)
        nn.init.uniform_(member.lam, 0.5, 2)
    x = torch.randn(4, 16, dtype=torch.float64)
    parameters, buffers = torch.func.stack_module_state(members)

    def loss(parameters: dict, buffers: dict) -> Tensor:
        return torch.func.functional_call(members[0], (parameters, buffers), (x,)).square().sum()

    grads, losses = torch.vmap(torch.func.grad_and_value(loss))(parameters, buffers)
    for i, member in enumerate(members):
        expected = member(x).square().sum()
        expected.backward()
        assert torch.allclose(losses[i], expected, rtol=1e-12)
        for name, parameter in member.named_parameters():
            assert torch.allclose(grads[name][i], parameter.grad, rtol=1e-10), name
