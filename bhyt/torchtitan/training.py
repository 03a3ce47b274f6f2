"""What runs once the optimizers are built, and after steps: no decay of gains and lam, refreshes of the offsets."""

from typing import Any, Callable, Iterable, List, Optional

from torch import nn

from bhyt.modules import BHyT, BHyTApprox
from bhyt.torchtitan.block import ConvertedBlock


def refresh(model_parts: Any) -> int:
    """Recompute the offset of every approximate site from W_V, W_O and lam, as they are now.

    torchtitan's trainer does it before training and every so many steps (see `convert`). With sharded weights every
    process must call it, between steps.

    Args:
        model_parts: a model, or the parts of one that this process has (`trainer.model_parts`).

    Returns:
        The number of approximate sites.

    Raises:
        ValueError: no part has a converted block.
        RuntimeError: a weight is one process's shard, or not loaded (meta).
    """
    parts = [model_parts] if isinstance(model_parts, nn.Module) else list(model_parts)
    if not _blocks(parts):
        raise ValueError("model_parts: no block has been converted; see bhyt.torchtitan.convert")
    return _refresh(parts)


def _blocks(model_parts: Iterable[nn.Module]) -> List[Any]:
    return [module for part in model_parts for module in part.modules() if isinstance(module, ConvertedBlock)]


def _refresh(model_parts: Iterable[nn.Module]) -> int:
    approximate = [block for block in _blocks(model_parts) if block.is_approximate]
    for block in approximate:
        block.refresh()
    return len(approximate)


def after_optimizers(
    optimizers: Any, model_parts: Any, parallel_dims: Any, *, every: int, before: Optional[Callable[..., None]]
) -> None:
    """`ModelSpec.post_optimizer_build_fn` of a converted config, behind the one that it had."""
    if before is not None:
        before(optimizers, model_parts, parallel_dims)
    _stop_decay(optimizers, model_parts)
    _refresh(model_parts)
    optimizers.register_step_post_hook(_EverySoManySteps(every, optimizers, model_parts))


class _EverySoManySteps:
    """Counts optimizer steps from the beginning of training: a resumed run refreshes when the other would have."""

    def __init__(self, every: int, optimizers: Any, model_parts: Any) -> None:
        self._every, self._optimizers, self._model_parts = every, optimizers, model_parts
        self._steps: Optional[int] = None

    def __call__(self, *_: Any) -> None:
        blocks = _blocks(self._model_parts)
        if not blocks:
            return
        if self._steps is None:  # a checkpoint has been loaded since construction, or not
            lam = blocks[0].attention_norm.lam
            self._steps = next(int(o.state[lam]["step"].item()) for o in self._optimizers if lam in o.state)
        else:
            self._steps += 1
        if self._steps % self._every == 0:
            _refresh(self._model_parts)


def _stop_decay(optimizers: Any, model_parts: Any) -> None:
    """Gains and lam of sites leave groups with weight decay for groups of the same options without."""
    sites = [m for part in model_parts for m in part.modules() if isinstance(m, (BHyT, BHyTApprox))]
    chosen = {id(parameter) for site in sites for parameter in site.parameters()}
    for optimizer in optimizers:
        for group in list(optimizer.param_groups):
            pairs = list(zip(group["params"], group["param_names"]))
            ours = [pair for pair in pairs if id(pair[0]) in chosen]
            if not ours or not group["weight_decay"]:
                continue
            if len(ours) == len(pairs):
                group["weight_decay"] = 0.0
                continue
            others = [pair for pair in pairs if id(pair[0]) not in chosen]
            group["params"], group["param_names"] = map(list, zip(*others))
            params, names = map(list, zip(*ours))
            optimizer.add_param_group({**group, "params": params, "param_names": names, "weight_decay": 0.0})
