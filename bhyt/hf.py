"""Hugging Face decoders with BHyT sites: convert a model, refresh its constants, load the authors' checkpoints.

For Llama, Mistral, Qwen2, Qwen3 and every decoder whose layers have `input_layernorm`, `self_attn`,
`post_attention_layernorm` and `mlp`, in this order, with plain residual adds around attention and MLP;
others are refused. Conversion changes the instance, not the classes of `transformers`; parameter names stay, and each
site adds one, `lam`.
"""

import contextlib
import warnings
from pathlib import Path
from typing import Any, ContextManager, Dict, Iterator, List, Tuple, Union

import torch
from torch import Tensor, nn

from bhyt.decoder import PARTS, ConvertedLayer, check_layer, check_norm, converted_class, decoder_layers
from bhyt.gain import attention_gain, whole
from bhyt.modules import BHyT, BHyTApprox

_NORM_TYPES = ("bhyt", "bhytline", "bhytstar")


def convert(
    model: nn.Module,
    *,
    norm_type: str = "bhyt",
    input_layer_lam: float = 2.0,
    post_layer_lam: float = 1.0,
    last_layer_lam: float = 0.0,
    learnable_lam: bool = True,
    kappa: float = 10.0,
    eps: Union[float, None] = None,
    seq_len: Union[int, None] = None,
    use_gamma_var: Union[bool, None] = None,
    exact_layers: int = 0,
    warm_start: bool = False,
) -> int:
    """Turn the norms of a decoder's layers into BHyT sites, in place, and record it in `model.config`.

    The residual add behind the attention is fused into the second site. Before or after PEFT wraps the model; before
    torch.compile, DDP and FSDP.

    Args:
        model: a `transformers` decoder, with or without its head.
        norm_type: "bhyt" or "bhytline": exact first and approximate second sites; "bhytstar": both exact.
        input_layer_lam, post_layer_lam: initial lam of a layer's first and second sites.
        last_layer_lam: above 0, and not with "bhytstar", the final norm becomes an exact site with this lam; otherwise
            it stays what it is.
        learnable_lam: False makes lam a buffer.
        kappa: see `bhyt.BHyT`.
        eps: of the sites; None takes that of the norms.
        seq_len: T, the sequence length the model is built for; needed for approximate sites unless
            `model.config.seq_len` gives it. It is never taken from a batch.
        use_gamma_var: multiply the variance that attention adds by the mean square of the first site's gain, as the
            authors' option of this name does; None: when warm_start is given, whose gains are far from 1.
        exact_layers: so many layers from the first on get exact second sites too. 1 costs one reduction per model,
            and does without the approximation where it fails: small embeddings in front of the first attention.
        warm_start: multiply each gain by kappa / lam, so that for small arguments a site is the RMSNorm it replaces;
            the first deviation is -(lam/kappa)^2 / 3 (x/rms)^2 relative. For models that were trained with RMSNorm.
            Only exact sites ("bhytstar") begin so near: trained attention adds more variance than the others
            assume.

    Returns:
        The number of sites.

    Raises:
        ValueError: another norm_type; no seq_len; exact_layers below 0; a model that is converted already, has no layer
            that fits, or one that computes something else than is assumed above. Nothing has been changed then.
    """
    if norm_type not in _NORM_TYPES:
        raise ValueError(f"norm_type: expected one of {', '.join(_NORM_TYPES)}, got {norm_type!r}")
    layers = list(decoder_layers(model))
    if not layers:
        raise ValueError(f"model: no layer of {type(model).__name__} has {', '.join(PARTS)}; nothing was converted")
    if any(isinstance(layer, ConvertedLayer) for layer in layers):
        raise ValueError("model: has been converted already")
    if exact_layers < 0:
        raise ValueError(f"exact_layers: expected an integer >= 0, got {exact_layers}")
    exact = norm_type == "bhytstar"
    approximate = [] if exact else layers[exact_layers:]
    seq_len = seq_len or getattr(model.config, "seq_len", None)
    for layer in approximate:
        _check_attention(layer.self_attn)
    if approximate and not seq_len:
        longest = getattr(model.config, "max_position_embeddings", "unknown")
        raise ValueError(
            "seq_len: approximate sites need the sequence length the model is built for (or norm_type='bhytstar');"
            f" the model's max_position_embeddings is {longest}"
        )
    classes = [converted_class(type(layer), check_layer(layer)) for layer in layers]
    norms = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    final = _final_norm(model, layers) if last_layer_lam > 0 and not exact else None
    given_eps = [check_norm(norm) for norm in (norms if final is None else [*norms, final[1]])]
    eps = given_eps[0] if eps is None else eps
    if not warm_start and any((norm.weight != 1).any() for norm in norms if not norm.weight.is_meta):
        warnings.warn(
            "bhyt.hf.convert: the norms of this model have been trained; as BHyT sites they compute another function,"
            " and the model needs further training (warm_start=True begins near the old one)",
            stacklevel=2,
        )

    options = dict(kappa=kappa, eps=eps, learnable_lam=learnable_lam)
    for layer, layer_class in zip(layers, classes):
        second = BHyTApprox if layer in approximate else BHyT
        layer.input_layernorm = _site_for(layer.input_layernorm, BHyT, input_layer_lam, warm_start, options)
        layer.post_attention_layernorm = _site_for(
            layer.post_attention_layernorm, second, post_layer_lam, warm_start, options
        )
        layer.__class__ = layer_class
    if final is not None:
        owner, norm = final
        owner.norm = _site_for(norm, BHyT, last_layer_lam, warm_start, options)
    fields = dict(
        norm_type=norm_type, input_layer_lam=input_layer_lam, post_layer_lam=post_layer_lam,
        last_layer_lam=last_layer_lam, learnable_lam=learnable_lam, bhyt_kappa=kappa, bhyt_eps=eps, seq_len=seq_len,
        use_gamma_var=warm_start if use_gamma_var is None else use_gamma_var, var_approx_exact_layers=exact_layers,
    )
    for name, value in fields.items():
        setattr(model.config, name, value)
    if not any(parameter.is_meta for parameter in model.parameters()):
        refresh(model)
    return len(given_eps)


def _check_attention(attention: nn.Module) -> None:
    """c is that of W_V, a mean over positions, and W_O: nothing may lie between them."""
    needed, known = ("v_proj", "o_proj", "num_key_value_groups", "head_dim"), ("q_proj", "k_proj", "q_norm", "k_norm")
    wrong = [f"no {name}" for name in needed if not hasattr(attention, name)]
    wrong += [name for name, _ in attention.named_children() if name not in needed + known + ("rotary_emb",)]
    wrong += [name for name, _ in attention.named_parameters(recurse=False)]
    if wrong:
        raise ValueError(
            f"model: {type(attention).__name__} has {', '.join(wrong)}, for which an approximate site's constant is not"
            " known; norm_type='bhytstar' needs none"
        )


def _final_norm(model: nn.Module, layers: List[nn.Module]) -> Tuple[nn.Module, nn.Module]:
    """(the module that holds the layers and the final norm, that norm)."""
    for module in model.modules():
        if any(child is layers[-1] for child in getattr(module, "layers", ())) and hasattr(module, "norm"):
            return module, module.norm
    raise ValueError(f"last_layer_lam: {type(model).__name__} has no final norm beside its layers")


def _site_for(norm: nn.Module, kind: type, lam: float, warm_start: bool, options: Dict[str, Any]) -> nn.Module:
    """A site in a norm's place: of its size, device and dtype, with its gain."""
    weight = norm.weight
    site = kind(weight.shape[-1], lam=lam, device=weight.device, dtype=weight.dtype, **options)
    with torch.no_grad():
        site.weight.copy_(weight * (site.kappa / lam if warm_start else 1))
    return site.train(norm.training)


@torch.no_grad()
def refresh(model: nn.Module) -> int:
    """Recompute every approximate site's constant from W_V, W_O and the first site's parameters, as they are now.

    After loading weights, and every so many steps of training: see `refresh_callback`. Adapters, active ones, count.
    With weights that FSDP2, tensor parallelism or DeepSpeed's ZeRO-3 have sharded, every process must call it.

    Args:
        model: a converted model, as it is or wrapped (PEFT, DDP, FSDP2, torch.compile).

    Returns:
        The number of approximate sites.

    Raises:
        ValueError: the model has not been converted.
        RuntimeError: its gains are folded (see `bhyt.fold_gain`).
    """
    layers = [layer for layer in decoder_layers(model) if isinstance(layer, ConvertedLayer)]
    configs = (getattr(module, "config", None) for module in model.modules())
    config = next((config for config in configs if getattr(config, "norm_type", None) in _NORM_TYPES), None)
    if not layers or config is None:
        raise ValueError(f"model: {type(model).__name__} has not been converted")
    approximate = [layer for layer in layers if isinstance(layer.post_attention_layernorm, BHyTApprox)]
    if any(hasattr(layer.input_layernorm, "gain_folded") for layer in approximate):
        raise RuntimeError("model: its gains are folded into W_V, of which c must not be computed; unfold it before")
    for layer in approximate:
        attention, first = layer.self_attn, layer.input_layernorm
        owners = (attention.v_proj, attention.o_proj, first)
        with _gathered([parameter for owner in owners for parameter in owner.parameters()]):
            gain = attention_gain(
                _weight_of(attention.v_proj, first.lam.dtype), _weight_of(attention.o_proj, first.lam.dtype),
                config.seq_len, attention.num_key_value_groups, head_dim=attention.head_dim,
            )
            if getattr(config, "use_gamma_var", False):
                gain = gain * whole(first.weight).to(gain).square().mean()
            layer.post_attention_layernorm.update_variance_offset(gain, first)
    return len(approximate)


def _gathered(parameters: List[Tensor]) -> ContextManager[Any]:
    """Inside, weights that DeepSpeed's ZeRO-3 has partitioned are whole."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def _weight_of(projection: nn.Module, dtype: torch.dtype) -> Tensor:
    """[out, in]: a linear's weight; with adapters or quantised, the matrix that the projection as a whole is."""
    if isinstance(projection, nn.Linear) and projection.weight.dtype in (
        torch.float32, torch.bfloat16, torch.float16, torch.float64,
    ):
        return projection.weight
    tensors = {name: whole(parameter) for name, parameter in projection.named_parameters()}
    device = next(iter(tensors.values())).device
    unit_vectors = torch.eye(projection.in_features, device=device, dtype=dtype)
    training = projection.training
    projection.eval()  # without the adapters' dropout
    try:
        bias = torch.func.functional_call(projection, tensors, (torch.zeros_like(unit_vectors[:1]),))
        return (torch.func.functional_call(projection, tensors, (unit_vectors,)) - bias).T
    finally:
        projection.train(training)


def refresh_callback(every: int = 10) -> Any:
    """A `transformers.TrainerCallback` that refreshes the model every so many optimizer steps, before the first one and
    after the last one (best weights may have been loaded then).

    Args:
        every: optimizer steps between refreshes.

    Raises:
        ValueError: every is below 1.
    """
    from transformers import TrainerCallback  # imports the trainer: seconds

    if every < 1:
        raise ValueError(f"every: expected an integer >= 1, got {every}")

    class RefreshCallback(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
            refresh(model)

        def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
            if state.global_step % every == 0:
                refresh(model)

        on_train_end = on_train_begin

    return RefreshCallback()


def from_config(config: Any, **options: Any) -> nn.Module:
    """A causal language model with the sites its config describes, weights at random; options as
    `AutoModelForCausalLM.from_config` takes them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, **options)
    convert(model, **_sites_in(config))
    return model


def _sites_in(config: Any) -> Dict[str, Any]:
    """What `convert` takes, from a config written by it or by the authors, whose eps is always 1e-6."""
    norm_type = getattr(config, "norm_type", None)
    if norm_type not in _NORM_TYPES:
        raise ValueError(f"config.norm_type: expected one of {', '.join(_NORM_TYPES)}, got {norm_type!r}")
    names = ("input_layer_lam", "post_layer_lam", "last_layer_lam", "learnable_lam", "seq_len", "use_gamma_var")
    fields = {name: getattr(config, name, None) for name in names}
    fields |= {"kappa": getattr(config, "bhyt_kappa", None), "eps": getattr(config, "bhyt_eps", 1e-6)}
    fields |= {"exact_layers": getattr(config, "var_approx_exact_layers", None), "norm_type": norm_type}
    return {name: value for name, value in fields.items() if value is not None}


def from_pretrained(path: Any, *, dtype: Union[torch.dtype, None] = None) -> nn.Module:
    """Load a converted causal language model that `save_pretrained` wrote.

    Args:
        path: a folder with config.json and safetensors (one file or sharded).
        dtype: of the weights; None takes the config's.

    Raises:
        ValueError: the config names no BHyT norm_type, or no seq_len for approximate sites.
        FileNotFoundError: no safetensors.
        RuntimeError: parameters are missing or unknown.
    """
    import transformers
    from safetensors.torch import load_file

    config = transformers.AutoConfig.from_pretrained(path)
    dtype = dtype or getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or torch.float32
    model = from_config(config, **{"torch_dtype" if transformers.__version__ < "5" else "dtype": dtype})
    files = sorted(Path(path).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{path}: has no *.safetensors")
    weights: Dict[str, Tensor] = {}
    for file in files:
        weights |= load_file(file)
    # The authors' lam that is not learnable has no dimension.
    weights = {name: tensor.reshape(1) if name.endswith(".lam") else tensor for name, tensor in weights.items()}
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
        "bhyt_layer_range": None, "bhyt_kappa_schedule": None, "var_approx_method": "baseline",
        "var_approx_calibration": None, "var_approx_exact_layer_list": None,
        "lam_layer_scale": False, "lam_layer_rscale": False,
    }
    for field, default in defaults.items():
        if getattr(config, field, default) not in (default, None):
            raise NotImplementedError(f"config.{field}: not supported, the config asks for {getattr(config, field)!r}")
    return from_pretrained(path, dtype=dtype)
