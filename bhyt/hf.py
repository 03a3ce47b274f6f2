"""Hugging Face decoders with BHyT sites: convert a model, refresh its constants, load the authors' checkpoints.

For Llama, Mistral, Qwen2, Qwen3 and every decoder whose layers have `input_layernorm`, `self_attn`,
`post_attention_layernorm` and `mlp`, in this order, with residual adds around attention and MLP. Conversion changes the
instance, not the classes of `transformers`; parameter names stay, and each site adds one, `lam`.
"""

import functools
import warnings
from typing import Any, Dict, Iterator, Tuple, Type, Union

import torch
from torch import Tensor, nn

from bhyt.gain import attention_gain
from bhyt.modules import BHyT, BHyTApprox

_NORM_TYPES = ("bhyt", "bhytline", "bhytstar")
_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


class _ConvertedLayer:
    """Mixed into a decoder layer's class: its forward with both sites, the attention's residual add fused into the second.

    The variance goes from the first site to the second as a local value: no state, whatever replays the forward.
    """

    _returns_tuple: bool
    _argument_names: Tuple[str, ...]  # of the layer's forward, behind hidden_states

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        kwargs.update(zip(self._argument_names, args))
        if isinstance(self.post_attention_layernorm, BHyTApprox):
            y, variance = self.input_layernorm.forward_with_variance(hidden_states)
            branch, weights = self.self_attn(hidden_states=y, **kwargs)[:2]
            y, hidden_states = self.post_attention_layernorm.forward_add(branch, hidden_states, variance)
        else:
            y = self.input_layernorm(hidden_states)
            branch, weights = self.self_attn(hidden_states=y, **kwargs)[:2]
            y, hidden_states = self.post_attention_layernorm.forward_add(branch, hidden_states)
        hidden_states = hidden_states + self.mlp(y)
        if not self._returns_tuple:
            return hidden_states
        return (hidden_states, weights) if kwargs.get("output_attentions") else (hidden_states,)

    def __reduce__(self) -> Tuple[Any, ...]:  # the class is made at run time: pickle and deepcopy make it again
        return _empty_layer, (type(self).__mro__[2],), self.__dict__


@functools.cache
def _converted(layer_class: Type[nn.Module]) -> Type[nn.Module]:
    """The subclass that takes layer_class's place, of the same name, which wrapping policies look for."""
    import inspect

    parameters = inspect.signature(layer_class.forward).parameters.values()
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][2:]
    # transformers before 4.54 return (hidden_states, ...) from a layer, and say so.
    annotation = str(inspect.signature(layer_class.forward).return_annotation)
    attributes = {
        "_argument_names": tuple(names),
        "_returns_tuple": "uple[" in annotation,
        "__module__": layer_class.__module__,
        "__doc__": layer_class.__doc__,
    }
    return type(layer_class.__name__, (_ConvertedLayer, layer_class), attributes)


def _empty_layer(layer_class: Type[nn.Module]) -> nn.Module:
    converted = _converted(layer_class)
    return converted.__new__(converted)


def _is_layer(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in _PARTS)


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if _is_layer(module))


def _site_for(norm: nn.Module, kind: type, lam: float, learnable_lam: bool, kappa: float, eps: float) -> nn.Module:
    """A site in a norm's place: of its size, device and dtype, with its gain."""
    weight = norm.weight
    site = kind(
        weight.shape[-1], lam=lam, kappa=kappa, eps=eps, learnable_lam=learnable_lam,
        device=weight.device, dtype=weight.dtype,
    )
    with torch.no_grad():
        site.weight.copy_(weight)
    return site.train(norm.training)


def _eps_of(norm: nn.Module) -> float:
    return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", None) or 1e-6))


def convert(
    model: nn.Module,
    *,
    norm_type: str = "bhyt",
    input_layer_lam: float = 2.0,
    post_layer_lam: float = 1.0,
    last_layer_lam: float = 0.0,
    learnable_lam: bool = True,
    kappa: float = 10.0,
    seq_len: Union[int, None] = None,
    warm_start: bool = False,
) -> int:
    """Turn the norms of a decoder's layers into BHyT sites, in place, and record it in `model.config`.

    The residual add behind the attention is fused into the second site. Before or after PEFT wraps the model; before
    torch.compile, DDP and FSDP.

    Args:
        model: a `transformers` decoder, with or without its head.
        norm_type: "bhyt" or "bhytline": exact first and approximate second sites; "bhytstar": both exact.
        input_layer_lam, post_layer_lam: initial lam of a layer's first and second sites.
        last_layer_lam: above 0, and not with "bhytstar", the final norm becomes an exact site with this lam; otherwise it
            stays what it is.
        learnable_lam: False makes lam a buffer.
        kappa: see `bhyt.BHyT`.
        seq_len: T, the sequence length the model is built for; needed for approximate sites unless `model.config.seq_len`
            gives it. It is never taken from a batch.
        warm_start: multiply each gain by kappa / lam, so that for small arguments a site is the RMSNorm it replaces; the
            first deviation is -(lam/kappa)^2 / 3 (x/rms)^2 relative. For models that were trained with RMSNorm.

    Returns:
        The number of sites.

    Raises:
        ValueError: another norm_type; no seq_len; a model that is converted already or has no layer that fits.
    """
    if norm_type not in _NORM_TYPES:
        raise ValueError(f"norm_type: expected one of {', '.join(_NORM_TYPES)}, got {norm_type!r}")
    layers = list(_layers(model))
    if not layers:
        raise ValueError(f"model: no layer of {type(model).__name__} has {', '.join(_PARTS)}; nothing was converted")
    if any(isinstance(layer, _ConvertedLayer) for layer in layers):
        raise ValueError("model: has been converted already")
    exact = norm_type == "bhytstar"
    seq_len = seq_len or getattr(model.config, "seq_len", None)
    if not exact and not seq_len:
        longest = getattr(model.config, "max_position_embeddings", "unknown")
        raise ValueError(
            "seq_len: approximate sites need the sequence length the model is built for (or norm_type='bhytstar');"
            f" the model's max_position_embeddings is {longest}"
        )
    final = _final_norm(model, layers) if last_layer_lam > 0 and not exact else None
    if not warm_start and any((norm.weight != 1).any() for layer in layers for norm in _norms(layer)):
        warnings.warn(
            "bhyt.hf.convert: the norms of this model have been trained; as BHyT sites they compute another function, and"
            " the model needs further training (warm_start=True begins near the old one)",
            stacklevel=2,
        )

    count = 0
    for layer in layers:
        for name, kind, lam in (
            ("input_layernorm", BHyT, input_layer_lam),
            ("post_attention_layernorm", BHyT if exact else BHyTApprox, post_layer_lam),
        ):
            norm = getattr(layer, name)
            setattr(layer, name, _site_for(norm, kind, lam, learnable_lam, kappa, _eps_of(norm)))
            count += 1
        layer.__class__ = _converted(type(layer))
    if final is not None:
        owner, norm = final
        owner.norm = _site_for(norm, BHyT, last_layer_lam, learnable_lam, kappa, _eps_of(norm))
        count += 1
    if warm_start:
        with torch.no_grad():
            for site in _sites(model):
                site.weight.mul_(site.kappa / site.initial_lam)
    fields = dict(
        norm_type=norm_type, input_layer_lam=input_layer_lam, post_layer_lam=post_layer_lam,
        last_layer_lam=last_layer_lam, learnable_lam=learnable_lam, bhyt_kappa=kappa, seq_len=seq_len,
    )
    for name, value in fields.items():
        setattr(model.config, name, value)
    if not any(parameter.is_meta for parameter in model.parameters()):
        refresh(model)
    return count


def _norms(layer: nn.Module) -> Tuple[nn.Module, nn.Module]:
    return layer.input_layernorm, layer.post_attention_layernorm


def _sites(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if isinstance(module, (BHyT, BHyTApprox)))


def _final_norm(model: nn.Module, layers: Any) -> Tuple[nn.Module, nn.Module]:
    """(the module that holds the layers and the final norm, that norm)."""
    for module in model.modules():
        if any(child is layers[-1] for child in getattr(module, "layers", ())) and hasattr(module, "norm"):
            return module, module.norm
    raise ValueError(f"last_layer_lam: {type(model).__name__} has no final norm beside its layers")


def _full(weight: Tensor) -> Tensor:
    """The whole of a weight that FSDP2 or tensor parallelism has sharded."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


@torch.no_grad()
def refresh(model: nn.Module) -> int:
    """Recompute c of every approximate site from W_V, W_O and the first site's lam, on weights as they are now.

    After loading weights, and every so many steps of training. With sharded weights every process must call it.

    Returns:
        The number of approximate sites.

    Raises:
        ValueError: the model has not been converted, or its config has no seq_len.
    """
    layers = [layer for layer in _layers(model) if isinstance(layer, _ConvertedLayer)]
    if not layers:
        raise ValueError(f"model: {type(model).__name__} has not been converted")
    approximate = [layer for layer in layers if isinstance(layer.post_attention_layernorm, BHyTApprox)]
    for layer in approximate:
        attention = layer.self_attn
        gain = attention_gain(
            _full(_weight_of(attention.v_proj)), _full(_weight_of(attention.o_proj)), model.config.seq_len,
            attention.num_key_value_groups, head_dim=attention.head_dim,
        )
        layer.post_attention_layernorm.update_variance_offset(gain, layer.input_layernorm)
    return len(approximate)


def _weight_of(projection: nn.Module) -> Tensor:
    """A linear's weight; of one that PEFT has wrapped, with its active adapters added."""
    base = getattr(projection, "base_layer", None)
    if base is None:
        return projection.weight
    weight = _full(base.weight)
    if getattr(projection, "merged", False) or getattr(projection, "disable_adapters", False):
        return weight
    for adapter in projection.active_adapters:
        weight = weight + projection.get_delta_weight(adapter).to(weight)
    return weight


def from_config(config: Any, **options: Any) -> nn.Module:
    """A causal language model with the sites its config describes, weights at random; options as
    `AutoModelForCausalLM.from_config` takes them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, **options)
    convert(model, **_sites_in(config))
    return model


def _sites_in(config: Any) -> Dict[str, Any]:
    """What `convert` takes, from a config written by it or by the authors."""
    if getattr(config, "norm_type", None) not in _NORM_TYPES:
        given = getattr(config, "norm_type", None)
        raise ValueError(f"config.norm_type: expected one of {', '.join(_NORM_TYPES)}, got {given!r}")
    fields = {name: getattr(config, name, None) for name in ("input_layer_lam", "post_layer_lam", "last_layer_lam")}
    fields |= {"learnable_lam": getattr(config, "learnable_lam", None), "seq_len": getattr(config, "seq_len", None)}
    fields |= {"kappa": getattr(config, "bhyt_kappa", None), "norm_type": config.norm_type}
    return {name: value for name, value in fields.items() if value is not None}


def from_pretrained(path: Any, *, dtype: Union[torch.dtype, None] = None) -> nn.Module:
    """Load a converted causal language model that `save_pretrained` wrote.

    Args:
        path: a folder with config.json and safetensors (one file or sharded).
        dtype: of the weights; None takes the config's.

    Raises:
        ValueError: the config names no BHyT norm_type.
        RuntimeError: parameters are missing or unknown.
    """
    from pathlib import Path

    from safetensors.torch import load_file
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path)
    model = from_config(config, dtype=dtype or getattr(config, "dtype", None) or torch.float32)
    weights: Dict[str, Tensor] = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        weights |= load_file(file)
    tied = getattr(config, "tie_word_embeddings", False)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if not (tied and name == "lm_head.weight")]
    if missing or unexpected:
        raise RuntimeError(f"{path}: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    refresh(model)
    return model.eval()


def load_authors_checkpoint(path: Any, *, dtype: Union[torch.dtype, None] = None) -> nn.Module:
    """A running model from the authors' config and weights; their parameter names are those of a converted model.

    As `from_pretrained`, but fields that their code knows and this one does not compute raise instead of being ignored.

    Raises:
        NotImplementedError: the config asks for one of them: sites in some layers only, kappa by depth, other
            approximations of the variance.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path)
    defaults = {
        "bhyt_layer_range": None, "bhyt_kappa_schedule": None, "use_gamma_var": False, "var_approx_method": "baseline",
        "var_approx_calibration": None, "var_approx_exact_layers": 0, "var_approx_exact_layer_list": None,
        "lam_layer_scale": False, "lam_layer_rscale": False,
    }
    for field, default in defaults.items():
        if getattr(config, field, default) not in (default, None):
            raise NotImplementedError(f"config.{field}: not supported, the config asks for {getattr(config, field)!r}")
    return from_pretrained(path, dtype=dtype)
