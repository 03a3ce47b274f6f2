"""The sites that a model gets by its config, and how they take the places of its norms."""

from dataclasses import replace
from typing import Any, List

import torch
from torch import nn

from bhyt.hf.checks import check_attention, check_layer, check_norm
from bhyt.hf.config import SiteFields, check_types
from bhyt.hf.layer import PARTS, after_loading, decoder_layers, layer_class
from bhyt.modules import BHyT, BHyTApprox

NORM_TYPES = ("bhyt", "bhytline", "bhytstar")


class Plan:
    """The sites of a model that has none yet: everything is checked and nothing is changed.

    Args:
        model: a decoder of transformers.
        fields: the fields of the sites.

    Attributes:
        fields: as given, eps filled in.
        norms: the norms that sites will replace.

    Raises:
        ValueError: a field out of range, or a layer that does not compute the formulas at the top of layer.py.
    """

    def __init__(self, model: nn.Module, fields: SiteFields) -> None:
        check_types(fields)
        if fields.norm_type not in NORM_TYPES:
            raise ValueError(f"norm_type: expected one of {', '.join(NORM_TYPES)}, got {fields.norm_type!r}")
        if fields.var_approx_exact_layers < 0:
            raise ValueError(f"exact_layers: expected an integer >= 0, got {fields.var_approx_exact_layers}")
        self._layers = list(decoder_layers(model))
        if not self._layers:
            raise ValueError(f"model: no layer of {type(model).__name__} has {', '.join(PARTS)}; nothing was converted")
        exact = fields.norm_type == "bhytstar"
        self._approximate = [] if exact else self._layers[fields.var_approx_exact_layers :]
        for layer in self._approximate:
            check_attention(layer.self_attn)
        if self._approximate and not fields.seq_len:
            longest = getattr(getattr(model, "config", None), "max_position_embeddings", "unknown")
            raise ValueError(
                "seq_len: approximate sites need the sequence length the model is built for (or norm_type='bhytstar');"
                f" the model's max_position_embeddings is {longest}"
            )
        self._return_tuples = [check_layer(layer) for layer in self._layers]
        self._final = _owner_of_final_norm(model, self._layers) if fields.last_layer_lam > 0 and not exact else None
        self.norms: List[Any] = []
        for layer in self._layers:
            self.norms += [layer.input_layernorm, layer.post_attention_layernorm]
        if self._final is not None:
            self.norms.append(self._final.norm)
        eps = [check_norm(norm) for norm in self.norms]
        self.fields = fields if fields.bhyt_eps is not None else replace(fields, bhyt_eps=eps[0])

    def install(self, config: Any, unit_gains: bool = False) -> int:
        """Put the sites in, with the norms' gains.

        Args:
            config: the config that the layers will read.
            unit_gains: multiply each gain by kappa / lam.

        Returns:
            The number of sites.
        """
        fields = self.fields
        for layer, returns_tuple in zip(self._layers, self._return_tuples):
            layer.config, layer.approximate, layer.returns_tuple = config, layer in self._approximate, returns_tuple
            layer.input_layernorm = self._site(layer.input_layernorm, BHyT, fields.input_layer_lam, unit_gains)
            second = BHyTApprox if layer.approximate else BHyT
            layer.post_attention_layernorm = self._site(
                layer.post_attention_layernorm, second, fields.post_layer_lam, unit_gains
            )
            layer.__class__ = layer_class(type(layer))
            layer.register_load_state_dict_post_hook(after_loading)
        if self._final is not None:
            self._final.norm = self._site(self._final.norm, BHyT, fields.last_layer_lam, unit_gains)
        return len(self.norms)

    def _site(self, norm: Any, kind: Any, lam: float, unit_gains: bool) -> Any:
        """A site in a norm's place: of its size, device and dtype, with its gain."""
        weight, fields = norm.weight, self.fields
        site = kind(
            weight.shape[-1], lam=lam, kappa=fields.bhyt_kappa, eps=fields.bhyt_eps, learnable_lam=fields.learnable_lam,
            device=None if weight.is_meta else weight.device, dtype=weight.dtype,
        )
        if weight.is_meta:  # buffers are on the default device: some loaders keep the parameters alone on meta
            for name, parameter in list(site.named_parameters()):
                setattr(site, name, nn.Parameter(parameter.detach().to("meta")))
        with torch.no_grad():
            site.weight.copy_(weight * (fields.bhyt_kappa / lam if unit_gains else 1))
        return site.train(norm.training)


def _owner_of_final_norm(model: nn.Module, layers: List[Any]) -> Any:
    """The module that holds the layers and the final norm."""
    for module in model.modules():
        if any(child is layers[-1] for child in getattr(module, "layers", ())) and hasattr(module, "norm"):
            return module
    raise ValueError(f"last_layer_lam: {type(model).__name__} has no final norm beside its layers")
