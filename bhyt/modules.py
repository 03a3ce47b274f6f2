"""The two sites of a transformer block as modules.

    y1, v    = norm1(x, return_variance=True)                            exact
    o        = attention(y1)
    y2, x    = norm2(o, v, residual=x)                                   approximate, the residual add fused
    y1, x, v = next_norm1(mlp(y2), residual=x, return_variance=True)     the next block

A site is run by calling the module, so that hooks, wrappers and offloading see it. What it returns depends on the
arguments; the methods `forward_..` are the same calls with one return type each, for TorchScript and type checkers.
"""

from typing import Any, Callable, Optional, Tuple

import torch
from torch import Tensor

from bhyt import functional as F
from bhyt.gain import whole
from bhyt.nested import on_values
from bhyt.offset import VarianceOffset
from bhyt.site import Site, check_rows

_scripting: Callable[[], bool] = torch.jit.is_scripting  # type: ignore[attr-defined]


class BHyT(Site):
    """Exact site: y = weight * tanh(lam * x / (kappa * sqrt(mean(x^2) + eps))), bounded by |weight|.

    A drop-in for `torch.nn.RMSNorm(hidden_size)`; x and y are [..., hidden_size], jagged nested tensors included. The
    root mean square of y is about |weight| lam / kappa, where RMSNorm's is |weight|.

    Args:
        hidden_size: d, the size of the last dimension: an integer, or a shape of one dimension.
        lam: initial value of `lam`, the argument of tanh at kappa root mean squares (arXiv 2601.09719 uses 2.0 for
            exact and 1.0 for approximate sites).
        kappa: at least 1 - 1/kappa^2 of a row's arguments lie within [-lam, lam].
        eps: added to the variance.
        learnable_lam: False makes `lam` a buffer: saved, never trained.
        elementwise_affine: False leaves out the gain `weight`.
        device: of `weight` and `lam`.
        dtype: of `weight` and `lam`; any floating dtype works with rows of any other. Train in float32 (under
            autocast, or with float32 copies in the optimizer): a bfloat16 lam of 2 does not see steps below 0.004.

    Attributes:
        weight: [hidden_size] parameter, initially 1, or None.
        lam: [1] parameter or buffer. Weight decay would pull it towards 0: see `bhyt.parameter_groups`.

    Raises:
        ValueError: an option that is not as described; called with rows of another width than hidden_size.

    Examples:
        >>> import torch, bhyt
        >>> norm = bhyt.BHyT(4, lam=2.0)
        >>> y, variance = norm(torch.ones(2, 4), return_variance=True)
        >>> y.shape, variance.shape
        (torch.Size([2, 4]), torch.Size([2, 1]))
    """

    def forward(self, x: Tensor, residual: Optional[Tensor] = None, return_variance: bool = False) -> Tensor:
        """Return y, or a tuple of y, the sum and the variance as asked for.

        Args:
            x: [..., d] rows, any floating dtype.
            residual: [..., d], of x's dtype or a wider one. The site then works on sum = x + residual, and returns
                the sum behind y, in residual's dtype.
            return_variance: also return the variance of the rows, [..., 1] float32 (float64 for float64 rows), which
                the block's approximate site takes.

        Returns:
            y [..., d] in x's dtype; a tuple when more is asked for. TorchScript takes the declared type, so it can ask
            for y alone here; the methods below are for the rest.

        Raises:
            TypeError: x is no tensor, or of another dtype.
            ValueError: x or residual of another width or shape.
            RuntimeError: in TorchScript, more than y is asked for.
        """
        if _scripting():
            if residual is not None or return_variance:
                raise RuntimeError("BHyT: in TorchScript call the method with this return type, forward_..")
            return F.forward(x, self.weight, self.lam, self.kappa, self.eps)[0]
        else:
            y: Tensor = self._run(x, residual, return_variance)
            return y

    def _run(self, x: Tensor, residual: Optional[Tensor], return_variance: bool) -> Any:
        check_rows(x, self.hidden_size)
        if x.is_nested:
            return on_values(self._run, x, {"residual": residual}, return_variance=return_variance)
        weight, lam = self._weight_and_lam()
        results: Tuple[Tensor, ...]
        if residual is None:
            results = F.forward(x, weight, lam, self.kappa, self.eps)
            return results if return_variance else results[0]
        results = F.add_forward(x, residual, weight, lam, self.kappa, self.eps)
        return results if return_variance else results[:2]

    def forward_with_variance(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """Call `self(x, return_variance=True)`.

        Args:
            x: [..., d] rows, any floating dtype.

        Returns:
            y: [..., d] in x's dtype.
            variance: [..., 1] float32 (float64 for float64 rows).
        """
        if _scripting():
            return F.forward(x, self.weight, self.lam, self.kappa, self.eps)
        else:
            pair: Tuple[Tensor, Tensor] = self(x, return_variance=True)
            return pair

    def forward_add(self, x: Tensor, residual: Tensor) -> Tuple[Tensor, Tensor]:
        """Call `self(x, residual)`: sum = x + residual, y = self(sum).

        Args:
            x: [..., d], the branch to add, any floating dtype.
            residual: [..., d], the stream, of x's dtype or a wider one.

        Returns:
            y: [..., d] in x's dtype.
            sum: [..., d] in residual's dtype.
        """
        if _scripting():
            y, total, _ = F.add_forward(x, residual, self.weight, self.lam, self.kappa, self.eps)
            return y, total
        else:
            pair: Tuple[Tensor, Tensor] = self(x, residual)
            return pair

    def forward_add_with_variance(self, x: Tensor, residual: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """Call `self(x, residual, return_variance=True)`.

        Args:
            x: [..., d], the branch to add, any floating dtype.
            residual: [..., d], the stream, of x's dtype or a wider one.

        Returns:
            y: [..., d] in x's dtype.
            sum: [..., d] in residual's dtype.
            variance: [..., 1] of the sum, float32 (float64 for a float64 stream).
        """
        if _scripting():
            return F.add_forward(x, residual, self.weight, self.lam, self.kappa, self.eps)
        else:
            triple: Tuple[Tensor, Tensor, Tensor] = self(x, residual, return_variance=True)
            return triple


def offset_of(gain: Tensor, first: BHyT) -> Tensor:
    """The variance offset c lam1^2 / kappa1^2 (arXiv 2601.09719).

    Args:
        gain: c, one element, from `bhyt.attention_gain`.
        first: the block's exact site, which has lam1 and kappa1.

    Returns:
        A scalar in the dtype of `gain`, without gradient.

    Raises:
        TypeError: `first` is not an exact site.
        RuntimeError: the gain of `first` is folded into W_V.
    """
    if not isinstance(first, BHyT):
        raise TypeError(f"first: expected the block's exact site, a bhyt.BHyT, got {type(first).__name__}")
    if hasattr(first, "gain_folded"):
        raise RuntimeError("first: its gain is folded into W_V, of which c must not be computed; unfold it before")
    return gain * (whole(first.lam).detach().to(gain).reshape(()) / first.kappa).square()


class BHyTApprox(VarianceOffset, Site):
    """Approximate site: y = weight * tanh(lam * x / (kappa * sqrt(variance + offset + eps))), no reduction.

    The second site of a block: `variance` is the exact site's, and the offset is what attention adds to it,
    c * lam1^2 / kappa1^2 with c from `bhyt.attention_gain`. The offset follows from weights, so it is no parameter.
    Set it after construction, and update it every 10 to 100 training steps. Before it is set it is NaN, and calling the
    site raises RuntimeError. The offset is saved and loaded with the weights. Loading a state dict without it succeeds,
    and leaves the offset unset.

    Args:
        hidden_size: d, the size of the last dimension: an integer, or a shape of one dimension.
        lam: initial value of `lam`, the argument of tanh at kappa root mean squares (arXiv 2601.09719 uses 2.0 for
            exact and 1.0 for approximate sites).
        kappa: at least 1 - 1/kappa^2 of a row's arguments lie within [-lam, lam] where v' is at least the row's
            variance.
        eps: added to the variance.
        learnable_lam: False makes `lam` a buffer: saved, never trained.
        elementwise_affine: False leaves out the gain `weight`.
        device: of `weight` and `lam`.
        dtype: of `weight` and `lam`; any floating dtype works with rows of any other. Train in float32 (under
            autocast, or with float32 copies in the optimizer): a bfloat16 lam of 2 does not see steps below 0.004.

    Attributes:
        weight: [hidden_size] parameter, initially 1, or None.
        lam: [1] parameter or buffer. Weight decay would pull it towards 0: see `bhyt.parameter_groups`.
        variance_offset: [1] buffer, float32 whatever the site is cast to; NaN while it is not set.

    Raises:
        ValueError: an option that is not as described; called with rows of another width than hidden_size.

    Examples:
        >>> import torch, bhyt
        >>> first, second = bhyt.BHyT(4, lam=2.0), bhyt.BHyTApprox(4)
        >>> v_weight, o_weight = torch.eye(4), torch.eye(4)
        >>> second.update_variance_offset(bhyt.attention_gain(v_weight, o_weight, seq_len=16), first)
        >>> y, variance = first(torch.ones(2, 4), return_variance=True)
        >>> y, stream = second(y, variance, residual=torch.ones(2, 4))
        >>> second.variance_offset
        tensor([0.0025])
    """

    def reset_parameters(self) -> None:
        """weight to 1, lam to the value given at construction; the offset counts as not set."""
        super().reset_parameters()
        self._unset_offset()

    def update_variance_offset(self, gain: Tensor, first: BHyT) -> None:
        """Set the offset to gain * lam1^2 / kappa1^2.

        Args:
            gain: c, one element, from `bhyt.attention_gain`.
            first: the block's exact site, which has lam1 and kappa1.

        Raises:
            TypeError: `first` is not an exact site.
            RuntimeError: the gain of `first` is folded into W_V (see `bhyt.fold_gain`), so that c is not the model's.
        """
        self.set_variance_offset(offset_of(gain, first))

    def forward(self, x: Tensor, variance: Tensor, residual: Optional[Tensor] = None) -> Tensor:
        """Return y, or (y, sum) with a residual.

        Args:
            x: [..., d] rows, any floating dtype.
            variance: [..., 1] float32 (float64 for float64 rows), as the block's exact site returned it.
            residual: [..., d], of x's dtype or a wider one. The site then works on sum = x + residual, and returns
                the sum behind y, in residual's dtype.

        Returns:
            y [..., d] in x's dtype; a tuple with a residual, for which TorchScript has `forward_add`.

        Raises:
            TypeError: x is no tensor, or a tensor has another dtype.
            ValueError: x, variance or residual of another width or shape.
            RuntimeError: the offset has not been set; in TorchScript, a residual.
        """
        if _scripting():
            if residual is not None:
                raise RuntimeError("BHyTApprox: in TorchScript call the method with this return type, forward_add")
            return F.forward_approx(x, variance, self._offset(), self.weight, self.lam, self.kappa, self.eps)
        else:
            y: Tensor = self._run(x, variance, residual)
            return y

    def _run(self, x: Tensor, variance: Tensor, residual: Optional[Tensor]) -> Any:
        check_rows(x, self.hidden_size)
        if x.is_nested:
            return on_values(self._run, x, {"variance": variance, "residual": residual})
        weight, lam = self._weight_and_lam()
        offset = self._buffers.get("variance_offset") if self.offset_is_set else None  # found as weight and lam are
        if offset is None:
            offset = self._offset()
        if residual is None:
            return F.forward_approx(x, variance, offset, weight, lam, self.kappa, self.eps)
        return F.add_forward_approx(x, residual, variance, offset, weight, lam, self.kappa, self.eps)

    def forward_add(self, x: Tensor, residual: Tensor, variance: Tensor) -> Tuple[Tensor, Tensor]:
        """Call `self(x, variance, residual)`: sum = x + residual, y = self(sum). Mind the order of the arguments.

        Args:
            x: [..., d], the branch to add, any floating dtype.
            residual: [..., d], the stream, of x's dtype or a wider one.
            variance: [..., 1], as the block's exact site returned it.

        Returns:
            y: [..., d] in x's dtype.
            sum: [..., d] in residual's dtype.
        """
        if _scripting():
            return F.add_forward_approx(
                x, residual, variance, self._offset(), self.weight, self.lam, self.kappa, self.eps
            )
        else:
            pair: Tuple[Tensor, Tensor] = self(x, variance, residual)
            return pair
