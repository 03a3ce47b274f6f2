"""What the study measures of a model in training, on held-out text and by depth. Nothing here changes the run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Iterator

import torch
from torch import Tensor, nn

import bhyt
from pretraining.model import Block, Decoder, rotate
from pretraining.norms import BlockBHyT
from pretraining.train import PROFILE_WINDOWS, Run

SATURATED = 0.9  # |tanh| above which the slope is below 0.19


@dataclass(frozen=True)
class Visit:
    """What passed through one block. B sequences, T tokens, d channels; H heads."""

    block: Block
    stream: Tensor  # [B, T, d] in front of the attention
    variance: Tensor | None  # [B, T, 1], what the first site hands to the second
    attention_input: Tensor  # [B, T, d], the first site's output
    branch: Tensor  # [B, T, d], the attention's output
    mlp_input: Tensor  # [B, T, d], the second site's output
    entered: Tensor  # [B, T, d], stream + branch
    rotary: tuple[Tensor, Tensor]


@torch.no_grad()
def walk(model: Decoder, tokens: Tensor) -> Iterator[Visit]:
    """The forward pass of `model`, one block after the other. tokens: [B, T] int64."""
    branch, stream = None, model.embed_tokens(tokens)
    rotary = model.rotary(stream)
    for block in model.layers:
        y, stream, variance = block.enter_attention(branch, stream)
        attended = block.leave_attention(block.self_attn(y, rotary))
        z, entered = block.enter_mlp(attended, stream, variance)
        yield Visit(block, stream, variance, y, attended, z, entered, rotary)
        branch, stream = block.leave_mlp(block.mlp(z)), entered


def measure(run: Run) -> dict[str, Any]:
    """All of it by depth: the stream behind each block (`magnitude` and `variance`, the embeddings first), the norm
    of each block's parameter gradients, its two sites, and for BHyT how good the second site's variance is."""
    inputs, targets = (x.to(run.device) for x in run.corpus.validation(PROFILE_WINDOWS, run.model.config.seq_len))
    record: dict[str, Any] = {"loss": run.validate(), **run.depth_profile()}
    record["gradient"] = gradient_norms(run, inputs, targets)
    with run.autocast():
        visits = list(walk(run.model, inputs))
    record["sites"] = [sites(visit) for visit in visits]
    if all(isinstance(visit.block, BlockBHyT) for visit in visits):
        record["approximation"] = approximation(visits)
    return record


def gradient_norms(run: Run, inputs: Tensor, targets: Tensor) -> list[float]:
    """L2 norm of the loss's gradient by the parameters of each block."""
    run.optimizer.zero_grad(set_to_none=True)
    run.loss(inputs, targets).backward()
    return [nn.utils.get_total_norm([p.grad for p in layer.parameters()]).item() for layer in run.model.layers]


# ---- sites


def sites(visit: Visit) -> list[dict[str, float]]:
    """The two sites of a block: mean square of the output, and of bounded ones lam and the share of saturated and of
    unforeseen values, those whose argument of tanh is beyond [-lam, lam]: at most 1 / kappa^2 where v is exact."""
    block, records = visit.block, []
    for site, y in ((block.input_layernorm, visit.attention_input), (block.post_attention_layernorm, visit.mlp_input)):
        y = y.float()
        record = {"mean_square": y.square().mean().item()}
        if hasattr(site, "lam") or hasattr(site, "alpha"):
            size, gain = (y - getattr(site, "bias", 0)).abs(), site.weight.abs()
            record["saturated"] = _share(size > SATURATED * gain)
            if hasattr(site, "lam"):
                record["lam"] = site.lam.item()
                record["unforeseen"] = _share(size > site.lam.abs().tanh() * gain)
        records.append(record)
    return records


def _share(condition: Tensor) -> float:
    return condition.float().mean().item()


# ---- the approximation


@torch.no_grad()
def approximation(visits: list[Visit]) -> dict[str, Any]:
    """Estimates of the row variance behind the attention, beside the true one, by layer and of all layers together.

    The estimates are v plus nothing, plus the offset for T tokens ("T"), plus offset * T / t ("t"), plus offset * T
    ("one": no averaging at all), and plus offset * T * (sum of squared attention weights, mean of the heads)
    ("weights"). The last needs the attention weights, which no fused attention gives: it tells how much of the error is
    that attention is not uniform.
    """
    layers, truths, all_estimates = [], [], []
    for visit in visits:
        weights = attention_weights(visit)
        truth, estimates = variances(visit, weights)
        layers.append({
            "estimates": {name: agreement(estimate, truth) for name, estimate in estimates.items()},
            "terms": _terms(visit),
            "sink": weights[..., 1:, 0].mean().item(),  # the weight of the first token
            "staleness": (visit.block.post_attention_layernorm.variance_offset / offset(visit.block)).log().item(),
        })
        truths.append(truth)
        all_estimates.append(estimates)
    pooled = {
        name: agreement(torch.cat([one[name] for one in all_estimates]), torch.cat(truths))
        for name in all_estimates[0]
    }
    return {"layers": layers, "pooled": pooled, "positions": [start + 1 for start, _ in _bins(truths[0].shape[1])]}


@torch.no_grad()
def offset(block: BlockBHyT) -> Tensor:
    """v' - v as the weights of this very step give it."""
    attention, first = block.self_attn, block.input_layernorm
    values = attention.v_proj.weight
    if getattr(block, "counts_gain", False):
        values = values * first.weight
    gain = bhyt.attention_gain(
        values, attention.o_proj.weight, block.seq_len,
        attention.heads // attention.kv_heads, head_dim=attention.head_dim,
    )
    return gain * (first.lam.detach().squeeze() / first.kappa).square()


def agreement(estimate: Tensor, truth: Tensor) -> dict[str, Any]:
    """Of two positive tensors [N, T]: Pearson's r over all tokens, of the values and of their logarithms, and the log
    of estimate / truth: its mean, its root mean square, and its mean by position (powers of two)."""
    error = (estimate / truth).log()
    return {
        "pearson": pearson(estimate, truth),
        "pearson_log": pearson(estimate.log(), truth.log()),
        "bias": error.mean().item(),
        "error": error.square().mean().sqrt().item(),
        "bias_by_position": [error[:, start:end].mean().item() for start, end in _bins(truth.shape[1])],
    }


def pearson(one: Tensor, other: Tensor) -> float:
    return torch.corrcoef(torch.stack((one.flatten(), other.flatten())))[0, 1].item()


def attention_weights(visit: Visit) -> Tensor:
    """[B, H, T, T]: what the fused attention does not return."""
    attention, y = visit.block.self_attn, visit.attention_input.float()
    batch, length, _ = y.shape
    q = attention.q_proj(y).view(batch, length, attention.heads, -1).transpose(1, 2)
    k = attention.k_proj(y).view(batch, length, attention.kv_heads, -1).transpose(1, 2)
    k = rotate(k, visit.rotary).repeat_interleave(attention.heads // attention.kv_heads, dim=1)
    scores = (rotate(q, visit.rotary) @ k.mT) / math.sqrt(attention.head_dim)
    future = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1)


def variances(visit: Visit, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """weights: [B, H, T, T] -> (true row variance behind the attention [B, T], estimates [B, T] by name), float64."""
    length = visit.entered.shape[1]
    before = visit.variance.squeeze(-1).double()
    of_one = offset(visit.block) * visit.block.seq_len
    position = torch.arange(1, length + 1, device=before.device)
    concentration = weights.double().square().sum(-1).mean(1)  # 1 / t where attention is uniform
    return visit.entered.double().square().mean(-1), {
        "none": before,
        "T": before + of_one / length,
        "t": before + of_one / position,
        "one": before + of_one,
        "weights": before + of_one * concentration,
    }


def _terms(visit: Visit) -> dict[str, Any]:
    """What the true variance is made of, by position: mean of x^2, of 2 x o and of o^2; and the offset for o^2."""
    x, o = visit.stream.double(), visit.branch.double()
    bins = _bins(x.shape[1])
    parts = {"stream": x.square(), "cross": 2 * x * o, "branch": o.square()}
    means = {name: [part[:, start:end].mean().item() for start, end in bins] for name, part in parts.items()}
    return {**means, "offset": (offset(visit.block) * visit.block.seq_len / x.shape[1]).item()}


def _bins(length: int) -> list[tuple[int, int]]:
    """Positions [start, end) counted from 0: 1, 2 to 3, 4 to 7 and so on counted from 1."""
    starts = [2**power - 1 for power in range(length.bit_length())]
    return [(start, min(2 * start + 1, length)) for start in starts if start < length]
