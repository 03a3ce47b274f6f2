"""The sources from which the variance offset of a layer was computed, and whether the layer still has them.

Tensors are told apart by identity, version counter and memory; modules by identity; PEFT's adapters by name and
scaling. A look costs about a microsecond for plain linears, some more for adapters. A weak reference to a storage tells
that its memory has been freed, and may belong to another tensor now. There is no weak reference to a tensor, since
`torch.utils.swap_tensors` refuses tensors that have one.
"""

import weakref
from operator import itemgetter
from typing import Any, Callable, Dict, Hashable, Iterator, List, Tuple, Union

from torch import Tensor, nn

from bhyt.hf.projections import active_adapters, active_site

_Place = Tuple[Dict[str, Any], str]  # the dictionary in which a module keeps a tensor, and the tensor's name


class Sources:
    """The tensors, modules and adapters behind the offset of one layer.

    Args:
        layer: the decoder layer.

    Attributes:
        second: the site that has the offset.
        adapters: PEFT's active and merged adapters, and the sites that are active with them; empty without PEFT.
        wrapped: PEFT's modules among projections and norms.
        absent: whether a tensor is not here: offloaded, or not loaded yet.
    """

    def __init__(self, layer: Any) -> None:
        self._attention, self._norms = layer.self_attn, (layer.input_layernorm, layer.post_attention_layernorm)
        projections = (self._attention.v_proj, self._attention.o_proj)
        self.second = active_site(layer.post_attention_layernorm)
        self.wrapped = [module for module in (*projections, *self._norms) if hasattr(module, "disable_adapters")]
        self.adapters = self._adapters()

        self._children = [_children(layer, "self_attn", "input_layernorm", "post_attention_layernorm")]
        for name in ("v_proj", "o_proj"):
            self._children += [_children(m, name) for m in self._attention.modules() if name in m._modules]
        for module in (module for wrapper in self.wrapped for module in wrapper.modules()):
            if module._modules:
                self._children.append(_children(module, *module._modules))

        self._tensors: List[Tuple[Dict[str, Any], str, int, int, int, Any]] = []
        self._others: List[Union[_Other, _Scaling]] = []
        self.absent = False
        first = active_site(layer.input_layernorm)
        places = [*_places(projections), *_places_of_first(first, layer.config.use_gamma_var)]
        for place, name in places:
            self._note(place, name, place[name])
        for module in self.wrapped:
            if isinstance(getattr(module, "scaling", None), dict):
                self._others.append(_Scaling(module.scaling))

    def _note(self, place: Dict[str, Any], name: str, tensor: Tensor) -> None:
        self.absent = self.absent or tensor.is_meta
        if type(tensor) in (Tensor, nn.Parameter) and not tensor.is_inference():
            self._tensors.append((place, name, id(tensor), tensor._version, tensor.data_ptr(), _memory(tensor)))
        else:
            self._others.append(_Other(place, name))

    def _adapters(self) -> Tuple[Hashable, ...]:
        if not self.wrapped:
            return ()
        sites = tuple(id(active_site(norm)) for norm in self._norms)
        return (*active_adapters(self._attention), *sites)

    def same_modules(self) -> bool:
        """Whether the modules of the weights are the same as before."""
        try:
            for children, pick, before in self._children:
                if pick(children) != before:
                    return False
        except KeyError:
            return False
        return True

    def same_adapters(self) -> bool:
        """Whether the active adapters and their scalings are the same as before."""
        return not self.wrapped or self.adapters == self._adapters()

    def same_tensors(self) -> bool:
        """Whether the tensors are the same as before, and have not been written to."""
        try:
            for place, name, identity, version, address, memory in self._tensors:
                now = place[name]
                if id(now) != identity or now._version != version or now.data_ptr() != address or memory() is None:
                    return False
        except (KeyError, AttributeError, RuntimeError):  # a tensor is gone, None, or without a version
            return False
        for other in self._others:
            if not other.is_same():
                return False
        return True


class _Other:
    """A tensor that has no address, such as a quantised or sharded one, or no version counter."""

    def __init__(self, place: Dict[str, Any], name: str) -> None:
        tensor = place[name]
        self._place, self._name, self._identity = place, name, id(tensor)
        self._version, self._memory = _version(tensor), _memory(tensor)
        self._sharded = tensor if hasattr(tensor, "full_tensor") else None

    def is_same(self) -> bool:
        # FSDP2 puts another tensor in a sharded one's place while the layer runs, so the sharded one is looked at.
        now = self._place.get(self._name) if self._sharded is None else self._sharded
        if now is None or id(now) != self._identity or self._memory() is None:
            return False
        return _version(now) == self._version


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _memory(tensor: Any) -> Any:
    """A weak reference to the storage of a tensor, or of the first one within it."""
    while hasattr(tensor, "__tensor_flatten__"):
        tensor = getattr(tensor, tensor.__tensor_flatten__()[0][0])
    return weakref.ref(tensor.untyped_storage())


class _Scaling:
    """The factors of a layer's adapters: numbers, or tensors of one element."""

    def __init__(self, factors: Dict[str, Any]) -> None:
        self._factors = factors
        self._before = self._now()

    def _now(self) -> Dict[str, Any]:
        return {name: (id(f), f._version) if isinstance(f, Tensor) else f for name, f in self._factors.items()}

    def is_same(self) -> bool:
        return self._now() == self._before


def _children(module: nn.Module, *names: str) -> Tuple[Dict[str, Any], Callable[[Any], Any], Any]:
    """(the dictionary of a module's children, how to pick these, what it picks now)."""
    pick = itemgetter(*names)
    return module._modules, pick, pick(module._modules)


def _places(projections: Tuple[Any, ...]) -> Iterator[_Place]:
    for projection in projections:
        if type(projection) is nn.Linear and projection._parameters.get("weight") is not None:
            yield projection._parameters, "weight"
            continue
        for module in projection.modules():
            for tensors in (module._parameters, module._buffers):
                yield from ((tensors, name) for name, tensor in tensors.items() if tensor is not None)


def _places_of_first(site: Any, with_gain: bool) -> Iterator[_Place]:
    for tensors in (site._parameters, site._buffers):
        for name in ("lam", "weight") if with_gain else ("lam",):
            if tensors.get(name) is not None:
                yield tensors, name
