"""Offsets of a model that an engine runs: they come with the weights, or are computed from them as they pass by.

An engine merges q, k and v, shards them, and packs them as its kernels like them: an offset cannot be computed from
what is in the model then. It is computed from what passes by, and passes by behind it: the engine loads it as it loads
what is in a file. Whatever is in doubt is an error of one line.
"""

import re
from typing import Any, Callable, Dict, Iterable, Iterator, Optional, Set, Tuple

import torch
from torch import Tensor, nn

from bhyt.gain import attention_gain
from bhyt.hf.layer import ConvertedLayer
from bhyt.hf.offsets import LayerOffset
from bhyt.modules import BHyT, BHyTApprox
from bhyt.vllm.changes import Changes, layers_with_offsets

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_OFFSET, _LAM, _GAIN = "post_attention_layernorm.variance_offset", "input_layernorm.lam", "input_layernorm.weight"
_V, _O = "self_attn.v_proj.weight", "self_attn.o_proj.weight"
Weights = Iterable[Tuple[str, Tensor]]

# an argument of vLLM's -> what it would do to a model that has variance offsets
_REFUSED = {
    "enable_lora": "an adapter on v_proj or o_proj has offsets of its own, and would be run with its base's; merge it"
    " (PEFT's merge_and_unload), save the model and serve that, or train with norm_type='bhytstar'",
    "quantization": "offsets are those of the weights before it; serve the model as it is, or train with"
    " norm_type='bhytstar'",
    "load_format": "'dummy' makes offsets up; load a saved model, and send new weights to that",
    "weight_transfer_config": "this backend writes weights as they lie in the engine, past the offsets; take one of"
    " nccl, ipc, sparse_nccl, or train with norm_type='bhytstar'",
}
_TRANSFERS = ("nccl", "ipc", "sparse_nccl")  # that send weights through load_weights


def check_config(vllm_config: Any) -> None:
    """Refuse what would be computed wrong."""
    config, transfer = vllm_config.model_config.hf_config, vllm_config.weight_transfer_config
    asked = {
        "enable_lora": vllm_config.lora_config is not None,
        "quantization": vllm_config.quant_config is not None,
        "load_format": vllm_config.load_config.load_format == "dummy",
        "weight_transfer_config": transfer is not None and transfer.backend not in _TRANSFERS,
    }
    if getattr(config, "bhyt_quantization", None):
        raise ValueError("model: 8-bit linears of bhyt.quantization are not served; serve the model that was quantised")
    if config.norm_type != "bhytstar" and config.var_approx_exact_layers < config.num_hidden_layers:
        for name in asked:
            if asked[name]:
                raise ValueError(f"{name}: {_REFUSED[name]}")


class LoadedOffset(LayerOffset):
    """An offset that stays as it was loaded."""

    def settle(self, layer: Any) -> Optional[Tensor]:
        """Do nothing: there is nothing to look at."""
        return None

    def refresh(self, layer: Any) -> None:
        """Refuse.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("model: it is served, with the offsets that it was loaded with; load all weights anew")


def keep_loaded(model: nn.Module) -> None:
    """From here on nothing looks at W_V and W_O."""
    for layer in model.modules():
        if isinstance(layer, ConvertedLayer):
            layer.__dict__["_offset"] = LoadedOffset()


class LoadsOffsets:
    """In front of a class of vLLM's that loads weights, and runs with them."""

    model: Any
    config: Any
    _changes: Optional[Changes] = None
    _looked = _loading = False

    def load_weights(self, weights: Weights) -> Set[str]:
        """As vLLM's. Offsets that do not come with the weights are computed from them; see `Loading.watch`."""
        return self.load_by(super().load_weights, weights, prefix="model.")  # type: ignore[misc]

    def load_by(self, load: Callable[[Weights], Set[str]], weights: Weights, prefix: str) -> Set[str]:
        """Load by a function of vLLM's, with offsets, unless a call of this kind is at work and sees to them.

        Args:
            load: returns the names of what it has put into the model.
            weights: what it is given.
            prefix: what it has in front of the names within `model`.

        Returns:
            What load returns.
        """
        if self._loading:
            return load(weights)
        loading, changes = Loading(self.model, self.changes), self.changes
        self._loading = changes.failed = True
        try:
            loaded = load(loading.watch(weights))
        finally:
            self._loading = False
        loading.finish(loaded, prefix)
        changes.failed = False
        return loaded

    @property
    def changes(self) -> Changes:
        """What has happened to the weights."""
        if self._changes is None:
            self._changes = Changes(self.model)
        return self._changes

    def train(self, mode: bool = True) -> Any:
        """As `nn.Module.train`. vLLM's loaders end with `eval`, behind all that is done to weights."""
        super().train(mode)  # type: ignore[misc]
        self.changes.note_all()
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's.

        Raises:
            RuntimeError: the offsets are not those of the weights.
        """
        self.changes.check()
        self._looked = True
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def compute_logits(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's; where a graph was run in place of the model, this looks at the weights."""
        if not self._looked:
            self.changes.check()
        self._looked = False
        return super().compute_logits(*args, **kwargs)  # type: ignore[misc]


class Loading:
    """One pass of weights into a model: `watch` them, then `finish`."""

    def __init__(self, model: Any, changes: Changes) -> None:
        self._model, self._changes = model, changes
        self._layers = {
            number: _Layer(layer, model.config, changes.knows(number))
            for number, layer in layers_with_offsets(model).items()
        }

    def watch(self, weights: Weights) -> Iterator[Tuple[str, Tensor]]:
        """The weights, then the offsets that are not among them.

        Raises:
            ValueError: neither an offset is there, nor all of what it is computed from. Calls of the model raise then.
        """
        for name, tensor in weights:
            found = re.search(r"\blayers\.(\d+)\.(.+)$", name)
            layer = self._layers.get(int(found[1])) if found else None
            if not found or not layer or layer.see(found[2], tensor, prefix=name[: found.start(2)]):
                yield name, tensor
        for number, layer in self._layers.items():
            yield from layer.missing(number)

    def finish(self, loaded: Set[str], prefix: str) -> None:
        """See to it that every site has its lam, and knows that it has its offset.

        Args:
            loaded: the names of what has been put into the model, each behind prefix.

        Raises:
            ValueError: a frozen lam is missing.
        """
        for number, layer in self._layers.items():
            if layer.offset_passed:
                layer.site.has_variance_offset()  # looks at the buffer, which cannot be done while a graph is captured
                self._changes.note(number, layer.layer)
        self._changes.sent(loaded, prefix)
        for name, site in self._model.named_modules():
            if isinstance(site, (BHyT, BHyTApprox)) and "lam" in site._buffers:  # engines miss parameters, not buffers
                if f"{prefix}{name}.lam" in loaded:
                    vars(site)["lam_is_loaded"] = True
                elif "lam_is_loaded" not in vars(site):
                    raise ValueError(f"weights: {name}.lam is not among them")


class _Layer:
    """What of a layer's weights has passed by."""

    def __init__(self, layer: Any, config: Any, has_offset: bool) -> None:
        self.layer, self._seq_len, self.site = layer, config.seq_len, layer.post_attention_layernorm
        self._has_offset, self._dtype = has_offset, layer.input_layernorm.lam.dtype
        self.offset_passed = False
        self._sources = {_V, _O, _LAM}
        if config.use_gamma_var and layer.input_layernorm.weight is not None:
            self._sources.add(_GAIN)
        self._seen: Set[str] = set()
        self._found: Dict[str, Tensor] = {}
        self._prefix = ""

    def see(self, name: str, tensor: Tensor, prefix: str) -> bool:
        """Whether it is to be loaded."""
        if name == _OFFSET and tensor.isnan().any():  # saved before it was set
            return False
        self._seen.add(name)
        self.offset_passed = self.offset_passed or name == _OFFSET
        if name in self._sources and not self.offset_passed and tensor.dtype in _FLOATS:
            self._prefix = prefix
            self._found[name] = tensor.to(self._dtype, copy=True)  # some loaders use a tensor's memory again
            if name in (_V, _O) and self._found.keys() >= {_V, _O}:  # only c is kept of them
                self._found[_V] = self._found[_O] = self._c(self._found[_V], self._found[_O])
        return True

    def _c(self, v: Tensor, o: Tensor) -> Tensor:
        groups, head_dim = o.shape[1] // v.shape[0], self.layer.self_attn.head_dim
        return attention_gain(v, o, self._seq_len, groups, head_dim=head_dim)

    def missing(self, number: int) -> Iterator[Tuple[str, Tensor]]:
        """The offset, if it has not passed by and is not in force any more.

        Raises:
            ValueError: not all of what it is computed from has passed by, or there is NaN among it.
        """
        if self.offset_passed or self._has_offset and not self._seen & self._sources:
            return
        if self._found.keys() != self._sources:
            raise ValueError(
                f"weights: layers.{number}.{_OFFSET} is not among them, nor are v_proj and o_proj as floating-point"
                " matrices with lam, of which it is computed; load what save_pretrained saves, all of a layer at once"
            )
        c, lam = self._found[_V], self._found[_LAM]
        if _GAIN in self._found:
            c = c * self._found[_GAIN].to(c).square().mean()
        offset = c * (lam.to(c).reshape(()) / self.layer.input_layernorm.kappa).square()
        if not offset >= 0:
            raise ValueError(
                f"weights: NaN in v_proj, o_proj or lam of layer {number}, as a sparse patch has it where nothing"
                " changes; load all of a layer, or its variance_offset with the patch"
            )
        self.offset_passed = True
        yield self._prefix + _OFFSET, offset.reshape(1)
