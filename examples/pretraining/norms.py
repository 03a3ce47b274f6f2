"""Twelve norms, each as the block that uses it. `BlockBHyT` is the one to read first."""

import math
from typing import Callable

import torch
import torch.nn.functional as F
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
            attention.v_proj.weight, attention.o_proj.weight, self.seq_len,
            attention.heads // attention.kv_heads, head_dim=attention.head_dim,
        )
        self.post_attention_layernorm.update_variance_offset(gain, self.input_layernorm)

    def get_extra_state(self) -> Tensor:
        """The layer's own state dict leaves the offset out, since the weights give it. But a resumed run no
        longer has the weights of the last refresh, and shall have the same bits: so this saves the offset.
        """
        return self.post_attention_layernorm.variance_offset

    def set_extra_state(self, offset: Tensor) -> None:
        self.post_attention_layernorm.set_variance_offset(offset)


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


BLOCKS: dict[str, type[Block]] = {
    "bhyt": BlockBHyT,
    "bhyt-exact": BlockBHyTExact,
    "rmsnorm": BlockRMSNorm,
    "layernorm": BlockLayerNorm,
    "dyt": BlockDyT,
    "peri-ln": BlockPeriLN,
    "lns": BlockLNS,
    "derf": BlockDerf,
    "mix-ln": BlockMixLN,
    "seednorm": BlockSeeDNorm,
    "ssnorm": BlockSingleScale,
    "pre-crmsnorm": BlockPreCRMSNorm,
}
