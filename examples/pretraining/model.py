"""A Llama-like decoder: rotary positions, grouped-query attention, SwiGLU, tied embeddings.

Between blocks the residual stream travels as a pair (branch, stream): the output of the last sub-layer, not
yet added, and the stream that it belongs to. Whoever normalises next also does the add, so that one fused
kernel can do both. What a normalisation site *is* belongs to the subclasses of `Block` in norms.py.

Shapes: B sequences, T tokens, d = dim, H query heads, K key/value heads, h = d / H.
"""

from dataclasses import dataclass
from typing import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EMBEDDING_STD = 0.02

Entered = tuple[Tensor, Tensor, Tensor | None]  # y, stream, variance


@dataclass(frozen=True)
class ModelConfig:
    vocab: int
    layers: int
    dim: int
    heads: int
    kv_heads: int
    seq_len: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.dim % (2 * self.heads):
            raise ValueError(f"dim must be a multiple of 2 * heads = {2 * self.heads}, got {self.dim}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads = {self.kv_heads}, got {self.heads}")

    @property
    def mlp_dim(self) -> int:
        """8/3 d, rounded up to a multiple of 32: three SwiGLU matrices weigh what two 4 d matrices would."""
        return -(-8 * self.dim // (3 * 32)) * 32


class Rotary(nn.Module):
    """Cosines and sines of angles that grow with the position; one frequency per pair of a head's channels."""

    def __init__(self, head_dim: int, seq_len: int, base: float = 10_000.0) -> None:
        super().__init__()
        frequency = base ** (-torch.arange(0, head_dim, 2).float() / head_dim)
        angle = torch.outer(torch.arange(seq_len).float(), frequency)
        self.register_buffer("cos", angle.cos(), persistent=False)  # [T, h/2]
        self.register_buffer("sin", angle.sin(), persistent=False)  # [T, h/2]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [B, T, d] -> (cos, sin), [T, h/2] each, in x's dtype."""
        return self.cos[: x.shape[-2]].to(x.dtype), self.sin[: x.shape[-2]].to(x.dtype)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates the pairs (x_i, x_{i + h/2}) of each head. x: [B, heads, T, h] -> the same shape."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Causal self-attention in which each of K key/value heads serves H / K query heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.head_dim = config.dim // config.heads
        self.q_proj = nn.Linear(config.dim, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """x: [B, T, d] -> [B, T, d]."""
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(
            rotate(q, rotary), rotate(k, rotary), v, is_causal=True, enable_gqa=True
        )
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))


class SwiGLU(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.mlp_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.mlp_dim, bias=False)
        self.down_proj = nn.Linear(config.mlp_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, T, d] -> [B, T, d]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and MLP, each behind a normalisation site that also does the pending residual add.

    Subclasses give the two sites, `enter_attention` and `enter_mlp`; the rest are defaults that few change.
    The variance is what a first site hands to the second; most norms hand over None.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        """index counts the blocks from 1."""
        super().__init__()
        self.index = index
        self.seq_len = config.seq_len
        self.self_attn = Attention(config)
        self.mlp = SwiGLU(config)

    def forward(
        self, branch: Tensor | None, stream: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """branch, stream: [B, T, d] -> the next (branch, stream); the first block gets None as its branch."""
        y, stream, variance = self.enter_attention(branch, stream)
        branch = self.leave_attention(self.self_attn(y, rotary))
        y, stream = self.enter_mlp(branch, stream, variance)
        branch = self.leave_mlp(self.mlp(y))
        return branch, stream

    def enter_attention(self, branch: Tensor | None, stream: Tensor) -> Entered:
        """-> (the attention's input, stream + branch, variance)."""
        raise NotImplementedError

    def enter_mlp(self, branch: Tensor, stream: Tensor, variance: Tensor | None) -> tuple[Tensor, Tensor]:
        """-> (the MLP's input, stream + branch)."""
        raise NotImplementedError

    def leave_attention(self, branch: Tensor) -> Tensor:
        return branch

    def leave_mlp(self, branch: Tensor) -> Tensor:
        return branch

    def refresh(self) -> None:
        """Recomputes what the sites derive from weights; called outside the forward, every so many steps."""

    @staticmethod
    def make_embedding(config: ModelConfig) -> nn.Embedding:
        return nn.Embedding(config.vocab, config.dim)

    @staticmethod
    def make_final_norm(dim: int) -> nn.Module:
        return nn.RMSNorm(dim, eps=1e-6)


class Decoder(nn.Module):
    """Token ids to next-token logits. Submodules are named as in Llama checkpoints."""

    def __init__(self, config: ModelConfig, block_class: type[Block]) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = block_class.make_embedding(config)
        self.rotary = Rotary(config.dim // config.heads, config.seq_len)
        self.layers = nn.ModuleList(block_class(config, index) for index in range(1, config.layers + 1))
        self.norm = block_class.make_final_norm(config.dim)
        self.lm_head = nn.Linear(config.dim, config.vocab, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        self._reset_matrices()
        self.refresh()

    def _reset_matrices(self) -> None:
        """1/sqrt(fan_in): the usual 0.02 at a width of 2500, and enough signal for narrow models too.

        Norms draw no random numbers, so models that differ only in their norm start from the same matrices.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear) and module is not self.lm_head:
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        nn.init.normal_(self.embed_tokens.weight, std=EMBEDDING_STD)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: [B, T] int64 -> logits [B, T, vocab]."""
        stream = self.embed_tokens(tokens)
        rotary = self.rotary(stream)
        branch: Tensor | None = None
        for layer in self.layers:
            branch, stream = layer(branch, stream, rotary)
        return self.lm_head(self.norm(stream if branch is None else stream + branch))

    def refresh(self) -> None:
        for layer in self.layers:
            layer.refresh()

    @torch.no_grad()
    def depth_profile(self, tokens: Tensor) -> Iterator[tuple[float, float]]:
        """(mean |x|, variance over the d channels, averaged over tokens) of the residual stream x:
        of the embeddings first, then behind each block."""
        branch, stream = None, self.embed_tokens(tokens)
        rotary = self.rotary(stream)
        yield _magnitude_and_variance(stream)
        for layer in self.layers:
            branch, stream = layer(branch, stream, rotary)
            yield _magnitude_and_variance(stream + branch)


def _magnitude_and_variance(x: Tensor) -> tuple[float, float]:
    x = x.float()
    return x.abs().mean().item(), x.var(dim=-1, correction=0).mean().item()
