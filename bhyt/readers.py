"""Which linears read which site, and the checks that a gain can be multiplied into a linear."""

from collections import Counter
from typing import Any, Dict, List

import torch
from torch import nn

from bhyt.modules import BHyT, BHyTApprox

# A decoder layer's sites, the module behind each, its linears that read the site, and what else in it has parameters.
_LAYER = (
    ("input_layernorm", "self_attn", ("q_proj", "k_proj", "v_proj"), {"o_proj", "q_norm", "k_norm"}),
    ("post_attention_layernorm", "mlp", ("gate_proj", "up_proj"), {"down_proj"}),
)
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def decoder_readers(model: nn.Module) -> Dict[str, List[str]]:
    """Find the linears that read each site of a model whose modules are named as in Llama.

    Args:
        model: with BHyT sites.

    Returns:
        The name of each site, with the names of the linears that read it.

    Raises:
        ValueError: a layer has further modules that may read a site.
    """
    readers: Dict[str, List[str]] = {}
    heads = [(name, module) for name, module in model.named_modules() if name.split(".")[-1] == "lm_head"]
    for owner, module in model.named_modules():
        prefix = f"{owner}." if owner else ""
        if all(hasattr(module, name) for part in _LAYER for name in part[:2]):
            for site, part, linears, others in _LAYER:
                if not isinstance(getattr(module, site), (BHyT, BHyTApprox)):
                    continue
                known = others.union(linears)
                for name, child in getattr(module, part).named_children():
                    if name not in known and any(True for _ in child.parameters()):
                        raise ValueError(
                            f"{prefix}{part}.{name}: may read {prefix}{site} too; name the linears that do in `readers`"
                        )
                readers[f"{prefix}{site}"] = [f"{prefix}{part}.{name}" for name in linears]
        if hasattr(module, "layers") and isinstance(getattr(module, "norm", None), (BHyT, BHyTApprox)):
            tied = {id(child.weight) for child in model.modules() if isinstance(child, nn.Embedding)}
            if len(heads) == 1 and id(getattr(heads[0][1], "weight", None)) not in tied:
                readers[f"{prefix}norm"] = [heads[0][0]]
    return readers


def module_of(model: nn.Module, name: str) -> nn.Module:
    """The module of this name.

    Args:
        model: any module.
        name: as in `model.named_modules()`.

    Returns:
        The module.

    Raises:
        ValueError: the model has no such module.
    """
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"{name}: {type(model).__name__} has no such module; see `readers`") from error


def check_linear(name: str, linear: Any, size: int, folded: bool = False, meta: bool = False) -> None:
    """Check that a linear is exactly nn.Linear: quantisation and adapters are subclasses of it, or wrappers around it.

    Args:
        name: for the message.
        linear: the module.
        size: the number of columns that its weight must have.
        folded: whether a gain may have been folded into it.
        meta: whether its weight may be on the meta device.

    Raises:
        ValueError: another class, another kind of weight or another size.
    """
    if type(linear) is not nn.Linear:
        raise ValueError(f"{name}: expected torch.nn.Linear, got {type(linear).__module__}.{type(linear).__name__}")
    weight, kind = linear.weight, type(linear.weight)
    if hasattr(linear, "gain_folded") and not folded:
        raise ValueError(f"{name}: a gain is folded into it already")
    if kind is not nn.Parameter or weight.is_meta and not meta or weight.dtype not in _DTYPES:
        raise ValueError(f"{name}: expected a plain weight, got {kind.__name__} {weight.dtype} on {weight.device}")
    if weight.dim() != 2 or weight.shape[1] != size:
        raise ValueError(f"{name}: expected a weight [.., {size}], got {list(weight.shape)}")


def times_used(model: nn.Module) -> Dict[int, int]:
    """Count the places of each parameter in a model.

    Args:
        model: any module.

    Returns:
        The id of each parameter, with the number of its places.
    """
    return Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
