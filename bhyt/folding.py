"""Gains folded into the linears that read them, W (gamma * t) = (W gamma) t: the kernels then read no gain."""

from collections import Counter
from types import TracebackType
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Type

import torch
from torch import nn

from bhyt.modules import BHyT, BHyTApprox

# A decoder layer's sites, the module behind each, its linears that read the site, and what else in it has parameters.
_LAYER = (
    ("input_layernorm", "self_attn", ("q_proj", "k_proj", "v_proj"), {"o_proj", "q_norm", "k_norm"}),
    ("post_attention_layernorm", "mlp", ("gate_proj", "up_proj"), {"down_proj"}),
)
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class FoldedGain:
    """What `fold_gain` returns: undoes it by `unfold()`, or on leaving it as a context manager.

    Attributes:
        sites: names of the sites whose gains are folded.
    """

    def __init__(self, sites: Sequence[str]) -> None:
        self.sites = tuple(sites)
        self._originals: List[Tuple[Any, nn.Parameter]] = []  # (module, its weight)

    @torch.inference_mode(False)
    @torch.no_grad()
    def unfold(self) -> None:
        """Put back the gains and weights: the same Parameter objects, the same bits. A second call does nothing."""
        while self._originals:
            module, weight = self._originals.pop()
            placed = module.weight if module.weight is not None else module.lam
            weight.data = weight.data.to(placed.device)
            module.weight = weight
            del module.gain_folded

    def __enter__(self) -> "FoldedGain":
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.unfold()


@torch.inference_mode(False)
@torch.no_grad()
def fold_gain(model: nn.Module, readers: Optional[Mapping[str, Sequence[str]]] = None) -> FoldedGain:
    """For inference: multiply the columns of the linears that read a site by its gain, and drop the gain.

        with bhyt.fold_gain(model):
            model.generate(..)

    A folded site has `weight` None. Each product is rounded once to the linear's dtype, so outputs differ from those
    before by rounding. Variance offsets stay what they were, and `update_variance_offset` refuses a folded first site,
    whose W_V is not itself. Hidden states taken behind a folded final norm lack its gain.

    Exactly reversible, because the originals are kept, on the CPU: there the memory of the folded linears doubles, on a
    GPU it does not. The folded weights are other Parameters, without gradient; optimisers go on holding the originals,
    which `unfold()` brings back. Move the model between devices at any time, cast it unfolded only. A copy of a folded
    model runs and cannot be unfolded. Its state dict has the products and lacks the gains, which strict loading
    reports. Fold before capturing CUDA graphs.

    Args:
        model: any module that holds both sites and linears.
        readers: for each site, by its name in `model.named_modules()`, the names of all linears that read it; nothing
            else may. None: for every layer with `input_layernorm`, `self_attn`, `post_attention_layernorm` and `mlp`,
            q_proj, k_proj and v_proj read the first site, gate_proj and up_proj the second; the `lm_head` reads the
            site `norm` beside the `layers`, which is left alone where there is no head, or it shares its weight with
            the embeddings. Other sites are left alone; so are those without a gain.

    Returns:
        The handle to undo it.

    Raises:
        ValueError: nothing to fold; a site or linear that is folded already; a linear that is quantised, sharded,
            wrapped by an adapter, on the meta device, tied to another module, read by two sites, or not of the site's
            size; a layer with further modules that may read the site. The model has not been changed then.
    """
    pairs = _decoder_readers(model) if readers is None else readers
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    sites: Dict[str, Any] = {}
    linears: Dict[Any, nn.Parameter] = {}  # and the gain to multiply it by
    for name, linear_names in pairs.items():
        site: Any = _module(model, name)
        _check_site(name, site)
        if site.weight is None:
            continue
        if not linear_names or site in sites.values():
            raise ValueError(f"{name}: expected once, with all linears that read it")
        sites[name] = site
        for linear_name in linear_names:
            linear: Any = _module(model, linear_name)
            _check_linear(linear_name, linear, site.hidden_size)
            if linear in linears or uses[id(linear.weight)] > 1:
                raise ValueError(f"{linear_name}: its weight is read by something else too, and would be wrong there")
            linears[linear] = site.weight
    if not sites:
        raise ValueError(f"model: {type(model).__name__} has no gain that can be folded")

    folded = FoldedGain(list(sites))
    try:
        for linear, gain in linears.items():
            product = (linear.weight * gain).to(linear.weight.dtype)
            _replace(folded, linear, nn.Parameter(product, requires_grad=False))
        for site in sites.values():
            _replace(folded, site, None)
    except BaseException:  # out of memory, interrupted
        folded.unfold()
        raise
    return folded


def _replace(folded: FoldedGain, module: Any, weight: Optional[nn.Parameter]) -> None:
    original = module.weight
    original.data = original.data.cpu()
    module.weight = weight
    module.gain_folded = True
    folded._originals.append((module, original))


def _decoder_readers(model: nn.Module) -> Dict[str, List[str]]:
    """The rule of `fold_gain` for models whose modules are named as in Llama."""
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


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"{name}: {type(model).__name__} has no such module; see `readers`") from error


def _check_site(name: str, site: Any) -> None:
    if not isinstance(site, (BHyT, BHyTApprox)):
        raise ValueError(f"{name}: expected a BHyT site, got {type(site).__name__}")
    if hasattr(site, "gain_folded"):
        raise ValueError(f"{name}: its gain is folded already")
    if site.weight is not None and (type(site.weight) is not nn.Parameter or site.weight.is_meta):
        raise ValueError(f"{name}: expected a plain gain, got {type(site.weight).__name__} on {site.weight.device}")


def _check_linear(name: str, linear: Any, size: int, folded: bool = False, meta: bool = False) -> None:
    """Exactly nn.Linear: quantisation and adapters come as its subclasses, or as wrappers around it."""
    if type(linear) is not nn.Linear:
        raise ValueError(f"{name}: expected torch.nn.Linear, got {type(linear).__module__}.{type(linear).__name__}")
    weight, kind = linear.weight, type(linear.weight)
    if hasattr(linear, "gain_folded") and not folded:
        raise ValueError(f"{name}: a gain is folded into it already")
    if kind is not nn.Parameter or weight.is_meta and not meta or weight.dtype not in _DTYPES:
        raise ValueError(f"{name}: expected a plain weight, got {kind.__name__} {weight.dtype} on {weight.device}")
    if weight.dim() != 2 or weight.shape[1] != size:
        raise ValueError(f"{name}: expected a weight [.., {size}], got {list(weight.shape)}")
