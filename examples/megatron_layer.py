"""A Megatron-Core transformer layer with BHyT sites, to be copied into a training program (docs/pretraining.md).

    from megatron_layer import bhyt_layer_spec, refresh

    spec = bhyt_layer_spec(get_gpt_layer_local_spec(normalization="RMSNorm"), seq_len=4096)
    model = GPTModel(config, spec, ...)
    refresh(model)                  # before training, after loading, and every tenth optimizer step, in every process

Megatron hands the second norm the sum alone, so the layer's two sites share the variance, for as long as one forward
takes. The residual adds stay Megatron's. Full recomputation, tensor, sequence and pipeline parallelism need nothing
more. Gains and lam are vectors, which Megatron's optimizers do not decay.
"""

import copy
import functools
from typing import Any, List

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

import bhyt


class FirstSite(bhyt.BHyT):
    """In the place of input_layernorm; keeps the variance of its rows for the layer's second site."""

    def __init__(self, config: Any, hidden_size: int, eps: float, *, lam: float, kappa: float) -> None:
        super().__init__(hidden_size, lam=lam, kappa=kappa, eps=eps, dtype=config.params_dtype)
        _mark(self, config)
        self.variance: List[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y, variance = super().forward(x, return_variance=True)
        self.variance = [variance]
        return y


class SecondSite(bhyt.BHyTApprox):
    """In the place of pre_mlp_layernorm."""

    def __init__(self, config: Any, hidden_size: int, eps: float, *, lam: float, kappa: float, seq_len: int) -> None:
        super().__init__(hidden_size, lam=lam, kappa=kappa, eps=eps, dtype=config.params_dtype)
        _mark(self, config)
        self.seq_len = seq_len

    def forward(self, x: Tensor) -> Tensor:
        (first,) = self.first
        return super().forward(x, first.variance.pop())


def _mark(site: nn.Module, config: Any) -> None:
    """Megatron sums the gradients of marked parameters over the processes that share a sequence."""
    for parameter in site.parameters():
        parameter.sequence_parallel = config.sequence_parallel


class BHyTLayer(TransformerLayer):
    """A layer whose sites are computed as they are meant.

    Raises:
        ValueError: an option under which the variance would be lost, or its gradient, or the constant be another.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        _check_options(config)
        super().__init__(config, *args, **kwargs)
        if not isinstance(self.input_layernorm, FirstSite) or not isinstance(self.pre_mlp_layernorm, SecondSite):
            raise ValueError("submodules: expected the two sites of bhyt_layer_spec in the places of the norms")
        if not isinstance(self.cross_attention, IdentityOp):
            raise ValueError("submodules: between the two sites of a layer there is its self-attention alone")
        for name, linear in (("linear_qkv", self.self_attention), ("linear_fc1", self.mlp)):
            if hasattr(getattr(linear, name, None), "layer_norm_weight"):
                raise ValueError(f"submodules: {name} has a norm of its own; begin with get_gpt_layer_local_spec")
        if not hasattr(self.self_attention, "linear_qkv"):
            raise ValueError(f"submodules: {type(self.self_attention).__name__} has no linear_qkv, for W_V")
        self.pre_mlp_layernorm.first = (self.input_layernorm,)  # in a tuple, so that it is no submodule twice


def _check_options(config: Any) -> None:
    selective = config.recompute_granularity == "selective"
    wrong = {
        "recompute_modules: layernorm": selective and "layernorm" in (config.recompute_modules or ()),
        "layernorm_zero_centered_gamma": config.layernorm_zero_centered_gamma,
        "apply_residual_connection_post_layernorm": config.apply_residual_connection_post_layernorm,
        "hidden_dropout": config.hidden_dropout,
        "attention_output_gate": config.attention_output_gate,
        "multi_latent_attention": config.multi_latent_attention,
        "fine_grained_activation_offloading": config.fine_grained_activation_offloading,
        "cuda_graph_impl": config.cuda_graph_impl != "none",
        "overlap_moe_expert_parallel_comm": config.overlap_moe_expert_parallel_comm,
        "transformer_impl: inference_optimized": config.transformer_impl == "inference_optimized",
    }
    names = [name for name, value in wrong.items() if value]
    if names:
        raise ValueError(f"config: {', '.join(names)}: not with BHyT sites, whose variance or constant would be wrong")


def bhyt_layer_spec(
    spec: ModuleSpec, *, seq_len: int, input_layer_lam: float = 2.0, post_layer_lam: float = 1.0, kappa: float = 10.0
) -> ModuleSpec:
    """A layer spec with sites in the places of the norms.

    Args:
        spec: of `get_gpt_layer_local_spec`; Transformer Engine's has the norms inside the linears.
        seq_len: T, the sequence length that the model is built for.
        input_layer_lam, post_layer_lam: initial lam of a layer's first and second sites.
        kappa: see `bhyt.BHyT`.

    Raises:
        ValueError: a spec of another layer, or without two norms.
    """
    submodules = copy.copy(spec.submodules)
    if spec.module is not TransformerLayer or IdentityOp in (submodules.input_layernorm, submodules.pre_mlp_layernorm):
        raise ValueError("spec: expected a TransformerLayer with two norms, as get_gpt_layer_local_spec gives it")
    submodules.input_layernorm = functools.partial(FirstSite, lam=input_layer_lam, kappa=kappa)
    submodules.pre_mlp_layernorm = functools.partial(SecondSite, lam=post_layer_lam, kappa=kappa, seq_len=seq_len)
    return ModuleSpec(module=BHyTLayer, submodules=submodules, params=spec.params)


@torch.no_grad()
def refresh(model: nn.Module) -> int:
    """Recompute the offsets from W_V, W_O and lam as they are; every process of a tensor parallel group must ask.

    Returns:
        The number of approximate sites in this process.

    Raises:
        ValueError: KV heads that the processes of a group do not divide.
    """
    layers = [module for module in model.modules() if isinstance(module, BHyTLayer)]
    for layer in layers:
        config, attention, site = layer.config, layer.self_attention, layer.pre_mlp_layernorm
        heads, kv_heads = config.num_attention_heads, config.num_query_groups
        if kv_heads % layer.tp_group.size():
            processes = layer.tp_group.size()
            raise ValueError(f"num_query_groups: expected a multiple of the {processes} processes, got {kv_heads}")
        qkv = _gathered(attention.linear_qkv.weight, 0, layer.tp_group)
        values = bhyt.value_weight(qkv, heads, kv_heads, grouped=True)
        output = _gathered(attention.linear_proj.weight, 1, layer.tp_group)
        c = bhyt.attention_gain(values, output, site.seq_len, heads // kv_heads, head_dim=config.kv_channels)
        site.update_variance_offset(c, layer.input_layernorm)
    return len(layers)


def _gathered(weight: Tensor, dim: int, group: Any) -> Tensor:
    """All of a weight that a tensor parallel group has in parts, which are plain tensors."""
    parts = [torch.empty_like(weight) for _ in range(group.size())]
    torch.distributed.all_gather(parts, weight.detach().contiguous(), group=group)
    return torch.cat(parts, dim)
