"""Whether a decoder layer of vLLM's own computes what the layer of transformers does.

vLLM's decoders pass over fields of a config that they do not know, and take some that transformers passes over. So
layers are compared, not fields: their weights, the width of a head, the window, the angles of positions.
"""

from typing import Any, Dict, Set

import torch
from torch import Tensor, nn

_ONE_WINDOW = ("mistral", "mixtral", "phi3")  # that have it in the mask, for all layers
_POSITIONS = 64  # that are compared
_OF_VLLM = ("logit_scale", "llama_4_scaling", "ada_rms_norm_t_cond", "dual_chunk_attention_config")
_INSTEAD = """; serve it in vLLM's transformers backend, by hf_overrides={"architectures": ["BHyTForCausalLM"]}"""


def check_fields(config: Any) -> None:
    """Refuse fields that vLLM's decoders take, and transformers does not.

    Raises:
        ValueError: there is one.
    """
    for name in _OF_VLLM:
        if getattr(config, name, None):
            raise ValueError(f"model: {name} in its config, of which transformers makes nothing{_INSTEAD}")


def check_layer(layer: Any, own: Any, rotary: Any, packed: Dict[str, Any]) -> None:
    """Refuse a layer that would be another one in vLLM.

    Args:
        layer: vLLM's, before it has sites.
        own: that of transformers.
        rotary: the module of transformers that computes the angles of positions.
        packed: a merged linear of vLLM's -> the linears that it holds.

    Raises:
        ValueError: they differ.
    """
    attention, theirs = layer.self_attn, own.self_attn
    merged = {part: whole for whole, parts in packed.items() for part in parts}
    here, there = _names(layer, {}), _names(own, merged)
    if here != there:
        name = min(here ^ there)
        raise ValueError(
            f"model: {name} is in {'transformers' if name in there else 'vLLM'}' layers alone{_INSTEAD}"
        )
    check_window(attention, theirs, own.config, _INSTEAD)
    for name in ("head_dim", "scaling"):
        value, expected = getattr(attention, name), getattr(theirs, name)
        if value != expected:
            raise ValueError(f"model: vLLM's own decoder has {name} {value}, transformers {expected}{_INSTEAD}")
    if not _same_angles(getattr(attention.rotary_emb, "cos_sin_cache", None), rotary):
        raise ValueError(f"model: vLLM's own decoder differs in rope_parameters {own.config.rope_parameters}{_INSTEAD}")


def check_window(attention: Any, theirs: Any, config: Any, instead: str = "") -> None:
    """Refuse another sliding window than that of transformers.

    Args:
        attention: vLLM's, or that of transformers with vLLM's within.
        theirs: that of transformers.
        config: the model's.
        instead: what to do, for the message.

    Raises:
        ValueError: they differ.
    """
    expected = getattr(theirs, "sliding_window", None)
    if config.model_type.removeprefix("bhyt_") in _ONE_WINDOW:
        expected = config.sliding_window
    window = attention.attn.sliding_window
    if window != expected:
        raise ValueError(f"model: vLLM has sliding_window {window} in a layer, transformers {expected}{instead}")


def _names(layer: nn.Module, merged: Dict[str, str]) -> Set[str]:
    """The names of a layer's parameters but those of its norms, by vLLM's names for linears."""
    found = set()
    for name, _ in layer.named_parameters():
        *path, module, tensor = name.split(".")
        if path:
            found.add(".".join([*path, merged.get(module, module), tensor]))
    return found


def _same_angles(table: Any, rotary: Any) -> bool:
    """Whether vLLM's table of cosines and sines, if there is one, is what transformers computes, within rounding."""
    if table is None:
        return True
    positions = torch.arange(min(_POSITIONS, len(table)), device=table.device)
    expected = rotary(torch.empty(0, device=table.device), positions[None])
    halves: Any = table[: len(positions)].float().chunk(2, dim=-1)
    return all(_close(half, own[0].chunk(2, dim=-1)[0]) for half, own in zip(halves, expected))


def _close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).abs().max() <= 0.01)
