"""The transformer block with two norms, and what its forward is with BHyT sites.

    h = x + attention(attention_norm(x))
    y = h + feed_forward(ffn_norm(h))          or moe in feed_forward's place

A block hands one tensor on to the next block, in the decoder's loop and from one pipeline stage to another. So the add
at its end is not fused into the next block's first site.
"""

import functools
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any, List

import torch
from torch import Tensor

from bhyt.gain import attention_gain, value_weight, whole
from bhyt.modules import offset_of
from bhyt.torchtitan.sites import SecondSite


class ConvertedBlock:
    """In front of a block's class."""

    attention: Any
    attention_norm: Any
    ffn_norm: Any

    def forward(self, x: Tensor, attention_masks: Any, positions: Any = None) -> Tensor:
        """Run attention and feed-forward (or mixture of experts) with the sites in front of them.

        Args:
            x: [batch, length, d], the residual stream.
            attention_masks: as the base's forward takes them.
            positions: as the base's forward takes them.

        Returns:
            The new stream, [batch, length, d].
        """
        y, variance = self.attention_norm(x)
        branch = self.attention(y, attention_masks, positions)
        if self.is_approximate:
            y, h = self.ffn_norm(branch, variance, x)
        else:
            y, h = self.ffn_norm(branch, x)
        out: Tensor = h + _feed_forward(self)(y)
        return out

    @property
    def is_approximate(self) -> bool:
        """Whether the second site is approximate."""
        return isinstance(self.ffn_norm, SecondSite)

    def refresh(self) -> None:
        """Compute the offset of W_V, W_O, lam and, if gains start at kappa / lam, the first gain as they are. Where
        they are sharded, every process must ask.

        Raises:
            RuntimeError: a weight is one process's shard, or not there (meta).
        """
        attention, first = self.attention, self.attention_norm
        gain = attention_gain(
            _values(attention), whole(attention.wo.weight), attention.rope.config.max_seq_len,
            attention.n_heads // attention.n_kv_heads, head_dim=attention.head_dim,
        )  # fmt: skip
        if first.gain_counts:
            gain = gain * whole(first.weight).to(gain).square().mean()
        self.ffn_norm.put_offset(offset_of(gain, first))


def _values(attention: Any) -> Tensor:
    """W_V, all of it."""
    qkv, rows = attention.qkv_linear, attention.n_kv_heads * attention.head_dim
    if hasattr(qkv, "wqkv"):
        weight, rows = whole(qkv.wqkv.weight), rows + (attention.n_heads + attention.n_kv_heads) * attention.head_dim
    else:
        weight = whole(qkv.wv.weight)
    if weight.is_meta or len(weight) != rows:
        state = "is not loaded" if weight.is_meta else f"has {len(weight)} of its {rows} rows here"
        raise RuntimeError(f"model: the projection that computes the values {state}; c is that of all of them")
    if not hasattr(qkv, "wqkv"):
        return weight
    return value_weight(weight, attention.n_heads, attention.n_kv_heads, grouped=True)


def _feed_forward(block: Any) -> Any:
    return block.moe if getattr(block, "moe_enabled", False) else block.feed_forward


def check_block(config: Any) -> None:
    """Whether a block computes what this module opens with.

    It is found out by running its forward with plain functions in the places of its parts.

    Raises:
        ValueError: it computes something else.
    """
    owner, given = type(config)._owner, (object(), object())
    received: List[Any] = []

    def attention(x: Tensor, *args: Any) -> Tensor:
        received.extend(args)
        return x.cos()

    norm1, norm2, mlp, is_dense = torch.tanh, torch.sin, torch.exp, config.moe is None
    parts = SimpleNamespace(attention=attention, attention_norm=norm1, ffn_norm=norm2, moe_enabled=not is_dense)
    setattr(parts, "feed_forward" if is_dense else "moe", mlp)
    x = torch.linspace(-2, 2, 8, dtype=torch.float32, device="cpu").view(1, 2, 4)
    try:
        y = owner.forward(parts, x, *given)
    except Exception as error:
        raise ValueError(f"config: {owner.__name__} could not be probed for its residual adds ({error})") from error
    h = x + norm1(x).cos()
    if tuple(received) != given or not isinstance(y, Tensor) or not torch.allclose(y, h + mlp(norm2(h))):
        raise ValueError(f"config: {owner.__name__} is more than residual adds around attention and MLP; not converted")


@functools.cache
def converted_class(base: Any) -> Any:
    """The class of blocks with sites in front of `base`, with a config of its own as torchtitan wants it."""

    @dataclass(kw_only=True, slots=True)
    class Config(base.Config):
        pass

    Config.__qualname__ = f"BHyT{base.__name__}.Config"
    return type(f"BHyT{base.__name__}", (ConvertedBlock, base), {"Config": Config, "__module__": __name__})


def converted_config(config: Any, **sites: Any) -> Any:
    """The config of a block with these sites in the places of its norms."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return converted_class(type(config)._owner).Config(**{**values, **sites})
