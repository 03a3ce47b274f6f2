"""Sites on jagged nested tensors."""

from typing import Any, Callable, Dict, Mapping, Optional

import torch
from torch import Tensor


def on_values(site: Callable[..., Any], x: Tensor, tensors: Mapping[str, Optional[Tensor]], **options: Any) -> Any:
    """Call a site on jagged nested tensors. Rows are independent, so the site runs on all rows packed.

    Args:
        site: takes x and the other tensors by name.
        x: [batch, ragged, .., d].
        tensors: the other arguments by name, [batch, ragged, .., d] or [batch, ragged, .., 1], with the offsets of x.
        **options: further arguments, passed on.

    Returns:
        The site's results as nested tensors with the offsets of x.

    Raises:
        ValueError: a tensor of another layout, or with other offsets.
    """
    given: Dict[str, Any] = {"x": x, **tensors}
    values = {}
    for name, tensor in given.items():
        if tensor is not None and not (tensor.is_nested and tensor.layout == torch.jagged and tensor._ragged_idx == 1):
            raise ValueError(
                f"{name}: expected a jagged nested tensor [batch, ragged, .., d], as x, got {tensor.layout}"
            )
        if tensor is not None and tensor.shape[:2] != x.shape[:2]:
            raise ValueError(f"{name}: expected the offsets of x, got others")
        values[name] = None if tensor is None else tensor.values()
    results = site(**values, **options)
    offsets, lengths = given["x"].offsets(), given["x"].lengths()
    nested = [
        torch.nested.nested_tensor_from_jagged(rows, offsets=offsets, lengths=lengths)
        for rows in (results if isinstance(results, tuple) else (results,))
    ]
    return tuple(nested) if isinstance(results, tuple) else nested[0]
