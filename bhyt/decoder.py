"""The decoder layer with two norms: which layers are one, and what their forward is with BHyT sites.

    h = x + self_attn(input_layernorm(x))
    y = h + mlp(post_attention_layernorm(h))

Known to `bhyt.hf`; needs nothing but torch, so that converted models unpickle without more.
"""

import copy
import functools
import inspect
from typing import Any, Dict, Iterator, Tuple, Type

import torch
from torch import Tensor, nn

from bhyt.modules import BHyTApprox

PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


class ConvertedLayer:
    """Mixed into a decoder layer's class: its forward with both sites, the residual add behind attention fused.

    The variance goes from the first site to the second as a local value: no state, whatever replays the forward.
    """

    _returns_tuple: bool  # (hidden_states, ...), as transformers before 4.54 do
    _argument_names: Tuple[str, ...]  # of the layer's forward, behind hidden_states

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        kwargs.update(zip(self._argument_names, args))
        if isinstance(self.post_attention_layernorm, BHyTApprox):
            y, variance = self.input_layernorm.forward_with_variance(hidden_states)
            branch, weights = self.self_attn(hidden_states=y, **kwargs)[:2]
            y, hidden_states = self.post_attention_layernorm.forward_add(branch, hidden_states, variance)
        else:
            y = self.input_layernorm(hidden_states)
            branch, weights = self.self_attn(hidden_states=y, **kwargs)[:2]
            y, hidden_states = self.post_attention_layernorm.forward_add(branch, hidden_states)
        hidden_states = hidden_states + self.mlp(y)
        if not self._returns_tuple:
            return hidden_states
        return (hidden_states, weights) if kwargs.get("output_attentions") else (hidden_states,)

    def __reduce__(self) -> Tuple[Any, ...]:  # the class is made at run time: pickle and deepcopy make it again
        return _empty_layer, (type(self).__mro__[2], self._returns_tuple), self.__dict__


@functools.cache
def converted_class(layer_class: Type[nn.Module], returns_tuple: bool) -> Type[nn.Module]:
    """The subclass that takes layer_class's place, of the same name, which wrapping policies look for."""
    attributes = {
        "_argument_names": _argument_names(layer_class),
        "_returns_tuple": returns_tuple,
        "__module__": layer_class.__module__,
        "__doc__": layer_class.__doc__,
    }
    return type(layer_class.__name__, (ConvertedLayer, layer_class), attributes)


def _empty_layer(layer_class: Type[nn.Module], returns_tuple: bool) -> nn.Module:
    converted = converted_class(layer_class, returns_tuple)
    return converted.__new__(converted)


def _argument_names(layer_class: Type[nn.Module]) -> Tuple[str, ...]:
    parameters = inspect.signature(layer_class.forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)[2:]


def decoder_layers(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if all(isinstance(getattr(module, name, None), nn.Module) for name in PARTS):
            yield module


def check_layer(layer: nn.Module) -> bool:
    """Whether a layer that computes what this file opens with returns a tuple.

    It is found out by running its forward with four plain functions in the places of its parts, so that a scaled
    residual, another order or a changed argument is noticed, whatever the class is called.

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

    given: Dict[str, Any] = {argument: object() for argument in _argument_names(type(layer))}
    received: Dict[str, Any] = {}

    def attention(hidden_states: Tensor, **kwargs: Any) -> Tuple[Tensor, None]:
        received.update(kwargs)
        return hidden_states.cos(), None

    norm1, norm2, mlp = torch.tanh, torch.sin, torch.exp
    probe = copy.copy(layer)
    vars(probe).update(zip(PARTS, (norm1, attention, norm2, mlp)), training=True)
    x = torch.linspace(-2, 2, 8).view(1, 2, 4)
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


def check_norm(norm: nn.Module) -> float:
    """eps of a norm that computes weight * x / sqrt(mean(x^2) + eps), seen by running it on other weights.

    Raises:
        ValueError: it computes something else: LayerNorm, a gain stored as weight - 1.
    """
    name = type(norm).__name__
    if [parameter for parameter, _ in norm.named_parameters()] != ["weight"]:
        raise ValueError(f"model: {name} has other parameters than a weight; only RMSNorm is converted")
    eps = float(getattr(norm, "variance_epsilon", getattr(norm, "eps", None) or 1e-6))
    device = "cpu" if norm.weight.is_meta else norm.weight.device
    weight, x = torch.linspace(0.5, 1.5, norm.weight.numel()), torch.linspace(-2e-3, 1e-3, 2 * norm.weight.numel())
    weight, x = weight.to(device), x.view(2, -1).to(device)
    try:
        y = torch.func.functional_call(norm, {"weight": weight}, (x,))
    except Exception as error:
        raise ValueError(f"model: {name} could not be run ({error})") from error
    if not torch.allclose(y, weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps), rtol=1e-4, atol=1e-6):
        raise ValueError(f"model: {name} is not weight * x / sqrt(mean(x^2) + {eps:g}); only RMSNorm is converted")
    return eps
