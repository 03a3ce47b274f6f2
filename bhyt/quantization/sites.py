"""Sites that give their linears eight bits."""

from typing import Any, Optional, Tuple

import torch
from torch import Tensor, nn

from bhyt import functional as F
from bhyt.modules import BHyT, BHyTApprox
from bhyt.site import check_rows


class QuantizedSite(nn.Module):
    """Mixed into a site's class: its y has `quantized_dtype`, with one scale."""

    hidden_size: int
    quantized_dtype: torch.dtype
    scale: float

    def _check(self, x: Tensor) -> None:
        check_rows(x, self.hidden_size)
        if self.training:
            raise RuntimeError(
                "BHyT: quantised for inference, it has no gradients; train the float model, or call eval()"
            )
        if x.is_nested:
            raise NotImplementedError("BHyT: a quantised site takes no nested tensors")

    def _quantization(self) -> Tuple[Any, ...]:
        return self.weight, self.lam, self.scale, 0, self.quantized_dtype, self.kappa, self.eps


class QuantizedBHyT(QuantizedSite, BHyT):
    """An exact site whose y is in eight bits: `bhyt.functional.forward_quantized`. Made by `quantize`.

    Calls take and return the same as calls of `bhyt.BHyT`, but y is q of `quantized_dtype` with scale `scale`.

    Raises:
        RuntimeError: called in training mode.
        NotImplementedError: called with nested tensors.
    """

    def _run(self, x: Tensor, residual: Optional[Tensor], return_variance: bool) -> Any:
        self._check(x)
        results: Tuple[Tensor, ...]
        if residual is None:
            results = F.forward_quantized(x, *self._quantization())
            return results if return_variance else results[0]
        results = F.add_forward_quantized(x, residual, *self._quantization())
        return results if return_variance else results[:2]


class QuantizedBHyTApprox(QuantizedSite, BHyTApprox):
    """An approximate site whose y is in eight bits: `bhyt.functional.forward_approx_quantized`. Made by `quantize`.

    Calls take and return the same as calls of `bhyt.BHyTApprox`, but y is q of `quantized_dtype` with scale `scale`.

    Raises:
        RuntimeError: called in training mode, or before the offset was set.
        NotImplementedError: called with nested tensors.
    """

    def _run(self, x: Tensor, variance: Tensor, residual: Optional[Tensor]) -> Any:
        self._check(x)
        offset = self._offset()
        if residual is None:
            return F.forward_approx_quantized(x, variance, offset, *self._quantization())
        return F.add_forward_approx_quantized(x, residual, variance, offset, *self._quantization())
