"""Families that vLLM has a decoder of its own for: that decoder, with sites in the places of its norms.

vLLM carries the residual stream from layer to layer, so that the site behind every add takes the add along.
"""

from functools import partial
from typing import Any, Optional, Tuple

import torch
from torch import Tensor, nn
from transformers import AutoModel
from vllm.distributed import get_pp_group
from vllm.model_executor.models.llama import LlamaForCausalLM as Llama
from vllm.model_executor.models.mistral import MistralForCausalLM as Mistral
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM as Qwen2
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM as Qwen3
from vllm.model_executor.models.transformers.utils import init_on_device_without_buffers

from bhyt.modules import BHyT, BHyTApprox
from bhyt.vllm.same import check_fields, check_layer
from bhyt.vllm.weights import LoadsOffsets, check_config


class Layer(nn.Module):
    """In front of a decoder layer's class. The variance stays inside a layer."""

    input_layernorm: Any
    self_attn: Any
    post_attention_layernorm: Any
    mlp: Any

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Optional[Tensor], t_cond: None = None
    ) -> Tuple[Tensor, Tensor]:
        """As vLLM's. t_cond: None, which is what Mistral's model passes on."""
        if residual is None:
            residual = hidden_states
            y, variance = self.input_layernorm(hidden_states, return_variance=True)
        else:
            y, residual, variance = _add_exact(self.input_layernorm, hidden_states, residual)
        branch = self.self_attn(positions=positions, hidden_states=y)
        if isinstance(self.post_attention_layernorm, BHyTApprox):
            y, residual = _add_approx(self.post_attention_layernorm, branch, residual, variance)
        else:
            y, residual, _ = _add_exact(self.post_attention_layernorm, branch, residual)
        return self.mlp(y), residual


def _add_exact(site: BHyT, x: Tensor, residual: Tensor) -> Any:
    """(y, sum, variance): y where x was and the sum where residual was, as vLLM's fused add has them."""
    x, (weight, lam) = x.contiguous(), site._weight_and_lam()
    variance = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return torch.ops.bhyt.add_forward.out(
        x, residual, weight, lam, site.kappa, site.eps, y=x, sum=residual, variance=variance
    )


def _add_approx(site: BHyTApprox, x: Tensor, residual: Tensor, variance: Tensor) -> Any:
    """(y, sum), in the same places."""
    x, (weight, lam) = x.contiguous(), site._weight_and_lam()
    return torch.ops.bhyt.add_forward_approx.out(
        x, residual, variance, site._offset(), weight, lam, site.kappa, site.eps, y=x, sum=residual
    )


class Native(LoadsOffsets):
    """In front of a class of vLLM's."""

    packed_modules_mapping: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        check_config(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        model = self.model
        sites = _model_of_sites(vllm_config)
        check_fields(sites.config)
        for number in range(model.start_layer, model.end_layer):
            layer, own = model.layers[number], sites.layers[number]
            check_layer(layer, own, sites.rotary_emb, packed=self.packed_modules_mapping)
            layer.input_layernorm, layer.post_attention_layernorm = own.input_layernorm, own.post_attention_layernorm
            layer.__class__ = type(type(layer).__name__, (Layer, type(layer)), {})
        if isinstance(sites.norm, BHyT) and get_pp_group().is_last_rank:
            model.norm = sites.norm
        # For a caller who goes past this class.
        model.load_weights = partial(self.load_by, model.load_weights, prefix="")


def _model_of_sites(vllm_config: Any) -> Any:
    """The model of `bhyt.hf` without weights: memory for those of its sites alone."""
    dtype, device = vllm_config.model_config.dtype, vllm_config.device_config.device
    with init_on_device_without_buffers("meta"):
        model = AutoModel.from_config(vllm_config.model_config.hf_config, dtype=dtype)
    norms = [norm for layer in model.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    for norm in (*norms, model.norm):
        for name, parameter in norm.named_parameters():
            empty = torch.empty_like(parameter, dtype=dtype, device=device)
            setattr(norm, name, nn.Parameter(empty, requires_grad=False))
    return model


class LlamaForCausalLM(Native, Llama):  # type: ignore[misc]
    """vLLM's Llama with sites."""


class MistralForCausalLM(Native, Mistral):  # type: ignore[misc]
    """vLLM's Mistral with sites."""


class Qwen2ForCausalLM(Native, Qwen2):  # type: ignore[misc]
    """vLLM's Qwen2 with sites."""


class Qwen3ForCausalLM(Native, Qwen3):  # type: ignore[misc]
    """vLLM's Qwen3 with sites."""
