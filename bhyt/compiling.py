"""What compilers and exporters make of a site: our fused op, or its formula in plain PyTorch ops.

A fused op is opaque to Inductor, which cannot fuse its neighbours into it; the formula can be fused, and gives up our
kernels. Which is faster is measured by benchmarks/bench_compile.py; the default is what was faster there.
"""

from typing import Any, Callable, Dict, FrozenSet

import torch

from bhyt import reference

_EXACT = ("forward", "add_forward")
_APPROXIMATE = ("forward_approx", "add_forward_approx")
_DECOMPOSED = {"none": (), "approximate": _APPROXIMATE, "all": _EXACT + _APPROXIMATE}
_is_compiling = torch.compiler.is_compiling
_formulas: FrozenSet[str] = frozenset()  # the ops of which compilers see the formula


def wants_formula(name: str) -> bool:
    """Whether `bhyt.functional` runs the formula of an op now: a compiler is tracing, and is not to see the op.

    An export to ONNX never sees the ops, which its runtimes do not have.
    """
    return _is_compiling() and (name in _formulas or torch.onnx.is_in_onnx_export())


def decompositions() -> Dict[Any, Callable[..., Any]]:
    """The formula of each forward op in plain PyTorch ops, for `torch.export.ExportedProgram.run_decompositions`.

    Runtimes that do not load the op library, such as ONNX, need it.

    Returns:
        The four differentiable forward ops, each with its function of `bhyt.reference`.
    """
    return {getattr(torch.ops.bhyt, name).default: getattr(reference, name) for name in _EXACT + _APPROXIMATE}


def decompose_when_compiling(sites: str = "none") -> None:
    """Choose what `torch.compile` and `torch.export` see of `bhyt.functional` and the modules from now on.

    Eager calls and TorchScript run the fused ops whatever is chosen; compiled code is compiled anew when the choice
    changes. The setting holds for the process.

    Args:
        sites: "none" (default) keeps every site a fused op; "approximate" gives the compiler the formula of approximate
            sites, which are pointwise; "all" that of every site.

    Raises:
        ValueError: another value.
    """
    global _formulas
    if sites not in _DECOMPOSED:
        raise ValueError(f"sites: expected one of {', '.join(_DECOMPOSED)}, got {sites!r}")
    _formulas = frozenset(_DECOMPOSED[sites])
