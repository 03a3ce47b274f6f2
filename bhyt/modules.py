"""The two sites of a transformer block as modules.

    y1, v = norm1.forward_with_variance(x)         exact
    o     = attention(y1)
    y2, x = norm2.forward_add(o, x, v)             approximate, the residual add fused, no reduction
    ...                                            the next block's norm1.forward_add_with_variance(mlp(y2), x)

Every method has one fixed return type, so that scripted models can call each.
"""

from typing import Tuple, Union

import torch
from torch import Tensor, nn

from bhyt import functional as F
from bhyt.gain import whole


class _Site(nn.Module):
    """Parameters and options that exact and approximate sites share."""

    def __init__(
        self,
        hidden_size: int,
        *,
        lam: float = 1.0,
        kappa: float = 10.0,
        eps: float = 1e-6,
        learnable_lam: bool = True,
        elementwise_affine: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if hidden_size < 1:
            raise ValueError(f"hidden_size: expected an integer >= 1, got {hidden_size}")
        if not kappa > 0:
            raise ValueError(f"kappa: expected a number > 0, got {kappa}")
        if not eps >= 0:
            raise ValueError(f"eps: expected a number >= 0, got {eps}")
        self.hidden_size = hidden_size
        self.kappa = float(kappa)
        self.eps = float(eps)
        self.initial_lam = float(lam)
        self.learnable_lam = learnable_lam
        self.elementwise_affine = elementwise_affine
        if elementwise_affine:
            self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        else:
            self.register_parameter("weight", None)
        value = torch.empty(1, device=device, dtype=dtype)
        if learnable_lam:
            self.lam = nn.Parameter(value)
        else:
            self.register_buffer("lam", value)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """weight to 1, lam to the value given at construction."""
        with torch.no_grad():
            if self.weight is not None:
                self.weight.fill_(1.0)
            self.lam.fill_(self.initial_lam)

    def extra_repr(self) -> str:
        return (
            f"{self.hidden_size}, lam={self.initial_lam}, kappa={self.kappa}, eps={self.eps}, "
            f"learnable_lam={self.learnable_lam}, elementwise_affine={self.elementwise_affine}"
        )


_ARGS = """

    Args:
        hidden_size: d, the size of the last dimension.
        lam: initial value of `lam`, the bound on the argument of tanh (arXiv 2601.09719 uses 2.0 for exact and 1.0
            for approximate sites).
        kappa: the argument stays within [-lam, lam] with probability of at least 1 - 1/kappa^2.
        eps: added to the variance.
        learnable_lam: False makes `lam` a buffer: saved, never trained.
        elementwise_affine: False leaves out the gain `weight`.
        device, dtype: of `weight` and `lam`; any floating dtype works with rows of any other.

    Attributes:
        weight: [hidden_size] parameter, initially 1, or None.
        lam: [1] parameter or buffer.
"""


class BHyT(_Site):
    __doc__ = (
        """Exact site: y = weight * tanh(lam * x / (kappa * sqrt(mean(x^2) + eps))), bounded by |weight|.

    A drop-in for `torch.nn.RMSNorm(hidden_size)`; x and y are [..., hidden_size]."""
        + _ARGS
    )

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] -> y [..., d] in x's dtype."""
        return F.forward(x, self.weight, self.lam, self.kappa, self.eps)[0]

    def forward_with_variance(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """x [..., d] -> (y [..., d], variance [..., 1]); the variance is what the block's approximate site takes."""
        return F.forward(x, self.weight, self.lam, self.kappa, self.eps)

    def forward_add(self, x: Tensor, residual: Tensor) -> Tuple[Tensor, Tensor]:
        """(x, residual) [..., d] -> (y, sum) with sum = x + residual and y = self(sum); sum has residual's dtype."""
        y, total, _ = F.add_forward(x, residual, self.weight, self.lam, self.kappa, self.eps)
        return y, total

    def forward_add_with_variance(self, x: Tensor, residual: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """(x, residual) [..., d] -> (y, sum, variance [..., 1] of the sum)."""
        return F.add_forward(x, residual, self.weight, self.lam, self.kappa, self.eps)


class BHyTApprox(_Site):
    __doc__ = (
        """Approximate site: y = weight * tanh(lam * x / (kappa * sqrt(variance + offset + eps))), no reduction.

    The second site of a block: `variance` is the exact site's, and the offset is what attention adds to it,
    c * lam1^2 / kappa1^2 with c from `bhyt.attention_gain`. The offset follows from weights, so it is no parameter and
    not in the state dict: set it after construction or loading, and refresh it every so many training steps.
    Calling the site before raises RuntimeError."""
        + _ARGS
        + """        variance_offset: scalar buffer, not saved.
"""
    )

    offset_is_set: bool

    def __init__(
        self,
        hidden_size: int,
        *,
        lam: float = 1.0,
        kappa: float = 10.0,
        eps: float = 1e-6,
        learnable_lam: bool = True,
        elementwise_affine: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(
            hidden_size,
            lam=lam,
            kappa=kappa,
            eps=eps,
            learnable_lam=learnable_lam,
            elementwise_affine=elementwise_affine,
            device=device,
            dtype=dtype,
        )
        self.register_buffer("variance_offset", torch.zeros((), device=device, dtype=torch.float32), persistent=False)

    def reset_parameters(self) -> None:
        """weight to 1, lam to the value given at construction; the offset counts as not set."""
        super().reset_parameters()
        self.offset_is_set = False

    def _apply(self, fn, recurse=True):
        was_meta = self.variance_offset.is_meta
        super()._apply(fn, recurse)
        if was_meta and not self.variance_offset.is_meta:  # to_empty: memory, but no value yet
            self.offset_is_set = False
        return self

    def set_variance_offset(self, offset: Union[Tensor, float]) -> None:
        """Set v' - v, one non-negative number; stored as float32 on the site's device, without gradient."""
        value = torch.as_tensor(offset).detach()
        if value.numel() != 1:
            raise ValueError(f"offset: expected one element, got shape {list(value.shape)}")
        with torch.no_grad():
            self.variance_offset.copy_(value.reshape(()))
        self.offset_is_set = True

    def update_variance_offset(self, gain: Tensor, first: BHyT) -> None:
        """Set the offset to gain * lam1^2 / kappa1^2, lam1 and kappa1 being those of the block's exact site `first`.

        gain: c, from `bhyt.attention_gain`.

        Raises:
            RuntimeError: the gain of `first` is folded into W_V (see `bhyt.fold_gain`), so that c is not the model's.
        """
        if hasattr(first, "gain_folded"):
            raise RuntimeError("first: its gain is folded into W_V, of which c must not be computed; unfold it before")
        self.set_variance_offset(gain * (whole(first.lam).detach().to(gain).reshape(()) / first.kappa).square())

    def _check_offset(self) -> None:
        if not self.offset_is_set:
            raise RuntimeError(
                "BHyTApprox: the variance offset has not been set; call update_variance_offset(gain, first) or"
                " set_variance_offset(offset) after construction or loading"
            )

    def forward(self, x: Tensor, variance: Tensor) -> Tensor:
        """x [..., d], variance [..., 1] of the block's exact site -> y [..., d] in x's dtype."""
        self._check_offset()
        return F.forward_approx(
            x, variance, self.variance_offset, self.weight, self.lam, self.kappa, self.eps
        )

    def forward_add(self, x: Tensor, residual: Tensor, variance: Tensor) -> Tuple[Tensor, Tensor]:
        """(x, residual) [..., d], variance [..., 1] -> (y, sum) with sum = x + residual in residual's dtype."""
        self._check_offset()
        return F.add_forward_approx(
            x, residual, variance, self.variance_offset, self.weight, self.lam, self.kappa, self.eps
        )
