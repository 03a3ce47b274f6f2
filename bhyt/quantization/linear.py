"""Linears in eight bits: the rows and matrices as integers, the products of integers, the module."""

import platform
from typing import Callable, Optional, Tuple

import torch
from torch import Tensor, nn

# The largest number of each dtype, which the largest weight of a row and |y| = 1 become.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_FEWEST_ROWS = 17  # torch._int_mm takes no fewer on CUDA
# An x86 CPU without VNNI has no int8 dot product that does not overflow: torch._int_mm is a plain loop there.
_PLAIN_LOOP = platform.machine() == "x86_64" and not getattr(torch.cpu, "_is_vnni_supported", lambda: True)()
_EXACT = 1024  # 1024 * 128 * 127 < 2^24: float32 adds so many products of two int8 exactly


def _quantized_rows(x: Tensor, dtype: torch.dtype) -> Tuple[Tensor, Tensor]:
    """(q, scale [rows, 1]): q * scale is about x. The largest magnitude of a row becomes the largest of dtype."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny).div_(LARGEST[dtype])
    q = x / scale
    return (q.round_() if dtype == torch.int8 else q).to(dtype), scale


def _float_product(q: Tensor, weight: Tensor) -> Tensor:
    """The integers of torch._int_mm(q, weight.t()), by float32 products of blocks that are exact in any order."""
    columns = torch.split(q.float(), _EXACT, 1)
    products = []
    for rows in torch.split(weight, _EXACT):  # a few MiB in float32 at a time
        product, *further = [torch.mm(x, w.t()) for x, w in zip(columns, torch.split(rows.float(), _EXACT, 1))]
        for part in further:
            product = product.to(torch.int32) + part.to(torch.int32)
        products.append(product)
    return products[0] if len(products) == 1 else torch.cat(products, 1)


def _product(q: Tensor, weight: Tensor) -> Tensor:
    """q [rows, in] times weight [out, in] of its dtype: [rows, out]; for int8 exact integers, whatever their dtype."""
    if q.dtype != torch.int8:
        one = torch.ones((), device=q.device)
        return torch._scaled_mm(q, weight.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)
    if _PLAIN_LOOP and q.device.type == "cpu":
        return _float_product(q, weight)
    rows = q.shape[0]
    if q.is_cuda and rows < _FEWEST_ROWS:
        return torch._int_mm(nn.functional.pad(q, (0, 0, 0, _FEWEST_ROWS - rows)), weight.t())[:rows]
    return torch._int_mm(q, weight.t())


class QuantizedLinear(nn.Module):
    """y = x W^T + bias with W in eight bits, one scale per output channel. For inference; made by `quantize`.

    Args:
        linear: the linear to replace.
        dtype: int8 or float8_e4m3fn.
        input_scale: the scale of the integers that a site writes. None: x is floating, and is quantised here with a
            scale per row.
        gain: [in_features], multiplied into the columns of W. None: 1.

    Attributes:
        weight: [out_features, in_features] of dtype.
        weight_scale: [out_features] float32, whatever the module is cast to; times input_scale.
        bias: [out_features] or None.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Optional[Tensor]

    def __init__(
        self, linear: nn.Linear, dtype: torch.dtype, input_scale: Optional[float] = None, gain: Optional[Tensor] = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.input_scale, self.output_dtype = input_scale, linear.weight.dtype
        matrix = linear.weight.detach().float()
        weight, scale = _quantized_rows(matrix if gain is None else matrix * gain.detach().float(), dtype)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale.reshape(-1) * (input_scale or 1.0))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Multiply and add the bias.

        Args:
            x: [..., in_features], integers of the site's dtype where `input_scale` is given, otherwise any floating
                dtype.

        Returns:
            y: [..., out_features] in the dtype of the linear that this module replaced where `input_scale` is given,
                otherwise in x's dtype.

        Raises:
            TypeError: x does not have the dtype that the site writes.
        """
        if self.input_scale is None:
            rows, row_scale = _quantized_rows(x.reshape(-1, self.in_features), self.weight.dtype)
            y = (_product(rows, self.weight) * self.weight_scale).mul_(row_scale)
            dtype = x.dtype
        elif x.dtype != self.weight.dtype:
            raise TypeError(f"x: expected {self.weight.dtype} from the site that this linear reads, got {x.dtype}")
        else:
            y = _product(x.reshape(-1, self.in_features), self.weight) * self.weight_scale
            dtype = self.output_dtype
        if self.bias is not None:
            y = y + self.bias
        return y.to(dtype).view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        before = {"weight": self.weight, "weight_scale": self.weight_scale}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in before.items():
            if getattr(self, name).dtype != tensor.dtype:
                setattr(self, name, tensor.to(getattr(self, name).device))
        self.output_dtype = fn(torch.empty(0, dtype=self.output_dtype, device=before["weight"].device)).dtype
        return self

    def extra_repr(self) -> str:
        """Sizes, dtype and what the linear reads."""
        reads = "floating rows" if self.input_scale is None else f"integers of scale {self.input_scale:.4g}"
        return f"{self.in_features}, {self.out_features}, {self.weight.dtype}, reads {reads}"
