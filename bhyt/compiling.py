"""What compilers and exporters make of a site: our fused op, or its formula in plain PyTorch ops.

A fused op is opaque to Inductor, which cannot fuse its neighbours into it; the formula can be fused, and gives up our
kernels. Which is faster is measured by benchmarks/bench_compile.py; the default is what was faster there.
"""

import functools
from typing import Any, Callable, Dict

import torch

from bhyt import functional, reference

_EXACT = ("forward", "add_forward")
_APPROXIMATE = ("forward_approx", "add_forward_approx")
_DECOMPOSED = {"none": (), "approximate": _APPROXIMATE, "all": _EXACT + _APPROXIMATE}


def decompositions() -> Dict[Any, Callable[..., Any]]:
    """The formula of each forward op in plain PyTorch ops, for `torch.export.ExportedProgram.run_decompositions`.

    For runtimes that do not load the op library, such as ONNX.
    """
    return {getattr(torch.ops.bhyt, name).default: getattr(reference, name) for name in _EXACT + _APPROXIMATE}


@functools.cache  # one object per op: compiled code is guarded by its identity
def _formula_when_compiling(name: str) -> Callable[..., Any]:
    op, formula = getattr(torch.ops.bhyt, name), getattr(reference, name)

    def site(*args: Any) -> Any:
        return formula(*args) if torch.compiler.is_compiling() else op(*args)

    return site


def decompose_when_compiling(sites: str = "none") -> None:
    """Choose what `torch.compile` and `torch.export` see of `bhyt.functional` and the modules from now on.

    Eager calls run the fused ops whatever is chosen; compiled code is compiled anew when the choice changes. The setting
    holds for the process. TorchScript takes models under "none" only.

    Args:
        sites: "none" (default) keeps every site a fused op; "approximate" gives the compiler the formula of approximate
            sites, which are pointwise; "all" that of every site.

    Raises:
        ValueError: another value.
    """
    if sites not in _DECOMPOSED:
        raise ValueError(f"sites: expected one of {', '.join(_DECOMPOSED)}, got {sites!r}")
    for name in _EXACT + _APPROXIMATE:
        fused = name not in _DECOMPOSED[sites]
        setattr(functional, f"_{name}", getattr(torch.ops.bhyt, name) if fused else _formula_when_compiling(name))
