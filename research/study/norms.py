"""The norms that the study compares beside those of the example, each as the block that uses it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretraining import norms
from pretraining.model import Block, Entered, ModelConfig
from pretraining.norms import BlockDyT, BlockPreNorm, BlockRMSNorm, DyT, RMSNorm


class Derf(DyT):
    """y = gamma * erf(alpha * x + s) + beta (arXiv 2512.10938); alpha is 1 in its language models, s is 0 at first."""

    def __init__(self, dim: int, alpha: float = 1.0) -> None:
        super().__init__(dim, alpha)
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.erf(self.alpha * x + self.shift) * self.weight + self.bias


class BlockDerf(BlockDyT):
    norm_class = Derf

    @staticmethod
    def make_final_norm(dim: int) -> nn.Module:
        return Derf(dim)


class BlockPeriLN(BlockRMSNorm):
    """RMSNorm before and after each sub-layer (arXiv 2502.02732)."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__(config, index)
        self.attention_output_layernorm = RMSNorm(config.dim)
        self.mlp_output_layernorm = RMSNorm(config.dim)

    def leave_attention(self, branch: Tensor) -> Tensor:
        return self.attention_output_layernorm(branch)

    def leave_mlp(self, branch: Tensor) -> Tensor:
        return self.mlp_output_layernorm(branch)


class BlockLNS(BlockRMSNorm):
    """LayerNorm-Scaling: the norm's output divided by the root of the block's index (arXiv 2502.05795)."""

    def enter_attention(self, branch: Tensor | None, stream: Tensor) -> Entered:
        y, stream, variance = super().enter_attention(branch, stream)
        return y / math.sqrt(self.index), stream, variance

    def enter_mlp(self, branch: Tensor, stream: Tensor, variance: Tensor | None) -> tuple[Tensor, Tensor]:
        y, stream = super().enter_mlp(branch, stream, variance)
        return y / math.sqrt(self.index), stream


class BlockMixLN(BlockRMSNorm):
    """Mix-LN (arXiv 2412.13795): the first quarter of the blocks normalises behind each residual add (Post-LN), the
    others in front of each sub-layer (Pre-LN).

    A block hands on its last branch before it is added, so the norm behind a Post-LN block's MLP is in the next block:
    for another Post-LN block it is the norm in front of the attention, which the very first block goes without.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__(config, index)
        last = max(1, config.layers // 4)  # of the Post-LN blocks
        self.is_post = index <= last
        self.previous_output_layernorm = RMSNorm(config.dim) if index == last + 1 else nn.Identity()
        if index == 1:
            self.input_layernorm = nn.Identity()

    def enter_attention(self, branch: Tensor | None, stream: Tensor) -> Entered:
        stream = self.previous_output_layernorm(stream if branch is None else stream + branch)
        y = self.input_layernorm(stream)
        return y, y if self.is_post else stream, None

    def enter_mlp(self, branch: Tensor, stream: Tensor, variance: Tensor | None) -> tuple[Tensor, Tensor]:
        y, stream = super().enter_mlp(branch, stream, variance)
        return y, y if self.is_post else stream


class SeeDNorm(nn.Module):
    """y = (tanh(x . beta) * alpha + gamma) * x / rms(x): RMSNorm whose gain depends on the row (arXiv 2510.22777).

    As in the authors' language models gamma and alpha are 1 and beta is 0 at first, and alpha and beta, being
    matrices [1, d], have weight decay.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.rescale = nn.Parameter(torch.ones(1, dim))  # alpha
        self.direction = nn.Parameter(torch.zeros(1, dim))  # beta

    def forward(self, x: Tensor) -> Tensor:
        gain = torch.tanh(F.linear(x, self.direction)) * self.rescale + self.weight
        return gain * F.rms_norm(x, x.shape[-1:], eps=1e-6)


class BlockSeeDNorm(BlockPreNorm):
    norm_class = SeeDNorm

    @staticmethod
    def make_final_norm(dim: int) -> nn.Module:
        return SeeDNorm(dim)


class SingleScaleRMSNorm(nn.Module):
    """y = gamma * x / rms(x) with one gamma for all channels, at first 1: no channel is preferred (arXiv 2506.19697).

    The norm of Outlier-Safe Pre-Training, without the rest of it: Muon, and the projections of the embeddings.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x, x.shape[-1:], eps=1e-6)


class BlockSingleScale(BlockPreNorm):
    norm_class = SingleScaleRMSNorm

    @staticmethod
    def make_final_norm(dim: int) -> nn.Module:
        return SingleScaleRMSNorm(dim)


def compress(x: Tensor) -> Tensor:
    """[.., d] -> [.., d - 1]: centred, and without the last channel, which is minus the sum of the others."""
    return (x - x.mean(-1, keepdim=True))[..., :-1]


class CRMSNorm(nn.Module):
    """LayerNorm of a centred row [.., d] that comes without its last channel: x / sqrt((sum x^2 + (sum x)^2) / d)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[.., d - 1] -> [.., d]."""
        last = -x.sum(-1, keepdim=True)
        mean_square = (x.square().sum(-1, keepdim=True) + last.square()) / (x.shape[-1] + 1)
        y = torch.cat((x, last), -1) * torch.rsqrt(mean_square + 1e-5)  # LayerNorm's eps
        return y * self.weight + self.bias


class CompressedEmbedding(nn.Embedding):
    def forward(self, tokens: Tensor) -> Tensor:
        return compress(super().forward(tokens))


class BlockPreCRMSNorm(BlockPreNorm):
    """Pre-CRMSNorm (arXiv 2305.14858): what is added to the stream is centred, so the stream does without its last
    channel. The same function as LayerNorm's, in training too: they differ in rounding."""

    norm_class = CRMSNorm

    def leave_attention(self, branch: Tensor) -> Tensor:
        return compress(branch)

    def leave_mlp(self, branch: Tensor) -> Tensor:
        return compress(branch)

    @staticmethod
    def make_embedding(config: ModelConfig) -> nn.Embedding:
        return CompressedEmbedding(config.vocab, config.dim)

    @staticmethod
    def make_final_norm(dim: int) -> nn.Module:
        return CRMSNorm(dim)


# All norms of the study.
BLOCKS: dict[str, type[Block]] = norms.BLOCKS | {
    "peri-ln": BlockPeriLN,
    "lns": BlockLNS,
    "derf": BlockDerf,
    "mix-ln": BlockMixLN,
    "seednorm": BlockSeeDNorm,
    "ssnorm": BlockSingleScale,
    "pre-crmsnorm": BlockPreCRMSNorm,
}
