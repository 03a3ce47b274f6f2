"""What the two kinds of site share: their options, parameters and checks."""

from typing import Any, Callable, Dict, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]


class Site(nn.Module):
    """Parameters and options that exact and approximate sites share.

    Args:
        hidden_size: d, the size of the last dimension: an integer, or a shape of one dimension.
        lam: initial value of `lam`.
        kappa: > 0.
        eps: >= 0, added to the variance.
        learnable_lam: False makes `lam` a buffer.
        elementwise_affine: False leaves out the gain `weight`.
        device: device of `weight` and `lam`.
        dtype: dtype of `weight` and `lam`.

    Attributes:
        weight: [hidden_size] parameter, or None.
        lam: [1] parameter or buffer.

    Raises:
        ValueError: an option that is not as described.
    """

    weight: Optional[Tensor]
    lam: Tensor

    def __init__(
        self,
        hidden_size: Union[int, Sequence[int]],
        *,
        lam: float = 1.0,
        kappa: float = 10.0,
        eps: float = 1e-6,
        learnable_lam: bool = True,
        elementwise_affine: bool = True,
        device: Union[torch.device, str, int, None] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        self.hidden_size = _size(hidden_size)
        if not _is_number(kappa) or not kappa > 0:
            raise ValueError(f"kappa: expected a number > 0, got {kappa}")
        if not _is_number(eps) or not eps >= 0:
            raise ValueError(f"eps: expected a number >= 0, got {eps}")
        self.kappa = float(kappa)
        self.eps = float(eps)
        self.initial_lam = float(lam)
        self.learnable_lam = learnable_lam
        self.elementwise_affine = elementwise_affine
        if elementwise_affine:
            self.weight = nn.Parameter(torch.empty(self.hidden_size, device=device, dtype=dtype))
        else:
            self.register_parameter("weight", None)
        value = torch.empty(1, device=device, dtype=dtype)
        if learnable_lam:
            self.lam = nn.Parameter(value)
        else:
            self.register_buffer("lam", value)
        self._register_offset(device)
        Site.reset_parameters(self)

    def _register_offset(self, device: Union[torch.device, str, int, None]) -> None:
        """Nothing: exact sites have no offset."""

    def reset_parameters(self) -> None:
        """weight to 1, lam to the value given at construction."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        nn.init.constant_(self.lam, self.initial_lam)

    def _weight_and_lam(self) -> Tuple[Optional[Tensor], Tensor]:
        """self.weight and self.lam, in a quarter of the time that nn.Module takes to find two parameters."""
        parameters = self._parameters
        if "weight" in parameters and "lam" in parameters:
            return parameters["weight"], parameters["lam"]  # type: ignore[return-value]
        return self.weight, self.lam

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args: Any) -> None:
        for key in (prefix + "lam", prefix + "variance_offset"):
            if key in state_dict and state_dict[key].dim() == 0:  # offsets before 0.2, the authors' frozen lam
                state_dict[key] = state_dict[key].reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Size, initial lam, kappa, eps and the options."""
        return (
            f"{self.hidden_size}, lam={self.initial_lam}, kappa={self.kappa}, eps={self.eps}, "
            f"learnable_lam={self.learnable_lam}, elementwise_affine={self.elementwise_affine}"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _size(hidden_size: Any) -> int:
    """d of an integer or, as torch.nn.RMSNorm takes it, of a shape of one dimension."""
    sizes = tuple(hidden_size) if isinstance(hidden_size, (tuple, list)) else (hidden_size,)
    if len(sizes) != 1 or not isinstance(sizes[0], int) or sizes[0] < 1:
        raise ValueError(f"hidden_size: expected an integer >= 1, got {hidden_size!r}")
    return sizes[0]


def check_rows(x: Tensor, hidden_size: int) -> None:
    """Check that x is a tensor [..., hidden_size].

    Args:
        x: the rows.
        hidden_size: d.

    Raises:
        TypeError: x is no tensor.
        ValueError: x has another width.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor [..., {hidden_size}], got {type(x).__name__}")
    if not _tracing() and (x.dim() == 0 or x.shape[-1] != hidden_size):  # a trace warns of every such look at a shape
        raise ValueError(f"x: expected [..., {hidden_size}], got {list(x.shape)}")
