"""Whether the weights of a running model are still those of its offsets.

New weights pass by `LoadsOffsets.load_weights`, offsets with them. A weight that is written as it lies in the engine,
merged and sharded, passes by nothing. Its version counter tells.
"""

from typing import Any, Dict, List, Set, Tuple

from torch import Tensor, nn

from bhyt.modules import BHyTApprox
from bhyt.site import Site

_Note = Tuple[Dict[str, Any], str, Tensor, int]  # a module's parameters or buffers, a name there, tensor and version


def layers_with_offsets(model: nn.Module) -> Dict[int, Any]:
    """The decoder layers whose second site is an approximate one, by number."""
    return {
        int(name.rpartition(".")[2]): layer
        for name, layer in model.named_modules()
        if isinstance(getattr(layer, "post_attention_layernorm", None), BHyTApprox)
    }


class Changes:
    """What has happened to the weights of a model since they were loaded."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._notes: Dict[int, List[_Note]] = {}
        self._sent: Set[str] = set()  # of sites that are loaded as wholes
        self.failed = False  # in the midst of loading

    def knows(self, number: int) -> bool:
        """Whether a layer's offset is in force."""
        return number in self._notes and not self.failed

    def note(self, number: int, layer: Any) -> None:
        """Take a layer's weights for those of its offset.

        A tensor is kept where the engine has put one without memory in its place: the engine puts it back.
        """
        kept = {(id(place), name): tensor for place, name, tensor, _ in self._notes.get(number, ())}
        self._notes[number] = []
        for place, name in _places(layer):
            tensor = kept.get((id(place), name), place[name]) if place[name].is_meta else place[name]
            self._notes[number].append((place, name, tensor, tensor._version))

    def note_all(self) -> None:
        """Take all weights for those of the offsets.

        Raises:
            ValueError: a layer has no offset.
        """
        for number, layer in layers_with_offsets(self._model).items():
            if not layer.post_attention_layernorm.has_variance_offset():
                raise ValueError(f"weights: the variance_offset of layer {number} is not among them")
            self.note(number, layer)

    def sent(self, loaded: Set[str], prefix: str) -> None:
        """Remember what sites have been given while they were without memory: the rest must follow."""
        for name, site in self._model.named_modules():
            if isinstance(site, Site) and any(tensor.is_meta for tensor in _tensors(site).values()):
                self._sent |= {f"{name}.{own}" for own in _tensors(site)} & {n.removeprefix(prefix) for n in loaded}

    def check(self) -> None:
        """
        Raises:
            RuntimeError: a layer's offset, or a site, is not that of the weights.
        """
        if self.failed:
            raise RuntimeError("model: it has been given some of its new weights only; load all of them in one call")
        for notes in self._notes.values():
            for place, name, tensor, version in notes:
                if place.get(name) is not tensor or tensor._version != version:
                    raise RuntimeError(
                        "model: weights of attention have been written as they lie in the engine, and the offsets are"
                        " those of before; load all weights as they are saved"
                    )
        if self._sent:
            for name, site in self._model.named_modules():
                names = {f"{name}.{own}" for own in _tensors(site)} if isinstance(site, Site) else set()
                if self._sent & names and names - self._sent:
                    raise RuntimeError(f"weights: {sorted(names - self._sent)[0]} was not sent with the rest of {name}")
            self._sent.clear()


def _places(layer: Any) -> List[Tuple[Dict[str, Any], str]]:
    """Where the tensors lie of which an offset is computed: those of attention, and of the exact site."""
    modules = [*layer.self_attn.modules(), layer.input_layernorm]
    places = [(module._parameters, name) for module in modules for name in module._parameters]
    places += [(layer.input_layernorm._buffers, name) for name in layer.input_layernorm._buffers]
    return [(place, name) for place, name in places if place[name] is not None]


def _tensors(site: Site) -> Dict[str, Tensor]:
    return {**dict(site.named_parameters()), **dict(site.named_buffers())}
