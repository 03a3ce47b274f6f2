"""The two sites of a transformer block as modules.

    y1, v    = norm1(x, return_variance=True)                            exact
    o        = attention(y1)
    y2, x    = norm2(o, v, residual=x)                                   approximate, the residual add fused
    y1, x, v = next_norm1(mlp(y2), residual=x, return_variance=True)     the next block

A site is run by calling the module, so that hooks, wrappers and offloading see it. What it returns depends on the
arguments; the methods `forward_..` are the same calls with one return type each, for TorchScript and type checkers.
"""

from typing import Any, Callable, Dict, Mapping, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from bhyt import functional as F
from bhyt.gain import whole
from bhyt.nested import on_values
from bhyt.offset import VarianceOffset

_scripting: Callable[[], bool] = torch.jit.is_scripting  # type: ignore[attr-defined]
_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]


class _Site(nn.Module):
    """Parameters and options that exact and approximate sites share."""

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
        _Site.reset_parameters(self)

    def _register_offset(self, device: Union[torch.device, str, int, None]) -> None:
        """Exact sites have none."""

    def reset_parameters(self) -> None:
        """weight to 1, lam to the value given at construction."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        nn.init.constant_(self.lam, self.initial_lam)

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args: Any) -> None:
        for key in (prefix + "lam", prefix + "variance_offset"):
            if key in state_dict and state_dict[key].dim() == 0:  # offsets before 0.2, the authors' frozen lam
                state_dict[key] = state_dict[key].reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
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


def _check_rows(x: Tensor, hidden_size: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor [..., {hidden_size}], got {type(x).__name__}")
    if not _tracing() and (x.dim() == 0 or x.shape[-1] != hidden_size):  # a trace warns of every such look at a shape
        raise ValueError(f"x: expected [..., {hidden_size}], got {list(x.shape)}")


class BHyT(_Site):
    """Exact site: y = weight * tanh(lam * x / (kappa * sqrt(mean(x^2) + eps))), bounded by |weight|.

    A drop-in for `torch.nn.RMSNorm(hidden_size)`; x and y are [..., hidden_size], jagged nested tensors included. The
    root mean square of y is about |weight| lam / kappa, where RMSNorm's is |weight|.

    Args:
        hidden_size: d, the size of the last dimension: an integer, or a shape of one dimension.
        lam: initial value of `lam`, the bound on the argument of tanh (arXiv 2601.09719 uses 2.0 for exact and 1.0
            for approximate sites).
        kappa: the argument stays within [-lam, lam] with probability of at least 1 - 1/kappa^2.
        eps: added to the variance.
        learnable_lam: False makes `lam` a buffer: saved, never trained.
        elementwise_affine: False leaves out the gain `weight`.
        device, dtype: of `weight` and `lam`; any floating dtype works with rows of any other. Train in float32 (under
            autocast, or with float32 copies in the optimizer): a bfloat16 lam of 2 does not see steps below 0.004.

    Attributes:
        weight: [hidden_size] parameter, initially 1, or None.
        lam: [1] parameter or buffer. Weight decay would pull it towards 0: see `bhyt.parameter_groups`.

    Raises:
        ValueError: an option that is not as described; called with rows of another width than hidden_size.
    """

    def forward(self, x: Tensor, residual: Optional[Tensor] = None, return_variance: bool = False) -> Tensor:
        """y, or (y[, sum][, variance]) as asked for.

        Args:
            x: [..., d] rows, any floating dtype.
            residual: [..., d], of x's dtype or a wider one: the site is that of sum = x + residual, which is returned
                behind y, in residual's dtype.
            return_variance: also return the variance of the rows, [..., 1] float32 (float64 for float64 rows), which
                the block's approximate site takes.

        Returns:
            y [..., d] in x's dtype; a tuple when more is asked for. In TorchScript, whose type this method declares, y
            alone can be asked for here; the methods below are for the rest.
        """
        if _scripting():
            if residual is not None or return_variance:
                raise RuntimeError("BHyT: in TorchScript call the method with this return type, forward_..")
            return F.forward(x, self.weight, self.lam, self.kappa, self.eps)[0]
        else:
            y: Tensor = self._run(x, residual, return_variance)
            return y

    def _run(self, x: Tensor, residual: Optional[Tensor], return_variance: bool) -> Any:
        _check_rows(x, self.hidden_size)
        if x.is_nested:
            return on_values(self._run, x, {"residual": residual}, return_variance=return_variance)
        results: Tuple[Tensor, ...]
        if residual is None:
            results = F.forward(x, self.weight, self.lam, self.kappa, self.eps)
            return results if return_variance else results[0]
        results = F.add_forward(x, residual, self.weight, self.lam, self.kappa, self.eps)
        return results if return_variance else results[:2]

    def forward_with_variance(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """self(x, return_variance=True): (y [..., d], variance [..., 1])."""
        if _scripting():
            return F.forward(x, self.weight, self.lam, self.kappa, self.eps)
        else:
            pair: Tuple[Tensor, Tensor] = self(x, return_variance=True)
            return pair

    def forward_add(self, x: Tensor, residual: Tensor) -> Tuple[Tensor, Tensor]:
        """self(x, residual): (y, sum) with sum = x + residual and y = self(sum)."""
        if _scripting():
            y, total, _ = F.add_forward(x, residual, self.weight, self.lam, self.kappa, self.eps)
            return y, total
        else:
            pair: Tuple[Tensor, Tensor] = self(x, residual)
            return pair

    def forward_add_with_variance(self, x: Tensor, residual: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """self(x, residual, return_variance=True): (y, sum, variance [..., 1] of the sum)."""
        if _scripting():
            return F.add_forward(x, residual, self.weight, self.lam, self.kappa, self.eps)
        else:
            triple: Tuple[Tensor, Tensor, Tensor] = self(x, residual, return_variance=True)
            return triple


def offset_of(gain: Tensor, first: BHyT) -> Tensor:
    """c lam1^2 / kappa1^2, a scalar; see `BHyTApprox.update_variance_offset`."""
    if not isinstance(first, BHyT):
        raise TypeError(f"first: expected the block's exact site, a bhyt.BHyT, got {type(first).__name__}")
    if hasattr(first, "gain_folded"):
        raise RuntimeError("first: its gain is folded into W_V, of which c must not be computed; unfold it before")
    return gain * (whole(first.lam).detach().to(gain).reshape(()) / first.kappa).square()


class BHyTApprox(VarianceOffset, _Site):
    """Approximate site: y = weight * tanh(lam * x / (kappa * sqrt(variance + offset + eps))), no reduction.

    The second site of a block: `variance` is the exact site's, and the offset is what attention adds to it,
    c * lam1^2 / kappa1^2 with c from `bhyt.attention_gain`. The offset follows from weights, so it is no parameter: set
    it after construction, and refresh it every so many training steps. Until then it is NaN, and calling the site
    raises RuntimeError. It is state, saved and loaded with the weights; loading a state dict without it succeeds and
    leaves it unset, never as it was.

    Args:
        hidden_size: d, the size of the last dimension: an integer, or a shape of one dimension.
        lam: initial value of `lam`, the bound on the argument of tanh (arXiv 2601.09719 uses 2.0 for exact and 1.0
            for approximate sites).
        kappa: the argument stays within [-lam, lam] with probability of at least 1 - 1/kappa^2.
        eps: added to the variance.
        learnable_lam: False makes `lam` a buffer: saved, never trained.
        elementwise_affine: False leaves out the gain `weight`.
        device, dtype: of `weight` and `lam`; any floating dtype works with rows of any other. Train in float32 (under
            autocast, or with float32 copies in the optimizer): a bfloat16 lam of 2 does not see steps below 0.004.

    Attributes:
        weight: [hidden_size] parameter, initially 1, or None.
        lam: [1] parameter or buffer. Weight decay would pull it towards 0: see `bhyt.parameter_groups`.
        variance_offset: [1] buffer, float32 whatever the site is cast to; NaN while it is not set.

    Raises:
        ValueError: an option that is not as described; called with rows of another width than hidden_size.
    """

    def reset_parameters(self) -> None:
        """weight to 1, lam to the value given at construction; the offset counts as not set."""
        super().reset_parameters()
        self._unset_offset()

    def update_variance_offset(self, gain: Tensor, first: BHyT) -> None:
        """Set the offset to gain * lam1^2 / kappa1^2, lam1 and kappa1 being those of the block's exact site `first`.

        gain: c, from `bhyt.attention_gain`.

        Raises:
            TypeError: `first` is not an exact site.
            RuntimeError: the gain of `first` is folded into W_V (see `bhyt.fold_gain`), so that c is not the model's.
        """
        self.set_variance_offset(offset_of(gain, first))

    def forward(self, x: Tensor, variance: Tensor, residual: Optional[Tensor] = None) -> Tensor:
        """y, or (y, sum) with a residual.

        Args:
            x: [..., d] rows, any floating dtype.
            variance: [..., 1], as the block's exact site returned it.
            residual: [..., d], of x's dtype or a wider one: the site is that of sum = x + residual, which is returned
                behind y, in residual's dtype.

        Returns:
            y [..., d] in x's dtype; a tuple with a residual, for which TorchScript has `forward_add`.

        Raises:
            RuntimeError: the offset has not been set.
        """
        if _scripting():
            if residual is not None:
                raise RuntimeError("BHyTApprox: in TorchScript call the method with this return type, forward_add")
            return F.forward_approx(x, variance, self._offset(), self.weight, self.lam, self.kappa, self.eps)
        else:
            y: Tensor = self._run(x, variance, residual)
            return y

    def _run(self, x: Tensor, variance: Tensor, residual: Optional[Tensor]) -> Any:
        _check_rows(x, self.hidden_size)
        if x.is_nested:
            return on_values(self._run, x, {"variance": variance, "residual": residual})
        offset = self._offset()
        if residual is None:
            return F.forward_approx(x, variance, offset, self.weight, self.lam, self.kappa, self.eps)
        return F.add_forward_approx(x, residual, variance, offset, self.weight, self.lam, self.kappa, self.eps)

    def forward_add(self, x: Tensor, residual: Tensor, variance: Tensor) -> Tuple[Tensor, Tensor]:
        """self(x, variance, residual): (y, sum) with sum = x + residual."""
        if _scripting():
            return F.add_forward_approx(
                x, residual, variance, self._offset(), self.weight, self.lam, self.kappa, self.eps
            )
        else:
            pair: Tuple[Tensor, Tensor] = self(x, variance, residual)
            return pair
