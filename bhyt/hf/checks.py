"""Checks of layers, norms and attentions before a conversion: each is run, or read, to find out what it computes."""

import copy
from typing import Any, Dict, Tuple

import torch
from torch import Tensor, nn

from bhyt.hf.layer import PARTS, argument_names


def check_layer(layer: Any) -> bool:
    """Check that a layer computes the two formulas at the top of layer.py.

    The check runs the layer's forward with four plain functions in the places of its parts. So it notices a scaled
    residual, another order or a changed argument, whatever the name of the class.

    Args:
        layer: a decoder layer.

    Returns:
        Whether the layer returns a tuple.

    Raises:
        ValueError: the layer computes something else, or has further parts.
    """
    name = type(layer).__name__
    more = [part for part, module in layer.named_children() if part not in PARTS and not _does_nothing(module)]
    more += [part for part, _ in layer.named_parameters(recurse=False)]
    if more:
        raise ValueError(f"model: {name} also has {', '.join(more)}; only layers of {', '.join(PARTS)} are converted")
    if "forward" in vars(layer):
        raise ValueError(f"model: the forward of its {name} was replaced; convert before dispatching or wrapping")

    given: Dict[str, Any] = {argument: object() for argument in argument_names(type(layer))}
    received: Dict[str, Any] = {}

    def attention(hidden_states: Tensor, **kwargs: Any) -> Tuple[Tensor, None]:
        received.update(kwargs)
        return hidden_states.cos(), None

    norm1, norm2, mlp = torch.tanh, torch.sin, torch.exp
    parts: Tuple[Any, ...] = (norm1, attention, norm2, mlp)
    probe = copy.copy(layer)
    vars(probe).update(zip(PARTS, parts), training=True, gradient_checkpointing=False)
    x = torch.linspace(-2, 2, 8, dtype=torch.float32, device="cpu").view(1, 2, 4)
    try:
        y = type(layer).forward(probe, x, **given)
    except Exception as error:
        raise ValueError(f"model: {name} could not be probed for its residual adds ({error})") from error
    returned = y[0] if isinstance(y, tuple) else y
    h = x + norm1(x).cos()
    if received != given or not isinstance(returned, Tensor) or not torch.allclose(returned, h + mlp(norm2(h))):
        raise ValueError(f"model: {name} is more than residual adds around attention and MLP; it is not converted")
    return isinstance(y, tuple)


def _does_nothing(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity) or isinstance(module, nn.Dropout) and module.p == 0


def check_norm(norm: Any) -> float:
    """Check that a norm computes weight * x / sqrt(mean(x^2) + eps), by running it with other weights.

    Args:
        norm: a norm of a decoder.

    Returns:
        Its eps.

    Raises:
        ValueError: the norm computes something else. LayerNorm does, and so does a gain that is stored as weight - 1.
    """
    name = type(norm).__name__
    if [parameter for parameter, _ in norm.named_parameters()] != ["weight"]:
        raise ValueError(f"model: {name} has other parameters than a weight; only RMSNorm is converted")
    eps = float(getattr(norm, "variance_epsilon", getattr(norm, "eps", None) or 1e-6))
    d, device = norm.weight.numel(), "cpu" if norm.weight.is_meta else norm.weight.device
    weight = torch.linspace(0.5, 1.5, d, dtype=torch.float32, device=device)
    x = torch.linspace(-2e-3, 1e-3, 2 * d, dtype=torch.float32, device=device).view(2, d)
    try:
        y = torch.func.functional_call(norm, {"weight": weight}, (x,))
    except Exception as error:
        raise ValueError(f"model: {name} could not be run ({error})") from error
    if not torch.allclose(y, weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps), rtol=1e-4, atol=1e-6):
        raise ValueError(f"model: {name} is not weight * x / sqrt(mean(x^2) + {eps:g}); only RMSNorm is converted")
    return eps


def check_attention(attention: Any) -> None:
    """Check that an attention is W_V, a mean over positions and W_O, with nothing between them: c assumes this.

    Args:
        attention: the attention of a decoder layer.

    Raises:
        ValueError: the attention lacks a part, or has others.
    """
    needed, known = ("v_proj", "o_proj", "num_key_value_groups", "head_dim"), ("q_proj", "k_proj", "q_norm", "k_norm")
    wrong = [f"no {name}" for name in needed if not hasattr(attention, name)]
    wrong += [name for name, _ in attention.named_children() if name not in needed + known + ("rotary_emb",)]
    wrong += [name for name, _ in attention.named_parameters(recurse=False)]
    if wrong:
        raise ValueError(
            f"model: {type(attention).__name__} has {', '.join(wrong)}, for which an approximate site's constant is not"
            " known; norm_type='bhytstar' needs none"
        )
