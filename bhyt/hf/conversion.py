"""Turns a model in memory into a model with BHyT sites, which `transformers` saves and loads under its own type."""

import warnings
from typing import Any, Iterator, Optional

from torch import nn
from transformers import PreTrainedModel

from bhyt.hf.config import SITE_FIELDS, BHyTConfigMixin, SiteFields
from bhyt.hf.families import config_class
from bhyt.hf.layer import ConvertedLayer, decoder_layers
from bhyt.hf.model import adopt
from bhyt.hf.sites import NORM_TYPES, Plan


def convert(
    model: nn.Module,
    *,
    norm_type: str = "bhyt",
    input_layer_lam: float = 2.0,
    post_layer_lam: float = 1.0,
    last_layer_lam: float = 0.0,
    learnable_lam: bool = True,
    kappa: float = 10.0,
    eps: Optional[float] = None,
    seq_len: Optional[int] = None,
    use_gamma_var: Optional[bool] = None,
    exact_layers: int = 0,
    unit_gains: bool = False,
) -> int:
    """Turn the norms of a decoder's layers into BHyT sites, in place.

    The model's class and config become those of bhyt_*. The residual add behind the attention is fused into the second
    site. Convert before or after PEFT wraps the model, and before torch.compile, DDP and FSDP.

    Args:
        model: a `transformers` decoder of a family in `bhyt.hf.FAMILIES`, with or without its head.
        norm_type: "bhyt" or "bhytline": exact first and approximate second sites; "bhytstar": both exact.
        input_layer_lam: initial lam of a layer's first site.
        post_layer_lam: initial lam of a layer's second site.
        last_layer_lam: above 0, and not with "bhytstar", the final norm becomes an exact site with this lam. Otherwise
            it stays RMSNorm.
        learnable_lam: False makes lam a buffer.
        kappa: see `bhyt.BHyT`.
        eps: eps of the sites; None takes the eps of the norms.
        seq_len: T, the sequence length the model is built for; needed for approximate sites unless
            `model.config.seq_len` gives it. It is never taken from a batch.
        use_gamma_var: multiply the variance that attention adds by the mean square of the first site's gain, as the
            authors' option of this name does. None: True with unit_gains, whose gains are far from 1.
        exact_layers: the number of layers, from the first on, whose second sites are exact too. 1 costs one reduction
            per model. It avoids the approximation where that fails: behind small embeddings.
        unit_gains: multiply each gain by kappa / lam. The default is the paper's start, so that a config means the same
            model everywhere. With True a new model's sub-layers read rows whose root mean square is about 1, as from
            RMSNorm. In the study such models end below RMSNorm's loss. For small arguments a site is then the RMSNorm
            that it replaces: the first deviation is -(lam/kappa)^2 / 3 (x/rms)^2, relative. So a model that was trained
            with RMSNorm keeps most of its quality, but with exact sites ("bhytstar") only: trained attention adds more
            variance than approximate sites assume. The bound of an output is kappa / lam, not 1.

    Returns:
        The number of sites.

    Raises:
        ValueError: another norm_type; no seq_len; exact_layers below 0; a model that has been converted already; a
            model that was saved with sites and loaded as a plain one; a model of another family; a model without a
            layer that fits; a layer, norm or attention that computes something else. The model is then unchanged.
    """
    config = _config_of(model)
    if isinstance(config, BHyTConfigMixin):
        raise ValueError("model: has been converted already")
    if getattr(config, "norm_type", None) in NORM_TYPES:
        raise ValueError(
            f"model: its config says norm_type {config.norm_type!r}, so it was saved with BHyT sites, and without them"
            " it is not that model; load it with bhyt.hf.from_pretrained"
        )
    plan = Plan(model, SiteFields(
        norm_type=norm_type, input_layer_lam=input_layer_lam, post_layer_lam=post_layer_lam,
        last_layer_lam=last_layer_lam, learnable_lam=learnable_lam, bhyt_kappa=kappa, bhyt_eps=eps,
        seq_len=seq_len or getattr(config, "seq_len", None),
        use_gamma_var=unit_gains if use_gamma_var is None else use_gamma_var, var_approx_exact_layers=exact_layers,
    ))  # fmt: skip
    converted_class = config_class(getattr(config, "model_type", type(model).__name__))
    if not unit_gains and any((norm.weight != 1).any() for norm in plan.norms if not norm.weight.is_meta):
        warnings.warn(
            "bhyt.hf.convert: the norms of this model have been trained; as BHyT sites they compute another function,"
            " and the model needs further training (unit_gains=True begins near the old one)",
            stacklevel=2,
        )
    sites = plan.install(config, unit_gains)
    config.__class__ = converted_class
    vars(config).pop("model_type", None)  # of a loaded config, in front of the class's
    for name in SITE_FIELDS:
        setattr(config, name, getattr(plan.fields, name))
    adopt(model, config)
    if not any(parameter.is_meta for parameter in model.parameters()):
        refresh(model)
    return sites


def _config_of(model: nn.Module) -> Any:
    """The config of the transformers model that holds the layers: of a decoder in a larger model, the decoder's own."""
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    holders = [module for module in models if any(decoder_layers(module))]
    return holders[-1].config if holders else getattr(model, "config", None)


def converted_layers(model: nn.Module) -> Iterator[ConvertedLayer]:
    """The layers of a model that have sites, in the model's order.

    Args:
        model: any model.

    Returns:
        An iterator.
    """
    return (module for module in model.modules() if isinstance(module, ConvertedLayer))


def refresh(model: nn.Module) -> int:
    """Recompute the offset of every approximate site from W_V, W_O and the first site's parameters, as they are now.

    Call it every 10 to 100 steps of training (see `refresh_callback`), and after you changed weights by hand. Active
    adapters count. With weights that FSDP2, tensor parallelism or DeepSpeed's ZeRO-3 have sharded, every process must
    call it.

    Args:
        model: a converted model, as it is or wrapped (PEFT, DDP, FSDP2, torch.compile).

    Returns:
        The number of approximate sites.

    Raises:
        ValueError: the model has not been converted.
        RuntimeError: its gains are folded (see `bhyt.fold_gain`), or its weights are on the meta device.
    """
    layers = list(converted_layers(model))
    if not layers:
        raise ValueError(f"model: {type(model).__name__} has not been converted")
    approximate = [layer for layer in layers if layer.approximate]
    for layer in approximate:
        layer.offset.refresh(layer)
    return len(approximate)
