"""Gains folded into the linears that read them, W (gamma * t) = (W gamma) t: the kernels then read no gain."""

from types import TracebackType
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Type

import torch
from torch import nn

from bhyt.modules import BHyT, BHyTApprox
from bhyt.readers import check_linear, decoder_readers, module_of, times_used


class FoldedGain:
    """The handle that `fold_gain` returns: `unfold()`, or the end of a `with` block, undoes the folding.

    Attributes:
        sites: names of the sites whose gains are folded.
    """

    def __init__(self, sites: Sequence[str]) -> None:
        self.sites = tuple(sites)
        self._originals: List[Tuple[Any, nn.Parameter]] = []  # (module, its weight)

    @torch.inference_mode(False)
    @torch.no_grad()
    def unfold(self) -> None:
        """Put back the gains and weights: the same Parameter objects, the same bits, on the device of the model now.

        A second call does nothing.
        """
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
    """Multiply the columns of the linears that read a site by its gain, and drop the gain. For inference.

    W (gamma * t) = (W gamma) t, so the kernels then read no gain. Used as a context manager, the handle unfolds at the
    end: `with bhyt.fold_gain(model): model.generate(..)`.

    What changes: a folded site has `weight` None. Each product is rounded once to the linear's dtype, so outputs differ
    by rounding. Hidden states taken behind a folded final norm lack its gain. Variance offsets stay, and
    `update_variance_offset` refuses a folded first site, because its W_V holds products.

    Unfolding is exact: the originals are kept on the CPU. There the memory of the folded linears doubles; on a GPU it
    does not. The folded weights are other Parameters, without gradient, and optimisers go on holding the originals.

    Limits: move the model between devices at any time, but cast it unfolded. A copy of a folded model runs and cannot
    be unfolded. The state dict of a folded model has the products and lacks the gains, which strict loading reports.
    Fold before capturing CUDA graphs.

    Args:
        model: any module that holds both sites and linears.
        readers: for each site, by its name in `model.named_modules()`, the names of all linears that read it. No other
            module may read it. None: the sites and linears of every layer with `input_layernorm`, `self_attn`,
            `post_attention_layernorm` and `mlp`. There q_proj, k_proj and v_proj read the first site, gate_proj and
            up_proj the second. The `lm_head` reads the site `norm` beside the `layers`. That site stays as it is where
            there is no head, or where the head shares its weight with the embeddings. Other sites, and sites without a
            gain, stay as they are.

    Returns:
        The handle that undoes the folding.

    Raises:
        ValueError: nothing to fold; a site or linear that is folded already; a linear that is quantised, sharded,
            wrapped by an adapter, on the meta device, tied to another module, reading two sites, or not of the site's
            size; a layer with further modules that may read the site. The model is then unchanged.

    Examples:
        >>> import torch, bhyt
        >>> model = torch.nn.ModuleDict({"norm": bhyt.BHyT(4), "up": torch.nn.Linear(4, 8)})
        >>> with bhyt.fold_gain(model, readers={"norm": ["up"]}) as folded:
        ...     folded.sites, model["norm"].weight
        (('norm',), None)
    """
    pairs = decoder_readers(model) if readers is None else readers
    uses = times_used(model)
    sites: Dict[str, Any] = {}
    linears: Dict[Any, nn.Parameter] = {}  # a linear -> the gain to multiply it by
    for name, linear_names in pairs.items():
        site: Any = module_of(model, name)
        _check_site(name, site)
        if site.weight is None:
            continue
        if not linear_names or site in sites.values():
            raise ValueError(f"{name}: expected once, with all linears that read it")
        sites[name] = site
        for linear_name in linear_names:
            linear: Any = module_of(model, linear_name)
            check_linear(linear_name, linear, site.hidden_size)
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


def _check_site(name: str, site: Any) -> None:
    if not isinstance(site, (BHyT, BHyTApprox)):
        raise ValueError(f"{name}: expected a BHyT site, got {type(site).__name__}")
    if hasattr(site, "gain_folded"):
        raise ValueError(f"{name}: its gain is folded already")
    if site.weight is not None and (type(site.weight) is not nn.Parameter or site.weight.is_meta):
        raise ValueError(f"{name}: expected a plain gain, got {type(site.weight).__name__} on {site.weight.device}")
