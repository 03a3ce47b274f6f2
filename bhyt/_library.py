"""Finds and loads the op library, or says in one line why this is impossible."""

from pathlib import Path
from typing import Mapping

import torch

_FOLDER = Path(__file__).parent
_MEND = "reinstall bhyt in this environment (pip install --no-build-isolation --force-reinstall --no-deps .)"
if (_FOLDER.parent / "setup.py").exists():
    _MEND = (
        f"this is the source folder, which hides an installed bhyt from what runs in {_FOLDER.parent}:"
        " run from another one, or install with pip install --no-build-isolation --no-deps -e ."
    )


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def library_path() -> str:
    """The op library's file, for programs that load it without Python (docs/deploy.md).

    Returns:
        An absolute path.

    Raises:
        ImportError: it has not been built.
    """
    library = next(_FOLDER.glob("_ops*.so"), None)
    if library is None:
        raise ImportError(f"bhyt: the op library has not been built; {_MEND}")
    return str(library)


def _build(info: Mapping[str, str]) -> str:
    """A text that two builds share if they are the same; `info` has the names of `torch.ops.bhyt.build_info`."""
    archs = info.get("cuda_archs", "unknown")
    text = f"{info.get('version', 'unknown')} for torch {_minor(info.get('torch', 'unknown'))}"
    return text + (f" and CUDA {archs}" if archs else "")


def _registered() -> Mapping[str, str]:
    """The build of a library that this process has loaded by itself; empty where the library does not say."""
    info: Mapping[str, str] = torch.ops.bhyt.build_info() if hasattr(torch.ops.bhyt, "build_info") else {}
    return info


def load(version: str) -> None:
    """Register `torch.ops.bhyt.*`, unless a library of the same build has.

    Args:
        version: the version of this package.

    Raises:
        ImportError: the library is missing, was built for another minor version of torch or another version of bhyt,
            or does not load; or the ops are registered already, by a library of another build.
    """
    try:
        from bhyt._built_for import CUDA_ARCHS, TORCH, VERSION
    except ImportError:
        raise ImportError(f"bhyt: the op library has not been built; {_MEND}") from None
    if _minor(TORCH) != _minor(torch.__version__):
        raise ImportError(f"bhyt: built for torch {TORCH}, running torch {torch.__version__}; {_MEND}")
    if VERSION != version:
        raise ImportError(f"bhyt: version {version} has an op library of version {VERSION}; {_MEND}")
    if hasattr(torch.ops.bhyt, "forward"):
        ours = _build({"version": version, "torch": TORCH, "cuda_archs": CUDA_ARCHS})
        theirs = _build(_registered())
        if theirs != ours:
            raise ImportError(
                f"bhyt: a library that was loaded before has registered the ops of version {theirs}, this package needs"
                f" those of version {ours}: load a copy of bhyt.library_path() instead, or none"
            )
        return
    library = library_path()
    try:
        torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    except OSError as error:
        raise ImportError(
            f"bhyt: the op library built for torch {TORCH} does not load in torch {torch.__version__}"
            f" ({error}); {_MEND}"
        ) from error
