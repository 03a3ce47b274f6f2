"""Whether the code that a result measured has changed since: each table says so itself."""

import subprocess
from pathlib import Path
from typing import Any, Mapping, Optional

REPOSITORY = Path(__file__).resolve().parent.parent
NOTE = "\n**Older than the code:** sources that this table measures have changed since that commit."

# A clone with all commits; an sdist or a shallow clone cannot tell.
HISTORY = (REPOSITORY / ".git").exists() and not (REPOSITORY / ".git" / "shallow").exists()

_OPS = ("csrc/ops", "csrc/params.h", "csrc/wanted.h")
_KERNELS = {True: ("csrc/cuda", *_OPS), False: ("csrc/cpu", *_OPS)}  # on a GPU?
_PYTHON = {
    "overhead": ("bhyt/functional.py", "bhyt/modules.py", "bhyt/offset.py"),
    "compile": ("bhyt/functional.py", "bhyt/modules.py", "bhyt/reference.py"),
    "model": ("bhyt/modules.py", "bhyt/hf/layer.py"),
    "quantized": ("bhyt/quantization", "bhyt/hf/layer.py"),
    "serving": ("bhyt/vllm",),
    "quantized-accuracy": ("bhyt/quantization",),
    "quantized-profile": ("bhyt/quantization", "bhyt/hf/layer.py"),
}


def sources(result: Mapping[str, Any]) -> tuple[str, ...]:
    """The files and folders whose code a result measures."""
    env = result["environment"]
    return (*_KERNELS[bool(env.get("gpu") or env.get("device"))], *_PYTHON.get(result["benchmark"], ()))


def changed_since(commit: Optional[str], paths: tuple[str, ...], repository: Path = REPOSITORY) -> Optional[bool]:
    """Whether the files at hand differ from those of a commit; None where its history is not here (an sdist, a shallow
    clone)."""

    def git(*arguments: str) -> int:
        return subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True, timeout=60).returncode

    try:
        if not commit or git("cat-file", "-e", f"{commit}^{{commit}}") != 0:
            return None
        return git("diff", "--quiet", commit, "--", *paths) != 0
    except (OSError, subprocess.SubprocessError):
        return None


def note(result: Mapping[str, Any]) -> str:
    """What the caption of a stale table says; nothing when the code is the same, or cannot be compared."""
    return NOTE if changed_since(result["environment"].get("commit"), sources(result)) else ""
