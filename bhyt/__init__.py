"""BHyT (Bounded Hyperbolic Tanh): a bounded, statistics-once alternative to RMSNorm and Pre-LN for transformer blocks.

    y = weight * tanh(lam * x / (kappa * sqrt(mean(x^2) + eps)))

`BHyT` is the exact site, `BHyTApprox` the second site of a block, which needs no reduction; `bhyt.functional` has the
fused ops, `bhyt.reference` the formulas in plain PyTorch. Importing this package registers `torch.ops.bhyt.*`.
"""

from bhyt import _library

__version__ = "0.2.0"
_library.load(__version__)

from bhyt import diagnostics, functional, quantization, reference  # noqa: E402  (they name the ops just registered)
from bhyt._library import library_path  # noqa: E402
from bhyt.compiling import decompose_when_compiling, decompositions  # noqa: E402
from bhyt.folding import fold_gain  # noqa: E402
from bhyt.gain import attention_gain, value_weight  # noqa: E402
from bhyt.modules import BHyT, BHyTApprox  # noqa: E402
from bhyt.optim import parameter_groups  # noqa: E402

__all__ = [
    "BHyT",
    "BHyTApprox",
    "attention_gain",
    "decompose_when_compiling",
    "decompositions",
    "diagnostics",
    "fold_gain",
    "functional",
    "library_path",
    "parameter_groups",
    "quantization",
    "reference",
    "value_weight",
]
