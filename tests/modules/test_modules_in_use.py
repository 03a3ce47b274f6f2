"""The modules where others use them: hooks, nested tensors, TorchScript, groups of parameters, vmap."""

import io
from typing import Tuple

import pytest
import torch
from torch import Tensor, nn

import bhyt
from support.checks import same_bits
from test_modules import D, SITES, ready


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
    assert [[id(p) for p in group["params"]] for group in groups] == [
        [id(p) for p in g["params"]] for g in (decayed, kept)
    ]
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
