"""W_V and W_O of a layer as they are now: with adapters, quantised, offloaded or sharded."""

import contextlib
from typing import Any, Hashable, Iterable, Iterator, List, Optional, Tuple

import torch
from torch import Tensor, nn

from bhyt.gain import whole
from bhyt.modules import BHyT, BHyTApprox

_PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def matrix_of(projection: Any, dtype: torch.dtype, adapter: Optional[str] = None) -> Tensor:
    """The matrix by which a projection multiplies.

    Args:
        projection: a linear, or a linear with adapters, or a quantised one.
        dtype: of the rows that a projection with adapters, or a quantised one, is run on.
        adapter: the adapter to run instead of the active ones, if the projection has PEFT's adapters.

    Returns:
        [out, in]: a linear's own weight; otherwise the matrix of the projection as a whole.
    """
    if isinstance(projection, nn.Linear):
        weight = whole(projection.weight)
        if type(weight) in (Tensor, nn.Parameter) and weight.dtype in _PLAIN:
            return weight
    tensors = {name: whole(parameter) for name, parameter in projection.named_parameters()}
    device = next(iter(tensors.values())).device
    rows = torch.eye(projection.in_features + 1, projection.in_features, device=device, dtype=dtype)
    named = {"adapter_names": [adapter] * len(rows)} if adapter and hasattr(projection, "active_adapters") else {}
    training, hooks = projection.training, projection._forward_pre_hooks
    projection.eval()  # without the adapters' dropout
    projection._forward_pre_hooks = type(hooks)()  # nor the adapters of the batch at hand
    try:
        images: Tensor = torch.func.functional_call(projection, tensors, (rows,), named)
        return (images[:-1] - images[-1]).T  # the last row is 0, whose image is the bias
    finally:
        projection.train(training)
        projection._forward_pre_hooks = hooks


@contextlib.contextmanager
def present(*owners: nn.Module) -> Iterator[None]:
    """Inside, weights that DeepSpeed's ZeRO-3 has partitioned are whole, and weights that accelerate offloads are here.

    Args:
        *owners: the modules that have the weights.

    Raises:
        RuntimeError: a weight has not been loaded (meta).
    """
    parameters = [parameter for owner in owners for parameter in owner.parameters()]
    with contextlib.ExitStack() as stack:
        if any(hasattr(parameter, "ds_id") for parameter in parameters):
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(parameters))
        for module in (module for owner in owners for module in owner.modules()):
            if hasattr(module, "_hf_hook"):
                from accelerate.utils import align_module_device

                stack.enter_context(align_module_device(module))
        if any(parameter.is_meta for owner in owners for parameter in owner.parameters()):
            raise RuntimeError("model: its variance offset has not been set, and its weights are not loaded")
        yield


def active_site(module: Any) -> Any:
    """The site that a module runs.

    Args:
        module: a site, or PEFT's wrapper of one.

    Returns:
        The module itself or, in a wrapper, the active adapter's copy of the site.

    Raises:
        TypeError: the module is neither.
    """
    if isinstance(module, (BHyT, BHyTApprox)):
        return module
    copies: Any = getattr(module, "modules_to_save", None) or getattr(module, "ln_tuning_layers", None)
    original: Any = getattr(module, "original_module", None) or getattr(module, "base_layer", None)
    if copies is None or original is None:
        raise TypeError(f"model: expected a BHyT site or PEFT's wrapper of one, got {type(module).__name__}")
    if module.disable_adapters or getattr(module, "merged", False):
        return original
    return next((copies[name] for name in _names(module.active_adapter) if name in copies), original)


def active_adapters(attention: Any) -> Tuple[Hashable, ...]:
    """PEFT's adapters that are active on W_V and W_O, and the adapters that are merged into them.

    Args:
        attention: the attention of a decoder layer.

    Returns:
        For each of the two that has adapters: the names of both kinds.
    """
    projections = [getattr(attention, name, None) for name in ("v_proj", "o_proj")]  # engines merge q, k and v
    return tuple(_adapters(p) for p in projections if hasattr(p, "disable_adapters"))


def _adapters(projection: Any) -> Hashable:
    active = () if projection.disable_adapters else tuple(_names(projection.active_adapters))
    return active, tuple(getattr(projection, "merged_adapters", ()))


def _names(adapters: Any) -> Iterable[str]:
    return [adapters] if isinstance(adapters, str) else adapters


def adapters_of_rows(*modules: Any) -> Optional[List[str]]:
    """The adapter that PEFT has been asked to run each row of the batch with.

    Args:
        *modules: PEFT's modules of a layer.

    Returns:
        A name for each row, "__base__" for no adapter; None where the whole batch has the active adapters.

    Raises:
        NotImplementedError: an adapter for a part of each row's positions only.
    """
    for module in modules:
        for hook in module._forward_pre_hooks.values():
            given = getattr(hook, "keywords", None) or {}  # PEFT hands them over by hooks on its modules
            if given.get("alora_offsets") is not None:
                raise NotImplementedError(
                    "model: alora_offsets: an adapter on v_proj or o_proj that is active at some positions of a row has"
                    " no variance offset; convert with norm_type='bhytstar'"
                )
            if given.get("adapter_names") is not None:
                return list(given["adapter_names"])
    return None
