"""The form in which compilers and exporters see a site: the fused op, or its formula in plain PyTorch ops.

Inductor cannot fuse a neighbour into a fused op. It can fuse the formula, but then the kernels do not run.
benchmarks/bench_compile.py measures both, and the default is the faster one.
"""

from typing import Any, Callable, Dict, FrozenSet

import torch

from bhyt import reference

_EXACT = ("forward", "add_forward")
_APPROXIMATE = ("forward_approx", "add_forward_approx")
_DECOMPOSED = {"none": (), "approximate": _APPROXIMATE, "all": _EXACT + _APPROXIMATE}
_is_compiling = torch.compiler.is_compiling
_formulas: FrozenSet[str] = frozenset()  # the ops whose formula compilers see


def wants_formula(name: str) -> bool:
    """Whether `bhyt.functional` runs the formula of an op now: a compiler is tracing, and is not to see the op.

    An export to ONNX never sees the ops, since its runtimes do not have them.

    Args:
        name: the op, such as "forward_approx".

    Returns:
        True where the formula is to run.
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
    """Choose whether `torch.compile` and `torch.export` see fused ops or formulas from now on.

    The choice concerns `bhyt.functional` and the modules. Eager calls and TorchScript always run the fused ops. A new
    choice has code compiled anew. The choice holds for the process.

    Args:
        sites: "none" (default) keeps every site a fused op. "approximate" gives the compiler the formula of approximate
            sites, which are pointwise. "all" gives it the formula of every site.

    Raises:
        ValueError: another value.
    """
    global _formulas
    if sites not in _DECOMPOSED:
        raise ValueError(f"sites: expected one of {', '.join(_DECOMPOSED)}, got {sites!r}")
    _formulas = frozenset(_DECOMPOSED[sites])
