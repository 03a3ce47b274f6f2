"""Turns a float model into an eight-bit model."""

from typing import Any, Dict, List, Mapping, Optional, Sequence

import torch
from torch import nn

from bhyt.modules import BHyT, BHyTApprox
from bhyt.quantization.linear import LARGEST, QuantizedLinear
from bhyt.quantization.sites import QuantizedBHyT, QuantizedBHyTApprox, QuantizedSite
from bhyt.readers import check_linear, decoder_readers, module_of, times_used

_OTHERS = ("o_proj", "down_proj", "lm_head")  # Llama's linears that read no site
_QUANTIZED = {BHyT: QuantizedBHyT, BHyTApprox: QuantizedBHyTApprox}


@torch.inference_mode(False)
@torch.no_grad()
def quantize(
    model: nn.Module,
    *,
    dtype: torch.dtype = torch.int8,
    readers: Optional[Mapping[str, Sequence[str]]] = None,
    others: Sequence[str] = _OTHERS,
) -> int:
    """Turn a model with BHyT sites into an eight-bit model, in place. Keep the float model if you need it.

    Gains are folded into the linears that read a site. These linears get weights of `dtype` with a scale per output
    channel, and read the site's integers y / scale. The scale is 1/127 (1/448 for float8): the bound gives it, without
    data. `others` get the same weights, and quantise their input with a scale per row.

    Afterwards the model is in eval mode, without gradients, and refuses to run in training mode. It compiles, exports
    and is saved like any other model. A state dict loads into a model that was quantised in the same way, with any
    weights. A `transformers` model notes the quantisation in its config, so from_pretrained loads an eight-bit model.

    Args:
        model: converted by `bhyt.hf.convert`, or with sites used by hand.
        dtype: int8, or float8_e4m3fn on CUDA devices whose matrix products take it (compute capability 8.9 and newer).
        readers: as for `bhyt.fold_gain`: for each site by name, the names of all linears that read it. None: the
            readers are found by the names of Llama's modules.
        others: the last parts of the names of further linears. A name that no module has is an error. Llama's three
            names may be absent.

    Returns:
        The number of linears.

    Raises:
        ValueError: another dtype, or a dtype that the device lacks; a model without sites whose readers are known; a
            site that is quantised already, or whose offset has not been set; a linear that is not a plain
            torch.nn.Linear, reads two sites, or is tied to another module; a name in `others` that no module has. The
            model is then unchanged.
    """
    pairs = decoder_readers(model) if readers is None else readers
    linears = _checked(model, pairs, others, dtype)
    last_names = {name.split(".")[-1] for name, _ in model.named_modules()}
    absent = [name for name in others if name not in last_names and name not in _OTHERS]
    if absent:
        raise ValueError(f"others: {type(model).__name__} has no linear called {absent[0]}")
    unset = [
        name
        for name in pairs
        if isinstance(site := module_of(model, name), BHyTApprox)
        and not site.variance_offset.is_meta
        and not site.has_variance_offset()
    ]
    if unset:
        raise ValueError(f"{unset[0]}: its variance offset has not been set; update or refresh it before")
    return _install(model, pairs, linears, others, dtype, readers)


def quantized_as(
    model: nn.Module, dtype: str, readers: Optional[Mapping[str, Sequence[str]]], others: List[str]
) -> None:
    """Give a model that is about to load eight-bit weights the modules that `quantize` noted in its config.

    Args:
        model: a model with BHyT sites, whose weights are not loaded yet.
        dtype: "int8" or "float8_e4m3fn".
        readers: as for `quantize`.
        others: as for `quantize`.

    Raises:
        ValueError: as from `quantize`.
    """
    pairs = decoder_readers(model) if readers is None else readers
    kind = getattr(torch, dtype)
    _install(model, pairs, _checked(model, pairs, others, kind), others, kind, readers)


def _install(
    model: nn.Module, pairs: Mapping[str, Sequence[str]], linears: Dict[str, Optional[str]], others: Sequence[str],
    dtype: torch.dtype, readers: Optional[Mapping[str, Sequence[str]]],
) -> int:  # fmt: skip
    scale = 1 / LARGEST[dtype]
    made: Dict[str, QuantizedLinear] = {}
    for name, site_name in linears.items():
        linear: Any = module_of(model, name)
        if site_name is None:
            made[name] = QuantizedLinear(linear, dtype)
        else:
            site: Any = module_of(model, site_name)
            made[name] = QuantizedLinear(linear, dtype, scale, site.weight)
    config: Any = getattr(model, "config", None)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    tied = any(id(module_of(model, name).weight) in embeddings for name in made)

    for name, quantized in made.items():
        owner, _, last = name.rpartition(".")
        setattr(module_of(model, owner), last, quantized.train(False))
    for name in pairs:
        site = module_of(model, name)
        site.__class__ = _QUANTIZED[type(site)]
        site.weight, site.gain_folded, site.quantized_dtype, site.scale = None, True, dtype, scale
    model.eval().requires_grad_(False)
    if hasattr(config, "to_dict"):  # of transformers
        names = None if readers is None else {name: list(linears) for name, linears in readers.items()}
        config.bhyt_quantization = {
            "dtype": str(dtype).removeprefix("torch."), "readers": names, "others": list(others),
        }  # fmt: skip
        if tied:
            config.tie_word_embeddings = False
    return len(made)


def _checked(
    model: nn.Module, pairs: Mapping[str, Sequence[str]], others: Sequence[str], dtype: torch.dtype
) -> Dict[str, Optional[str]]:
    """Each linear to quantise, and the site that it reads, if it is not one of `others`."""
    if dtype not in LARGEST:
        raise ValueError(f"dtype: expected torch.int8 or torch.float8_e4m3fn, got {dtype}")
    quantized = [name for name, module in model.named_modules() if isinstance(module, (QuantizedSite, QuantizedLinear))]
    if quantized:
        raise ValueError(f"{quantized[0]}: is quantised already")
    if not pairs:
        raise ValueError(
            f"model: {type(model).__name__} has no BHyT site whose linears are known: convert it before"
            " (bhyt.hf.convert), or name them in `readers`"
        )
    uses = times_used(model)
    linears: Dict[str, Optional[str]] = {}
    for name, linear_names in pairs.items():
        site: Any = module_of(model, name)
        if type(site) not in _QUANTIZED:
            raise ValueError(f"{name}: expected a BHyT site, got {type(site).__name__}")
        if not linear_names:
            raise ValueError(f"{name}: expected all linears that read it, got none")
        for linear_name in linear_names:
            linear: Any = module_of(model, linear_name)
            folded = hasattr(linear, "gain_folded")
            if folded and site.weight is not None:
                raise ValueError(f"{linear_name}: a gain is folded into it, and {name} has one that is not")
            check_linear(linear_name, linear, site.hidden_size, folded=folded, meta=True)
            if linear_name in linears or uses[id(linear.weight)] > 1:
                raise ValueError(f"{linear_name}: its weight is read by something else too, and would be wrong there")
            linears[linear_name] = name
    for name, module in model.named_modules():
        if name.split(".")[-1] in others and name not in linears:
            check_linear(name, module, getattr(module, "in_features", 0), meta=True)
            linears[name] = None
    if dtype == torch.float8_e4m3fn:
        for name in linears:
            _check_float8(name, module_of(model, name).weight.device)  # type: ignore[arg-type]
    return linears


def _check_float8(name: str, device: torch.device) -> None:
    if device.type == "meta" or device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        return
    raise ValueError(
        f"dtype: float8_e4m3fn needs a CUDA device of compute capability 8.9 or newer, {name} is on {device}; use"
        " torch.int8"
    )
