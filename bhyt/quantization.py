"""Eight-bit models without calibration: the sites write the integers that the linears behind them read.

    bhyt.quantization.quantize(model)        # in place, for inference

|tanh| <= 1 whatever the input, so that 1/127 is a scale for every model and every text, outliers included. The products of
matrices are torch's: `torch._int_mm`, and `torch._scaled_mm` for float8.
"""

import platform
from collections import Counter
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from bhyt.folding import _check_linear, _decoder_readers, _module
from bhyt.modules import BHyT, BHyTApprox, _check_rows, _ops

# The largest number of each dtype, which the largest weight of a row and |y| = 1 become.
_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_OTHERS = ("o_proj", "down_proj", "lm_head")  # Llama's linears that read no site
_FEWEST_ROWS = 17  # that torch._int_mm takes on CUDA
# An x86 CPU without VNNI has no int8 dot product that does not overflow: torch._int_mm is a plain loop there.
_PLAIN_LOOP = platform.machine() == "x86_64" and not getattr(torch.cpu, "_is_vnni_supported", lambda: True)()
_EXACT = 1024  # 1024 * 128 * 127 < 2^24: float32 adds so many products of two int8 exactly


def _quantized_rows(x: Tensor, dtype: torch.dtype) -> Tuple[Tensor, Tensor]:
    """(q, scale [rows, 1]): each row over its largest magnitude, which becomes that of dtype; q * scale is about x."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny).div_(_LARGEST[dtype])
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

    x is [..., in_features]: what a quantised site writes, or any floating dtype, quantised here with a scale per row; y
    has the dtype of the linear it was, or x's.

    Args:
        linear: whose place it takes.
        dtype: int8 or float8_e4m3fn.
        input_scale: of the integers that it reads; None: x is floating.
        gain: [in_features], multiplied into the columns of W; None: 1.

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
        reads = "floating rows" if self.input_scale is None else f"integers of scale {self.input_scale:.4g}"
        return f"{self.in_features}, {self.out_features}, {self.weight.dtype}, reads {reads}"


class _QuantizedSite(nn.Module):
    """Mixed into a site's class: its y is `quantized_dtype`, of one scale."""

    hidden_size: int
    quantized_dtype: torch.dtype
    scale: float

    def _check(self, x: Tensor) -> None:
        _check_rows(x, self.hidden_size)
        if self.training:
            raise RuntimeError("BHyT: quantised for inference, it has no gradients; train the float model, or call eval()")
        if x.is_nested:
            raise NotImplementedError("BHyT: a quantised site takes no nested tensors")

    def _quantization(self) -> Tuple[Any, ...]:
        return self.weight, self.lam, self.scale, 0, self.quantized_dtype, self.kappa, self.eps


class QuantizedBHyT(_QuantizedSite, BHyT):
    """An exact site that hands its linears eight bits; made by `quantize`."""

    def _run(self, x: Tensor, residual: Optional[Tensor], return_variance: bool) -> Any:
        self._check(x)
        results: Tuple[Tensor, ...]
        if residual is None:
            results = _ops().forward_quantized(x, *self._quantization())
            return results if return_variance else results[0]
        results = _ops().add_forward_quantized(x, residual, *self._quantization())
        return results if return_variance else results[:2]


class QuantizedBHyTApprox(_QuantizedSite, BHyTApprox):
    """An approximate site that hands its linears eight bits; made by `quantize`."""

    def _run(self, x: Tensor, variance: Tensor, residual: Optional[Tensor]) -> Any:
        self._check(x)
        offset = self._offset()
        if residual is None:
            return _ops().forward_approx_quantized(x, variance, offset, *self._quantization())
        return _ops().add_forward_approx_quantized(x, residual, variance, offset, *self._quantization())


_QUANTIZED = {BHyT: QuantizedBHyT, BHyTApprox: QuantizedBHyTApprox}


@torch.inference_mode(False)
@torch.no_grad()
def quantize(
    model: nn.Module,
    *,
    dtype: torch.dtype = torch.int8,
    readers: Optional[Mapping[str, Sequence[str]]] = None,
    others: Sequence[str] = _OTHERS,
) -> int:
    """Turn a model with BHyT sites into an eight-bit one, in place and for good: keep the float one if it is needed.

    Gains are folded into the linears that read a site; these get weights of dtype with a scale per output channel, and
    read what the site writes: y / scale, the scale 1/127 (1/448 for float8) being that of the bound, known without data.
    `others` get the same weights, and quantise their input with a scale per row.

    The model is in eval mode afterwards, without gradients, and refuses to run in training mode. It compiles, exports
    and is saved as any other: a state dict loads into a model that was quantised in the same way, whatever weights it
    had then; a `transformers` model remembers it in its config, so that from_pretrained loads it as what it is.

    Args:
        model: `bhyt.hf.convert`ed, or with sites used by hand. Its weights may have been loaded or not.
        dtype: int8, or float8_e4m3fn on CUDA devices whose matrix products take it (compute capability 8.9 and newer).
        readers: as for `bhyt.fold_gain`: for each site by name, the names of all linears that read it. None: by the
            names of Llama's modules.
        others: last names of further linears; one that no module has is an error, but for Llama's three.

    Returns:
        The number of linears.

    Raises:
        ValueError: another dtype, or one that the device lacks; a model without sites whose readers are known; a site
            that is quantised already, or whose offset has not been set; a linear that is not a plain torch.nn.Linear,
            is read by two sites, or tied to another module; a name in `others` that nothing has. Nothing has been
            changed then.
    """
    pairs = _decoder_readers(model) if readers is None else readers
    linears = _checked(model, pairs, others, dtype)
    last_names = {name.split(".")[-1] for name, _ in model.named_modules()}
    absent = [name for name in others if name not in last_names and name not in _OTHERS]
    if absent:
        raise ValueError(f"others: {type(model).__name__} has no linear called {absent[0]}")
    unset = [
        name
        for name in pairs
        if isinstance(site := _module(model, name), BHyTApprox)
        and not site.variance_offset.is_meta
        and not site.has_variance_offset()
    ]
    if unset:
        raise ValueError(f"{unset[0]}: its variance offset has not been set; update or refresh it before")
    return _install(model, pairs, linears, others, dtype, readers)


def quantized_as(model: nn.Module, dtype: str, readers: Optional[Mapping[str, Sequence[str]]], others: List[str]) -> None:
    """What `quantize` recorded in a config, done to a model that is about to load such weights."""
    pairs = _decoder_readers(model) if readers is None else readers
    kind = getattr(torch, dtype)
    _install(model, pairs, _checked(model, pairs, others, kind), others, kind, readers)


def _install(
    model: nn.Module, pairs: Mapping[str, Sequence[str]], linears: Dict[str, Optional[str]], others: Sequence[str],
    dtype: torch.dtype, readers: Optional[Mapping[str, Sequence[str]]],
) -> int:  # fmt: skip
    scale = 1 / _LARGEST[dtype]
    made: Dict[str, QuantizedLinear] = {}
    for name, site_name in linears.items():
        linear: Any = _module(model, name)
        if site_name is None:
            made[name] = QuantizedLinear(linear, dtype)
        else:
            made[name] = QuantizedLinear(linear, dtype, scale, _module(model, site_name).weight)  # type: ignore[arg-type]
    config: Any = getattr(model, "config", None)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    tied = any(id(_module(model, name).weight) in embeddings for name in made)

    for name, quantized in made.items():
        owner, _, last = name.rpartition(".")
        setattr(_module(model, owner), last, quantized.train(False))
    for name in pairs:
        site: Any = _module(model, name)
        site.__class__ = _QUANTIZED[type(site)]
        site.weight, site.gain_folded, site.quantized_dtype, site.scale = None, True, dtype, scale
    model.eval().requires_grad_(False)
    if hasattr(config, "to_dict"):  # of transformers
        names = None if readers is None else {name: list(linears) for name, linears in readers.items()}
        config.bhyt_quantization = {
            "dtype": str(dtype).removeprefix("torch."), "readers": names, "others": list(others),
        }  # fmt: skip
        if tied:
            config.tie_word_embeddings = False
    return len(made)


def _checked(
    model: nn.Module, pairs: Mapping[str, Sequence[str]], others: Sequence[str], dtype: torch.dtype
) -> Dict[str, Optional[str]]:
    """Each linear to quantise, and the site that it reads, if it is not one of `others`."""
    if dtype not in _LARGEST:
        raise ValueError(f"dtype: expected torch.int8 or torch.float8_e4m3fn, got {dtype}")
    quantized = [name for name, module in model.named_modules() if isinstance(module, (_QuantizedSite, QuantizedLinear))]
    if quantized:
        raise ValueError(f"{quantized[0]}: is quantised already")
    if not pairs:
        raise ValueError(
            f"model: {type(model).__name__} has no BHyT site whose linears are known: convert it before"
            " (bhyt.hf.convert), or name them in `readers`"
        )
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    linears: Dict[str, Optional[str]] = {}
    for name, linear_names in pairs.items():
        site: Any = _module(model, name)
        if type(site) not in _QUANTIZED:
            raise ValueError(f"{name}: expected a BHyT site, got {type(site).__name__}")
        if not linear_names:
            raise ValueError(f"{name}: expected all linears that read it, got none")
        for linear_name in linear_names:
            linear: Any = _module(model, linear_name)
            folded = hasattr(linear, "gain_folded")
            if folded and site.weight is not None:
                raise ValueError(f"{linear_name}: a gain is folded into it, and {name} has one that is not")
            _check_linear(linear_name, linear, site.hidden_size, folded=folded, meta=True)
            if linear_name in linears or uses[id(linear.weight)] > 1:
                raise ValueError(f"{linear_name}: its weight is read by something else too, and would be wrong there")
            linears[linear_name] = name
    for name, module in model.named_modules():
        if name.split(".")[-1] in others and name not in linears:
            _check_linear(name, module, getattr(module, "in_features", 0), meta=True)
            linears[name] = None
    if dtype == torch.float8_e4m3fn:
        for name in linears:
            _check_float8(name, _module(model, name).weight.device)  # type: ignore[arg-type]
    return linears


def _check_float8(name: str, device: torch.device) -> None:
    if device.type == "meta" or device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        return
    raise ValueError(
        f"dtype: float8_e4m3fn needs a CUDA device of compute capability 8.9 or newer, {name} is on {device}; use"
        " torch.int8"
    )
