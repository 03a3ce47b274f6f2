"""The variance offset of a layer's second site: c of its attention, as its weights are now."""

import contextlib
from typing import Any, Iterable, Iterator, Tuple

import torch
from torch import Tensor, nn

from bhyt.gain import attention_gain, whole
from bhyt.modules import BHyT, BHyTApprox

_PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@torch.no_grad()
def update_offset(layer: Any, seq_len: int, use_gamma_var: bool) -> None:
    """Set a converted layer's offset from W_V, W_O and the first site's lam and, with use_gamma_var, gain.

    Raises:
        RuntimeError: the first site's gain is folded (see `bhyt.fold_gain`); a weight has not been loaded (meta).
    """
    attention, first = layer.self_attn, active_site(layer.input_layernorm)
    if hasattr(first, "gain_folded"):
        raise RuntimeError("model: its gains are folded into W_V, of which c must not be computed; unfold it before")
    with _present(attention.v_proj, attention.o_proj, first):
        gain = attention_gain(
            matrix_of(attention.v_proj, first.lam.dtype), matrix_of(attention.o_proj, first.lam.dtype),
            seq_len, attention.num_key_value_groups, head_dim=attention.head_dim,
        )
        if use_gamma_var and first.weight is not None:
            gain = gain * whole(first.weight).to(gain).square().mean()
        for site in layer.post_attention_layernorm.modules():  # in a wrapper, the original and the adapters' copies
            if isinstance(site, BHyTApprox):
                site.update_variance_offset(gain, first)


def active_site(module: Any) -> Any:
    """The site that a module runs: the module itself or, in PEFT's wrappers, the active adapter's copy of it."""
    if isinstance(module, (BHyT, BHyTApprox)):
        return module
    copies: Any = getattr(module, "modules_to_save", None) or getattr(module, "ln_tuning_layers", None)
    original: Any = getattr(module, "original_module", None) or getattr(module, "base_layer", None)
    if copies is None or original is None:
        raise TypeError(f"model: expected a BHyT site or PEFT's wrapper of one, got {type(module).__name__}")
    if module.disable_adapters or getattr(module, "merged", False):
        return original
    return next((copies[name] for name in _names(module.active_adapter) if name in copies), original)


def active_adapters(attention: Any) -> Tuple[Any, ...]:
    """Names of PEFT's adapters that W_V and W_O are computed with now; merged ones count as active."""
    projections = (attention.v_proj, attention.o_proj)
    return tuple(
        tuple(_names(p.active_adapters)) if hasattr(p, "disable_adapters") and not p.disable_adapters else ()
        for p in projections
    )


def _names(adapters: Any) -> Iterable[str]:
    return [adapters] if isinstance(adapters, str) else adapters


@contextlib.contextmanager
def _present(*owners: nn.Module) -> Iterator[None]:
    """Inside, weights that DeepSpeed's ZeRO-3 has partitioned are whole, and those accelerate offloads are here."""
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


def matrix_of(projection: Any, dtype: torch.dtype) -> Tensor:
    """[out, in]: a linear's weight; with adapters or quantised, the matrix that the projection as a whole is."""
    if isinstance(projection, nn.Linear):
        weight = whole(projection.weight)
        if type(weight) in (Tensor, nn.Parameter) and weight.dtype in _PLAIN:
            return weight
    tensors = {name: whole(parameter) for name, parameter in projection.named_parameters()}
    device = next(iter(tensors.values())).device
    unit_vectors = torch.eye(projection.in_features, device=device, dtype=dtype)
    training = projection.training
    projection.eval()  # without the adapters' dropout
    try:
        bias = torch.func.functional_call(projection, tensors, (torch.zeros_like(unit_vectors[:1]),))
        matrix: Tensor = (torch.func.functional_call(projection, tensors, (unit_vectors,)) - bias).T
        return matrix
    finally:
        projection.train(training)
