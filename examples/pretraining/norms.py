"""Norms, each as the block that uses it. `BlockBHyT` is the one to read first."""

import math
from typing import Callable

import torch
from torch import Tensor, nn

import bhyt

from .model import Block, Entered, ModelConfig

# The authors' settings: lambda of a block's first and second site (both learnable), and kappa.
LAM_ATTENTION, LAM_MLP, KAPPA = 2.0, 1.0, 10.0


class BlockBHyT(Block):
    """An exact site in front of the attention, an approximate one in front of the MLP.

    The exact site computes each row's variance, the only reduction in the block. The approximate site takes
    that variance plus a constant for what the attention adds to it, and has nothing to reduce. Both do the
    residual add on the way.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__(config, index)
        self.input_layernorm = bhyt.BHyT(config.dim, lam=LAM_ATTENTION, kappa=KAPPA)
        self.post_attention_layernorm = bhyt.BHyTApprox(config.dim, lam=LAM_MLP, kappa=KAPPA)

    def enter_attention(self, branch: Tensor | None, stream: Tensor) -> Entered:
        if branch is None:
            y, variance = self.input_layernorm.forward_with_variance(stream)
            return y, stream, variance
        return self.input_layernorm.forward_add_with_variance(branch, stream)

    def enter_mlp(self, branch: Tensor, stream: Tensor, variance: Tensor | None) -> tuple[Tensor, Tensor]:
        assert variance is not None  # of the block's own first site
        return self.post_attention_layernorm.forward_add(branch, stream, variance)

    @torch.no_grad()
    def refresh(self) -> None:
        """The constant follows from W_V, W_O and the first lambda. They move slowly: refresh now and then."""
        attention = self.self_attn
        gain = bhyt.attention_gain(
            self.value_weight(), attention.o_proj.weight, self.seq_len,
            attention.heads // attention.kv_heads, head_dim=attention.head_dim,
        )
        self.post_attention_layernorm.update_variance_offset(gain, self.input_layernorm)

    def value_weight(self) -> Tensor:
        """W_V as the constant takes it. The paper leaves the gains out, which start at 1."""
        return self.self_attn.v_proj.weight


class BlockBHyTUnitGains(BlockBHyT):
    """The same with gains that start at kappa / lambda, not at the paper's 1.

    The paper's start hands the sub-layers rows whose root mean square is lambda / kappa, a fifth and a tenth. Here it
    is about 1, as from RMSNorm. The price is the bound: an output is within 5 and 10 at first, not within 1.
    """

    @torch.no_grad()
    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__(config, index)
        self.input_layernorm.weight.fill_(KAPPA / LAM_ATTENTION)
        self.post_attention_layernorm.weight.fill_(KAPPA / LAM_MLP)

    def value_weight(self) -> Tensor:
        """W_V times the gains, which are far from 1."""
        return self.self_attn.v_proj.weight * self.input_layernorm.weight


class BlockBHyTExact(Block):
    """Two exact sites: the paper's BHyT*, one reduction more per block."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__(config, index)
        self.input_layernorm = bhyt.BHyT(config.dim, lam=LAM_ATTENTION, kappa=KAPPA)
        self.post_attention_layernorm = bhyt.BHyT(config.dim, lam=LAM_MLP, kappa=KAPPA)

    def enter_attention(self, branch: Tensor | None, stream: Tensor) -> Entered:
        if branch is None:
            return self.input_layernorm(stream), stream, None
        return *self.input_layernorm.forward_add(branch, stream), None

    def enter_mlp(self, branch: Tensor, stream: Tensor, variance: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.post_attention_layernorm.forward_add(branch, stream)


class BlockPreNorm(Block):
    """The usual pre-norm block around any norm that is a function of one tensor: add, then normalise."""

    norm_class: Callable[[int], nn.Module]

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__(config, index)
        self.input_layernorm = self.norm_class(config.dim)
        self.post_attention_layernorm = self.norm_class(config.dim)

    def enter_attention(self, branch: Tensor | None, stream: Tensor) -> Entered:
        stream = stream if branch is None else stream + branch
        return self.input_layernorm(stream), stream, None

    def enter_mlp(self, branch: Tensor, stream: Tensor, variance: Tensor | None) -> tuple[Tensor, Tensor]:
        stream = stream + branch
        return self.post_attention_layernorm(stream), stream


class RMSNorm(nn.RMSNorm):
    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6)


class BlockRMSNorm(BlockPreNorm):
    norm_class = RMSNorm


class BlockLayerNorm(BlockPreNorm):
    norm_class = nn.LayerNorm

    @staticmethod
    def make_final_norm(dim: int) -> nn.Module:
        return nn.LayerNorm(dim)


class DyT(nn.Module):
    """y = gamma * tanh(alpha * x) + beta: bounded without looking at the row (arXiv 2503.10622).

    The authors' alpha for language models falls with the width: 0.2 in front of the attention and 0.05 elsewhere at
    8192, 0.8 and 0.2 at 4096; their code takes 1 where it is told nothing, and so does this for narrow models.
    """

    def __init__(self, dim: int, alpha: float = 1.0) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), alpha))
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.alpha * x) * self.weight + self.bias


class ScaledEmbedding(nn.Embedding):
    """DyT cannot rescale a row, so its language models learn a scale of the embeddings, at first sqrt(d)."""

    def __init__(self, vocab: int, dim: int) -> None:
        super().__init__(vocab, dim)
        self.scale = nn.Parameter(torch.full((1,), math.sqrt(dim)))

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * self.scale


class BlockDyT(BlockPreNorm):
    norm_class = DyT

    @staticmethod
    def make_embedding(config: ModelConfig) -> nn.Embedding:
        return ScaledEmbedding(config.vocab, config.dim)

    @staticmethod
    def make_final_norm(dim: int) -> nn.Module:
        return DyT(dim)


BLOCKS: dict[str, type[Block]] = {
    "bhyt-unit-gains": BlockBHyTUnitGains,
    "bhyt": BlockBHyT,
    "bhyt-exact": BlockBHyTExact,
    "rmsnorm": BlockRMSNorm,
    "layernorm": BlockLayerNorm,
    "dyt": BlockDyT,
}
