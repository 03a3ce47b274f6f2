"""Eight-bit models without calibration: the sites write the integers that the linears behind them read.

    bhyt.quantization.quantize(model)        # in place, for inference

|tanh| <= 1 for every input, so 1/127 is a scale for every model and every text, outliers included. The products of
matrices are torch's: `torch._int_mm`, and `torch._scaled_mm` for float8.
"""

from bhyt.quantization.conversion import quantize, quantized_as
from bhyt.quantization.linear import QuantizedLinear
from bhyt.quantization.sites import QuantizedBHyT, QuantizedBHyTApprox

__all__ = ["QuantizedBHyT", "QuantizedBHyTApprox", "QuantizedLinear", "quantize", "quantized_as"]
