"""Offsets of a model that an engine runs: they come with the weights, or are computed from them as they pass by.

An engine merges q, k and v, shards them, and packs them as its kernels like them: an offset cannot be computed from
what is in the model then. Whatever is in doubt is an error of one line.
"""

import re
from typing import Any, Dict, Iterable, Iterator, Optional, Set, Tuple

import torch
from torch import Tensor, nn

from bhyt.gain import attention_gain
from bhyt.hf.layer import ConvertedLayer
from bhyt.hf.offsets import LayerOffset
from bhyt.modules import BHyT, BHyTApprox, offset_of

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_OFFSET, _V, _O = "post_attention_layernorm.variance_offset", "self_attn.v_proj.weight", "self_attn.o_proj.weight"
Weights = Iterable[Tuple[str, Tensor]]


def check_config(config: Any, lora: bool) -> None:
    """Refuse what would be computed wrong."""
    if getattr(config, "bhyt_quantization", None):
        raise ValueError("model: 8-bit linears of bhyt.quantization are not served; serve the model that was quantised")
    exact = config.norm_type == "bhytstar" or config.var_approx_exact_layers >= config.num_hidden_layers
    if lora and not exact:
        raise ValueError(
            "enable_lora: an adapter on v_proj or o_proj has variance offsets of its own, and would be run with its"
            " base's; merge it (PEFT's merge_and_unload), save the model and serve that, or train with"
            " norm_type='bhytstar'"
        )


class LoadedOffset(LayerOffset):
    """An offset that stays as it was loaded."""

    def settle(self, layer: Any) -> Optional[Tensor]:
        return None

    def refresh(self, layer: Any) -> None:
        raise RuntimeError("model: it is served, with the offsets that it was loaded with; load all weights anew")


def keep_loaded(model: nn.Module) -> None:
    """From here on nothing looks at W_V and W_O."""
    for layer in model.modules():
        if isinstance(layer, ConvertedLayer):
            layer.__dict__["_offset"] = LoadedOffset()


class Loading:
    """One pass of weights into a model: `watch` them, then `finish`."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._layers = {
            int(name.rpartition(".")[2]): _Layer(layer)
            for name, layer in model.named_modules()
            if isinstance(layer, ConvertedLayer) and layer.approximate
        }

    def watch(self, weights: Weights) -> Iterator[Tuple[str, Tensor]]:
        for name, tensor in weights:
            found = re.search(r"\blayers\.(\d+)\.(.+)$", name)
            if found and int(found[1]) in self._layers:
                self._layers[int(found[1])].see(found[2], tensor)
            yield name, tensor

    def finish(self, loaded: Set[str], prefix: str) -> None:
        """See to it that every layer has the offset of its weights, and every site its lam.

        Args:
            loaded: the names of what has been put into the model, each behind prefix.

        Raises:
            ValueError: a frozen lam is missing; or an offset, with W_V and W_O not there as floating-point matrices.
        """
        for number, layer in self._layers.items():
            layer.settle(number)
        for name, site in self._model.named_modules():
            if isinstance(site, (BHyT, BHyTApprox)) and "lam" in site._buffers:  # engines miss parameters, not buffers
                if f"{prefix}{name}.lam" in loaded:
                    vars(site)["lam_is_loaded"] = True
                elif "lam_is_loaded" not in vars(site):
                    raise ValueError(f"weights: {name}.lam is not among them")


class _Layer:
    """What of a layer's weights has passed by."""

    def __init__(self, layer: Any) -> None:
        self._layer, self._dtype = layer, layer.input_layernorm.lam.dtype
        self._matrices: Dict[str, Tensor] = {}
        self._gain: Optional[Tensor] = None
        self._seen: Set[str] = set()
        self._sources = {_V, _O, "input_layernorm.lam"}
        if layer.config.use_gamma_var:
            self._sources.add("input_layernorm.weight")

    def see(self, name: str, tensor: Tensor) -> None:
        if name == _OFFSET and tensor.isnan().any():  # saved before it was set
            return
        self._seen.add(name)
        if name in (_V, _O) and _OFFSET not in self._seen and tensor.dtype in _FLOATS:
            self._matrices[name] = tensor.to(self._dtype)
        if len(self._matrices) == 2:
            v, o = (self._matrices.pop(name) for name in (_V, _O))
            self._gain = attention_gain(
                v, o, self._layer.config.seq_len, o.shape[1] // v.shape[0], head_dim=self._layer.self_attn.head_dim
            )

    def settle(self, number: int) -> None:
        site, first = self._layer.post_attention_layernorm, self._layer.input_layernorm
        if _OFFSET not in self._seen and self._gain is not None:
            gain = self._gain.to(first.lam.device)
            if self._layer.config.use_gamma_var and first.weight is not None:
                gain = gain * first.weight.to(gain).square().mean()
            site.set_variance_offset(offset_of(gain, first))
        elif _OFFSET not in self._seen and (not site.offset_is_set or self._seen & self._sources):
            raise ValueError(
                f"weights: layers.{number}.{_OFFSET} is not among them, nor are v_proj and o_proj as floating-point"
                " matrices, of which it is computed; load what save_pretrained saves, all of it"
            )
        site.offset_is_set = False
        site.has_variance_offset()  # looks at the buffer, which cannot be done while a graph is captured
