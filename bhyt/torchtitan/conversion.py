"""A torchtitan config becomes one whose model has BHyT sites."""

import functools
from dataclasses import replace
from typing import Any, Iterator

from torchtitan.models.common.attention import FusedQKVLinear, GQAttention, QKVLinear
from torchtitan.models.common.decoder import TransformerBlock
from torchtitan.models.common.dist_gemm import AllGatherFusedQKVLinear
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.nn_modules import RMSNorm
from torchtitan.trainer import Trainer

from bhyt.torchtitan.block import ConvertedBlock, check_block, converted_config
from bhyt.torchtitan.checkpoints import adapter_class
from bhyt.torchtitan.sites import ExactSecondSite, FirstSite, SecondSite
from bhyt.torchtitan.training import after_optimizers

_PROJECTIONS = (QKVLinear.Config, FusedQKVLinear.Config, AllGatherFusedQKVLinear.Config)
# Linears whose weight is the matrix that they apply, if rounded; one with adapters is another matrix.
_LINEARS = ("torchtitan.models.common.", "torchtitan.components.quantization.")


def convert(
    config: Any,
    *,
    input_layer_lam: float = 2.0,
    post_layer_lam: float = 1.0,
    kappa: float = 10.0,
    every: int = 10,
    unit_gains: bool = False,
    exact_layers: int = 0,
) -> Any:
    """Make a config of torchtitan whose blocks have BHyT sites in the places of their norms.

    The residual add behind the attention is fused into the second site. T, the sequence length that approximate sites
    are built for, is that of training (`training.seq_len`).

    Args:
        config: a `Trainer.Config` with the model_spec of a decoder such as Llama 3 or Qwen3, dense or with a mixture of
            experts, whose attention is GQAttention. It stays as it is.
        input_layer_lam: initial lam of a block's first site.
        post_layer_lam: initial lam of a block's second site.
        kappa: see `bhyt.BHyT`.
        every: optimizer steps between refreshes of the offsets, the first before training.
        unit_gains: gains start at kappa / lam, as by `bhyt.hf.convert`; otherwise at 1.
        exact_layers: so many blocks from the first on get exact second sites too.

    Returns:
        The converted config; the final norm and those of queries and keys stay what they are.

    Raises:
        ValueError: numbers that mean nothing; a config without such a model, one that is converted already, or whose
            blocks compute something else than is assumed (`block.py`).
    """
    _check_numbers(input_layer_lam, post_layer_lam, kappa, every, exact_layers)
    layers = list(_layers(config))
    for layer in layers:
        _check_layer(layer)

    def site(norm: Any, kind: Any, lam: float) -> Any:
        gain = kappa / lam if unit_gains else 1.0
        return kind.Config(hidden_size=norm.normalized_shape, lam=lam, kappa=kappa, eps=norm.eps, gain=gain)

    converted = [
        converted_config(
            layer,
            attention_norm=site(layer.attention_norm, FirstSite, input_layer_lam),
            ffn_norm=site(layer.ffn_norm, ExactSecondSite if i < exact_layers else SecondSite, post_layer_lam),
        )
        for i, layer in enumerate(layers)
    ]
    spec = config.model_spec
    return replace(config, model_spec=replace(
        spec,
        model=replace(spec.model, layers=converted),
        post_optimizer_build_fn=functools.partial(after_optimizers, every=every, before=spec.post_optimizer_build_fn),
        state_dict_adapter=spec.state_dict_adapter and adapter_class(spec.state_dict_adapter),
    ))  # fmt: skip


def _check_numbers(input_layer_lam: Any, post_layer_lam: Any, kappa: Any, every: Any, exact_layers: Any) -> None:
    for name, value in (("input_layer_lam", input_layer_lam), ("post_layer_lam", post_layer_lam), ("kappa", kappa)):
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
            raise ValueError(f"{name}: expected a number > 0, got {value!r}")
    for name, value, least in (("every", every, 1), ("exact_layers", exact_layers, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")


def _layers(config: Any) -> Iterator[Any]:
    if not isinstance(config, Trainer.Config) or config.model_spec is None:
        raise ValueError(f"config: expected a torchtitan Trainer.Config with a model_spec, got {type(config).__name__}")
    layers = getattr(config.model_spec.model, "layers", None)
    if not layers:
        model = f"{config.model_spec.name} {config.model_spec.flavor}"
        raise ValueError(f"config: {model} has no layers; nothing to convert")
    for layer in layers:
        owner = type(layer)._owner
        if issubclass(owner, ConvertedBlock):
            raise ValueError("config: has been converted already")
        if not isinstance(layer, TransformerBlock.Config):
            raise ValueError(f"config: {owner.__name__} is not one of torchtitan's transformer blocks; not converted")
        yield layer


def _check_layer(layer: Any) -> None:
    attention = layer.attention
    for name, linear, *_ in attention.traverse(Linear.Config):
        if not type(linear)._owner.__module__.startswith(_LINEARS):
            raise ValueError(
                f"config: {name} is {_name(linear)}, which computes with more than its weight (adapters), so that an"
                " approximate site's constant is not known"
            )
    if type(attention) is not GQAttention.Config or type(attention.qkv_linear) not in _PROJECTIONS:
        parts = " with ".join(_name(part) for part in (attention, getattr(attention, "qkv_linear", None)) if part)
        raise ValueError(f"config: {parts}, for which an approximate site's constant is not known")
    for name in ("attention_norm", "ffn_norm"):
        norm = getattr(layer, name)
        if type(norm) is not RMSNorm.Config or not norm.elementwise_affine:
            raise ValueError(f"config: {name} is {_name(norm)}; only an RMSNorm with a gain is converted")
    check_block(layer)


def _name(config: Any) -> str:
    owner = getattr(type(config), "_owner", None)
    return owner.__name__ if owner is not None else type(config).__name__
