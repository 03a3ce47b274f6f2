"""Groups of parameters for optimizers: weight decay must leave gains and lam alone."""

from typing import Any, Dict, List

from torch import nn


def _dimensions(parameter: nn.Parameter) -> int:
    """The number of dimensions. DeepSpeed's ZeRO-3 leaves an empty vector in place of a parameter, with ds_shape."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def parameter_groups(model: nn.Module, weight_decay: float) -> List[Dict[str, Any]]:
    """Parameter groups for an optimizer: matrices decay; gains, biases and every site's lam do not.

    Decay pulls lam towards 0, where a site is linear and its output vanishes (2.21 becomes 1.97 in 200 steps).
    `transformers.Trainer` makes the same choice by itself for converted models, whose sites have "norm" in their names.

    Args:
        model: any model; parameters that do not require gradients are left out.
        weight_decay: for parameters with two dimensions and more (weights of linears, embeddings, convolutions).

    Returns:
        Two groups, {"params": [..], "weight_decay": ..}; a parameter that is shared is in one of them, once.

    Raises:
        ValueError: nothing to train, or a negative weight_decay.

    Examples:
        >>> import torch, bhyt
        >>> model = torch.nn.Sequential(bhyt.BHyT(4), torch.nn.Linear(4, 8))
        >>> optimizer = torch.optim.AdamW(bhyt.parameter_groups(model, weight_decay=0.1), lr=3e-4)
        >>> [len(group["params"]) for group in optimizer.param_groups]
        [1, 3]
    """
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay: expected a number >= 0, got {weight_decay}")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError(f"model: {type(model).__name__} has no parameter that requires a gradient")
    return [
        {"params": [p for p in parameters if _dimensions(p) >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if _dimensions(p) < 2], "weight_decay": 0.0},
    ]
