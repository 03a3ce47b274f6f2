"""Llama-like blocks of the two modules give the gradients of bhyt.reference, through both sites and the
variance."""

from typing import Dict, List, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bhyt

D, HEADS, KV_HEADS, HEAD_DIM, LENGTH, LAYERS = 32, 4, 2, 8, 6, 3


class Attention(nn.Module):
    """Grouped-query causal attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, n * HEAD_DIM, bias=False) for n in (HEADS, KV_HEADS, KV_HEADS))
        self.o = nn.Linear(HEADS * HEAD_DIM, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        def heads(t: Tensor) -> Tensor:
            return t.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)

        k, v = (heads(t).repeat_interleave(HEADS // KV_HEADS, 1) for t in (self.k(x), self.v(x)))
        scores = (heads(self.q(x)) @ k.transpose(-1, -2)) / HEAD_DIM**0.5
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        return self.o((scores.masked_fill(causal, float("-inf")).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = bhyt.BHyT(D, lam=2.0), bhyt.BHyTApprox(D, lam=1.0)
        self.attention = Attention()
        self.up, self.gate, self.down = nn.Linear(D, 2 * D), nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Decoder(nn.Module):
    """Blocks whose residual adds are all fused into the site that follows; an exact site at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = bhyt.BHyT(D, lam=1.5)
        for name, parameter in self.named_parameters():
            if "norm" in name and name.endswith("weight"):
                nn.init.uniform_(parameter, 0.5, 1.5)

    def refresh(self) -> None:
        for block in self.blocks:
            weights = block.attention.v.weight, block.attention.o.weight
            gain = bhyt.attention_gain(*weights, LENGTH, HEADS // KV_HEADS, head_dim=HEAD_DIM)
            block.norm2.update_variance_offset(gain, block.norm1)

    def forward(self, x: Tensor) -> Tensor:
        stream, branch = x, None
        for block in self.blocks:
            if branch is None:
                y, variance = block.norm1.forward_with_variance(stream)
            else:
                y, stream, variance = block.norm1.forward_add_with_variance(branch, stream)
            y, stream = block.norm2.forward_add(block.attention(y), stream, variance)
            branch = block.mlp(y)
        return self.norm.forward_add(branch, stream)[0]

    def by_reference(self, x: Tensor) -> Tensor:
        """The same with bhyt.reference, each residual add written out."""
        for block in self.blocks:
            one, two = block.norm1, block.norm2
            y, variance = bhyt.reference.forward(x, one.weight, one.lam, one.kappa, one.eps)
            x = x + block.attention(y)
            x = x + block.mlp(
                bhyt.reference.forward_approx(
                    x, variance, two.variance_offset, two.weight, two.lam, two.kappa, two.eps
                )
            )
        last = self.norm
        return bhyt.reference.forward(x, last.weight, last.lam, last.kappa, last.eps)[0]


def loss_and_gradients(model: Decoder, function, x: Tensor) -> Tuple[Tensor, Dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    y = function(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)).sum().backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return y.detach(), {**grads, "x": x.grad}


def assert_close(actual: Dict[str, Tensor], true: Dict[str, Tensor], bound: float) -> None:
    """Relative L2 error of every gradient; none is missing or zero."""
    assert actual.keys() == true.keys()
    for name, expected in true.items():
        assert expected.any(), f"{name} has no gradient at all"
        error = ((actual[name].double() - expected.double()).norm() / expected.double().norm()).item()
        assert error <= bound, f"{name}: {error:.3g} > {bound}"


def decoder(dtype: torch.dtype, device: str) -> Tuple[Decoder, Tensor]:
    model = Decoder().to(device=device, dtype=dtype)
    # Attention strong enough for the offset to matter.
    for block in model.blocks:
        nn.init.normal_(block.attention.v.weight, std=1.0)
        nn.init.normal_(block.attention.o.weight, std=1.0)
    model.refresh()
    assert all(0.05 < block.norm2.variance_offset.item() for block in model.blocks)
    return model, torch.randn(2, LENGTH, D, dtype=dtype, device=device)


def test_float64(device: str) -> None:
    """Three blocks with fused adds in float64: every gradient, of every lam and of x, to 1e-12."""
    model, x = decoder(torch.float64, device)
    y, grads = loss_and_gradients(model, model, x)
    true_y, true = loss_and_gradients(model, model.by_reference, x)
    assert_close({"y": y}, {"y": true_y}, 1e-13)
    assert_close(grads, true, 1e-12)


def test_float32(device: str) -> None:
    """The same in float32 against the float64 reference: over all vectors at most twice the error of the
    float32 reference. A gradient of lam is one number, which may cancel: 1e-4 for each."""
    model, x = decoder(torch.float32, device)
    _, grads = loss_and_gradients(model, model, x)
    _, eager = loss_and_gradients(model, model.by_reference, x)
    offsets = [block.norm2.variance_offset.clone() for block in model.blocks]
    model.double()
    for block, offset in zip(model.blocks, offsets):
        block.norm2.set_variance_offset(offset)
    _, true = loss_and_gradients(model, model.by_reference, x.double())

    def total_error(given: Dict[str, Tensor]) -> float:
        vectors = [(given[name].double(), t) for name, t in true.items() if t.numel() > 1]
        return sum(((actual - t).norm() / t.norm()).item() ** 2 for actual, t in vectors) ** 0.5

    assert total_error(grads) <= 2 * total_error(eager)
    assert_close(grads, true, 1e-4)


def test_the_variance_path_matters() -> None:
    """Detaching the variance changes the first site's input gradient: the tests above would notice its
    loss."""
    model, x = decoder(torch.float64, "cpu")
    block: Block = model.blocks[0]
    gradients: List[Tensor] = []
    for detach in (False, True):
        leaf = x.detach().requires_grad_()
        y, variance = block.norm1.forward_with_variance(leaf)
        y, _ = block.norm2.forward_add(y, leaf, variance.detach() if detach else variance)
        gradients.append(torch.autograd.grad(y.square().sum(), leaf)[0])
    assert (gradients[0] - gradients[1]).norm() > 1e-3 * gradients[0].norm()


def test_it_learns(device: str) -> None:
    """Thirty Adam steps on one batch: the loss falls by half, lam moves at both kinds of site, nothing is
    NaN."""
    torch.set_num_threads(1)
    model, x = decoder(torch.float32, device)
    target = torch.randn_like(x) * 0.5
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    losses = []
    for _ in range(30):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.refresh()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    for block in model.blocks:
        assert block.norm1.lam.item() != 2.0 and block.norm2.lam.item() != 1.0
