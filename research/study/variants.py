"""The blocks that the study adds to the example's: BHyT whose offset knows the position or takes all values for one,
whose lambda is frozen, or which starts elsewhere, and RMSNorm that starts where BHyT does."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import bhyt
from jobs import ALPHAS, BY_DEPTH, FIRST_EXACT, ONE_VALUE, POSITION, UNIT, Job
from measure import offset
from norms import BLOCKS, Derf
from pretraining.model import EMBEDDING_STD, Block, ModelConfig
from pretraining.norms import (
    KAPPA, LAM_ATTENTION, LAM_MLP, BlockBHyT, BlockBHyTExact, BlockDyT, BlockRMSNorm, DyT, ScaledEmbedding,
)


class BlockBHyTPosition(BlockBHyT):
    """c / T assumes that every token averages T values; the token at position t averages t: the offset times T / t."""

    excess: Tensor  # [T, 1], T / t - 1: what the site's own offset lacks

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__(config, index)
        position = torch.arange(1, config.seq_len + 1).unsqueeze(-1)
        self.register_buffer("excess", config.seq_len / position - 1, persistent=False)

    def enter_mlp(self, branch: Tensor, stream: Tensor, variance: Tensor | None) -> tuple[Tensor, Tensor]:
        assert variance is not None
        missing = self.post_attention_layernorm.variance_offset * self.excess[: variance.shape[-2]]
        return super().enter_mlp(branch, stream, variance + missing)


class BlockBHyTCounted(BlockBHyT):
    """c of what attention reads: the gains of the first site belong to W_V, and count where they are far from 1."""

    counts_gain = True

    @torch.no_grad()
    def refresh(self) -> None:
        self.post_attention_layernorm.set_variance_offset(offset(self))


class BlockBHyTOneValue(BlockBHyT):
    """If the values of all tokens were the same, their mean would have the variance of one: c for T = 1."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__(config, index)
        self.seq_len = 1


@dataclass(frozen=True)
class Start:
    """Where BHyT starts, and how fast its gains learn."""

    power: int = 0  # gains start at (kappa / lam) ** power; with 1 a sub-layer reads rows whose mean square is about 1
    counted: bool = False  # c of W_V times the gains
    by_depth: bool = False  # divided by the root of the block's index, as LayerNorm-Scaling divides its outputs
    rate: float = 1.0  # the gains' learning rate over that of the other parameters
    unit_embedding: bool = False  # embeddings of variance 1 in front of the first block
    exact: str = ""  # "first": two exact sites in the first block, where attention adds most; "all": in every block


class Rate(nn.Module):
    """As a parametrization: steps of AdamW in the parameter behind it are `rate` times as large in the parameter."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, parameter: Tensor) -> Tensor:
        return parameter * self.rate

    def right_inverse(self, parameter: Tensor) -> Tensor:
        return parameter / self.rate


def start_gain(site: nn.Module, start: Start, index: int) -> None:
    depth = math.sqrt(index) if start.by_depth else 1
    nn.init.constant_(site.weight, (site.kappa / site.lam.item()) ** start.power / depth)
    if start.rate != 1:
        nn.utils.parametrize.register_parametrization(site, "weight", Rate(start.rate))
        behind = site.parametrizations.weight.original
        behind.register_hook(lambda gradient: gradient / start.rate)  # what clipping shall see; AdamW sees no scale


def started(start: Start) -> type[Block]:
    class BlockBHyTStarted(Block):
        def __new__(cls, config: ModelConfig, index: int) -> Block:
            exact = start.exact == "all" or (start.exact == "first" and index == 1)
            approximate = BlockBHyTCounted if start.counted else BlockBHyT
            block = (BlockBHyTExact if exact else approximate)(config, index)
            start_gain(block.input_layernorm, start, index)
            start_gain(block.post_attention_layernorm, start, index)
            return block

        @staticmethod
        def make_embedding(config: ModelConfig) -> nn.Embedding:
            return (unit_embedding if start.unit_embedding else Block.make_embedding)(config)

    return BlockBHyTStarted


def unit_embedding(config: ModelConfig) -> nn.Embedding:
    embedding = ScaledEmbedding(config.vocab, config.dim)
    nn.init.constant_(embedding.scale, 1 / EMBEDDING_STD)
    return embedding


class BlockRMSNormEmbedding(BlockRMSNorm):
    """RMSNorm behind embeddings of variance 1."""

    make_embedding = staticmethod(unit_embedding)


class BlockRMSNormSmall(BlockRMSNorm):
    """RMSNorm whose sub-layers read at first what BHyT's read: rows whose root mean square is lam / kappa."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__(config, index)
        nn.init.constant_(self.input_layernorm.weight, LAM_ATTENTION / KAPPA)
        nn.init.constant_(self.post_attention_layernorm.weight, LAM_MLP / KAPPA)


def with_alpha(norm: type[DyT], alpha: float) -> type[Block]:
    """DyT or Derf whose alpha is at first `alpha` at every site."""

    class BlockAlpha(BlockDyT):
        @staticmethod
        def norm_class(dim: int) -> nn.Module:
            return norm(dim, alpha)

        make_final_norm = norm_class

    return BlockAlpha


def frozen(bound: float) -> type[Block]:
    """BHyT with lam / kappa = bound / sqrt(layers) at every site, not learned."""

    class BlockBHyTFrozen(BlockBHyT):
        def __init__(self, config: ModelConfig, index: int) -> None:
            super().__init__(config, index)
            lam = bound * KAPPA / math.sqrt(config.layers)
            self.input_layernorm = bhyt.BHyT(config.dim, lam=lam, kappa=KAPPA, learnable_lam=False)
            self.post_attention_layernorm = bhyt.BHyTApprox(config.dim, lam=lam, kappa=KAPPA, learnable_lam=False)

    return BlockBHyTFrozen


POINTWISE = {"dyt": DyT, "derf": Derf}
STARTS = {
    FIRST_EXACT: Start(exact="first"),
    UNIT: Start(power=1, counted=True),
    BY_DEPTH: Start(power=1, counted=True, by_depth=True),
    "bhyt-small": Start(power=-1, counted=True),
    "bhyt-fast": Start(rate=10),
    "bhyt-embedding": Start(unit_embedding=True),
    "bhyt-unit-fast": Start(power=1, counted=True, rate=10),
    "bhyt-unit-embedding": Start(power=1, counted=True, unit_embedding=True),
    "bhyt-unit-first": Start(power=1, exact="first"),
    "bhyt-unit-exact": Start(power=1, exact="all"),
    "bhyt-by-depth-first": Start(power=1, by_depth=True, exact="first"),
}
CLASSES = {POSITION: BlockBHyTPosition, ONE_VALUE: BlockBHyTOneValue, "rmsnorm-small": BlockRMSNormSmall,
           "rmsnorm-embedding": BlockRMSNormEmbedding,
           **{name: started(start) for name, start in STARTS.items()},
           **{f"{name}-{alpha:g}": with_alpha(norm, alpha) for name, norm in POINTWISE.items() for alpha in ALPHAS}}


def block_of(job: Job) -> type[Block]:
    return frozen(job.bound) if job.bound is not None else (BLOCKS | CLASSES)[job.norm]
