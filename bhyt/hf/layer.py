"""The decoder layer with two norms, and its forward with BHyT sites.

    h = x + self_attn(input_layernorm(x))
    y = h + mlp(post_attention_layernorm(h))
"""

import inspect
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

import torch
from torch import Tensor, nn

from bhyt.hf.offsets import LayerOffset
from bhyt.hf.projections import active_adapters, active_site

_LAYERS: Dict[Any, Any] = {}  # a layer class of transformers -> the class in front of it
PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


class ConvertedLayer(nn.Module):
    """In front of a decoder layer's class: its forward with both sites, the residual add behind attention fused.

    The variance goes from the first site to the second as a local value: no state, whatever replays the forward.
    """

    input_layernorm: Any
    self_attn: Any
    post_attention_layernorm: Any
    mlp: Any
    config: Any  # has seq_len and use_gamma_var
    approximate: bool  # whether the second site is approximate: a wrapper in its place may hide it
    offset_adapters: Tuple[Any, ...] = ()  # the adapters on W_V and W_O for which the offset was computed
    _offset: LayerOffset
    returns_tuple: bool  # (hidden_states, ...), as transformers before 4.54 do
    _argument_names: Tuple[str, ...]  # the arguments of the layer's forward, behind hidden_states

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if ConvertedLayer in cls.__bases__:  # not for the classes that FSDP2 derives
            base = cls.__bases__[-1]
            _LAYERS[base], cls._argument_names = cls, argument_names(base)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run attention and MLP with the sites in front of them.

        Args:
            hidden_states: [batch, length, d], the residual stream.
            *args: as the base's forward takes them.
            **kwargs: as the base's forward takes them.

        Returns:
            The new stream [batch, length, d], or a tuple that begins with it, as the base returns it.
        """
        kwargs.update(zip(self._argument_names, args))
        if self.approximate:
            more = None
            if not torch.compiler.is_compiling():  # a compiled graph does not look at the tensors
                more = self.offset.settle(self)
            elif self.offset_adapters != active_adapters(self.self_attn):
                more = _settle_outside(self)
            y, variance = self.input_layernorm(hidden_states, return_variance=True)
            if more is not None:
                variance = variance + more
            branch, weights = self.self_attn(hidden_states=y, **kwargs)[:2]
            y, hidden_states = self.post_attention_layernorm(branch, variance, residual=hidden_states)
        else:
            y = self.input_layernorm(hidden_states)
            branch, weights = self.self_attn(hidden_states=y, **kwargs)[:2]
            y, hidden_states = self.post_attention_layernorm(branch, residual=hidden_states)
        hidden_states = hidden_states + self.mlp(y)
        if not self.returns_tuple:
            return hidden_states
        return (hidden_states, weights) if kwargs.get("output_attentions") else (hidden_states,)

    @property
    def offset(self) -> LayerOffset:
        """The owner of the approximate site's offset."""
        if "_offset" not in self.__dict__:
            self.__dict__["_offset"] = LayerOffset()
        return self._offset

    def settle(self) -> None:
        """Compute the offset if it is missing or does not belong to the weights, and the weights are here."""
        if self.approximate and not any(p.is_meta for p in self.self_attn.parameters()):
            self.offset.settle(self)

    def train(self, mode: bool = True) -> "ConvertedLayer":
        """Do what `nn.Module.train` does. The next call in eval mode looks at the weights.

        Args:
            mode: False for eval mode.

        Returns:
            The layer.
        """
        super().train(mode)
        if self.approximate:
            self.offset.look()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ConvertedLayer":
        known = self.offset.is_fresh()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.approximate:
            self.offset.trust(self, known)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.approximate:
            self.offset.doubt()  # PEFT's hot swap asks for a state dict, then writes
        if self.approximate and not active_site(self.post_attention_layernorm).has_variance_offset():
            if all(type(p) is nn.Parameter for p in self.self_attn.parameters()):  # a sharded one needs every process
                self.settle()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def __setstate__(self, state: Dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.approximate:
            self.offset.trust(self, self.offset.is_fresh())


def after_loading(layer: ConvertedLayer, incompatible_keys: Any) -> None:
    """A hook behind load_state_dict: an offset that came with weights belongs to them.

    Args:
        layer: the layer that was loaded.
        incompatible_keys: torch's, not used.
    """
    if not layer.approximate:
        return
    if active_site(layer.post_attention_layernorm).offset_given:
        layer.offset.trust(layer)
    else:
        layer.offset.look()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _settle_outside(layer: ConvertedLayer) -> Optional[Tensor]:
    """Leaves a compiled graph, since the active adapters are not those of the offset."""
    return layer.offset.settle(layer)


def layer_class(base: Any) -> Any:
    """The class of a converted layer. It has the name of its base, since wrapping policies go by names.

    Args:
        base: a layer class of transformers.

    Returns:
        The family's class in front of `base`, or a class made now.
    """
    return _LAYERS.get(base) or type(base.__name__, (ConvertedLayer, base), {})


def argument_names(layer_class: Any) -> Tuple[str, ...]:
    """The arguments of a layer's forward behind hidden_states.

    Args:
        layer_class: a layer class of transformers.

    Returns:
        Their names, in order.
    """
    parameters = inspect.signature(layer_class.forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)[2:]


def decoder_layers(model: nn.Module) -> Iterator[Any]:
    """The modules of a model that have the four parts of a decoder layer.

    Args:
        model: any model.

    Yields:
        Each layer, in the model's order.
    """
    for module in model.modules():
        if all(isinstance(getattr(module, name, None), nn.Module) for name in PARTS):
            yield module
