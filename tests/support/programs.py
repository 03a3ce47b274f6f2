"""C++ programs and libraries that tests compile: each once, however many workers and runs ask for it."""

import fcntl
import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Sequence

import pytest

from support.paths import ROOT

BUILT = ROOT / "build" / "tests"  # by content: what the preprocessor makes of the source, the options, the compiler


def _run(command: Sequence[str]) -> bytes:
    done = subprocess.run(command, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def built(name: str, sources: Sequence[Path], options: Sequence[str], libraries: Sequence[str] = ()) -> Path:
    """The program (or, by its options, library) NAME of these sources; from an earlier build of the same, if there is
    one."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    command = [compiler, *options, *map(str, sources)]
    content = hashlib.sha256(repr((command, libraries)).encode() + _run([compiler, "--version"]))
    content.update(_run([*command, "-E"]))
    BUILT.mkdir(parents=True, exist_ok=True)
    target = BUILT / f"{content.hexdigest()[:16]}-{name}"
    with open(BUILT / f"{target.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker may be at it
        if not target.exists():
            unfinished = target.with_name(f"{target.name}.unfinished")
            _run([*command, "-o", str(unfinished), *libraries])
            unfinished.rename(target)
    return target
