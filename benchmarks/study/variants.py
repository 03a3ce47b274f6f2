"""The blocks that the study adds to the example's seven: BHyT whose first block is exact, whose offset knows the
position or takes all values for one, or whose lambda is frozen."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import bhyt
from jobs import FIRST_EXACT, ONE_VALUE, POSITION, Job
from pretraining.model import Block, ModelConfig
from pretraining.norms import BLOCKS, KAPPA, BlockBHyT, BlockBHyTExact


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


class BlockBHyTOneValue(BlockBHyT):
    """If the values of all tokens were the same, their mean would have the variance of one: c for T = 1."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__(config, index)
        self.seq_len = 1


class BlockBHyTFirstExact(Block):
    """In the first block the attention adds far more variance than the embeddings have: two exact sites there."""

    def __new__(cls, config: ModelConfig, index: int) -> Block:
        return (BlockBHyTExact if index == 1 else BlockBHyT)(config, index)


def frozen(bound: float) -> type[Block]:
    """BHyT with lam / kappa = bound / sqrt(layers) at every site, not learned."""

    class BlockBHyTFrozen(BlockBHyT):
        def __init__(self, config: ModelConfig, index: int) -> None:
            super().__init__(config, index)
            lam = bound * KAPPA / math.sqrt(config.layers)
            self.input_layernorm = bhyt.BHyT(config.dim, lam=lam, kappa=KAPPA, learnable_lam=False)
            self.post_attention_layernorm = bhyt.BHyTApprox(config.dim, lam=lam, kappa=KAPPA, learnable_lam=False)

    return BlockBHyTFrozen


CLASSES = {FIRST_EXACT: BlockBHyTFirstExact, POSITION: BlockBHyTPosition, ONE_VALUE: BlockBHyTOneValue}


def block_of(job: Job) -> type[Block]:
    return frozen(job.bound) if job.bound is not None else (BLOCKS | CLASSES)[job.norm]
