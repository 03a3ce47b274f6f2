"""Finds and loads the op library, or says in one line why it cannot be."""

from pathlib import Path

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

    Raises:
        ImportError: it has not been built.
    """
    library = next(_FOLDER.glob("_ops*.so"), None)
    if library is None:
        raise ImportError(f"bhyt: the op library has not been built; {_MEND}")
    return str(library)


def load() -> None:
    """Register `torch.ops.bhyt.*`.

    Raises:
        ImportError: the library is missing, was built for another minor version of torch, or does not load.
    """
    try:
        from bhyt import _built_for
    except ImportError:
        raise ImportError(f"bhyt: the op library has not been built; {_MEND}") from None
    if _minor(_built_for.TORCH) != _minor(torch.__version__):
        raise ImportError(f"bhyt: built for torch {_built_for.TORCH}, running torch {torch.__version__}; {_MEND}")
    library = library_path()
    try:
        torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    except OSError as error:
        raise ImportError(
            f"bhyt: the op library built for torch {_built_for.TORCH} does not load in torch {torch.__version__}"
            f" ({error}); {_MEND}"
        ) from error
