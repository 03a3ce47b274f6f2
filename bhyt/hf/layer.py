"""The decoder layer with two norms, and what its forward is with BHyT sites.

    h = x + self_attn(input_layernorm(x))
    y = h + mlp(post_attention_layernorm(h))
"""

import functools
import inspect
from typing import Any, Iterator, Tuple

from torch import Tensor, nn

from bhyt.hf.offsets import active_adapters, active_site, update_offset

PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


class ConvertedLayer(nn.Module):
    """Mixed into a decoder layer's class: its forward with both sites, the residual add behind attention fused.

    The variance goes from the first site to the second as a local value: no state, whatever replays the forward.
    """

    input_layernorm: Any
    self_attn: Any
    post_attention_layernorm: Any
    mlp: Any
    config: Any  # has seq_len and use_gamma_var
    approximate: bool  # the second site; a wrapper in its place may hide which it is
    offset_adapters: Any  # those on W_V and W_O for which the offset was computed
    _returns_tuple: bool  # (hidden_states, ...), as transformers before 4.54 do
    _argument_names: Tuple[str, ...]  # of the layer's forward, behind hidden_states

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        kwargs.update(zip(self._argument_names, args))
        if self.approximate:
            self.settle()
            y, variance = self.input_layernorm(hidden_states, return_variance=True)
            branch, weights = self.self_attn(hidden_states=y, **kwargs)[:2]
            y, hidden_states = self.post_attention_layernorm(branch, variance, residual=hidden_states)
        else:
            y = self.input_layernorm(hidden_states)
            branch, weights = self.self_attn(hidden_states=y, **kwargs)[:2]
            y, hidden_states = self.post_attention_layernorm(branch, residual=hidden_states)
        hidden_states = hidden_states + self.mlp(y)
        if not self._returns_tuple:
            return hidden_states
        return (hidden_states, weights) if kwargs.get("output_attentions") else (hidden_states,)

    def refresh(self) -> None:
        """Recompute the approximate site's offset from the weights as they are now."""
        update_offset(self, self.config.seq_len, self.config.use_gamma_var)
        self.offset_adapters = active_adapters(self.self_attn)

    def settle(self) -> None:
        """Refresh an offset that came with no weights, or is that of W_V and W_O with other adapters than are active."""
        site = active_site(self.post_attention_layernorm)
        if self.offset_adapters != active_adapters(self.self_attn) or not site.has_variance_offset():
            self.refresh()

    def __reduce__(self) -> Tuple[Any, ...]:  # the class is made at run time: pickle and deepcopy make it again
        return _empty_layer, (type(self).__mro__[2], self._returns_tuple), self.__dict__


@functools.cache
def converted_class(layer_class: Any, returns_tuple: bool) -> Any:
    """The subclass that takes layer_class's place, of the same name, which wrapping policies look for."""
    attributes = {
        "_argument_names": argument_names(layer_class),
        "_returns_tuple": returns_tuple,
        "__module__": layer_class.__module__,
        "__doc__": layer_class.__doc__,
    }
    return type(layer_class.__name__, (ConvertedLayer, layer_class), attributes)


def _empty_layer(layer_class: Any, returns_tuple: bool) -> Any:
    converted = converted_class(layer_class, returns_tuple)
    return converted.__new__(converted)


def argument_names(layer_class: Any) -> Tuple[str, ...]:
    parameters = inspect.signature(layer_class.forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)[2:]


def decoder_layers(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if all(isinstance(getattr(module, name, None), nn.Module) for name in PARTS):
            yield module
