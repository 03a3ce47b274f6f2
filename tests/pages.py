"""The blocks of README.md and the pages in docs/, which tests run."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import List, Tuple

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(python|bash)( \S+)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> List[Tuple[str, str, str]]:
    """(language, file name or nothing, code) of each."""
    return [(language, name.strip(), code) for language, name, code in BLOCK.findall((ROOT / page).read_text())]


def run_block(language: str, code: str, folder: Path) -> str:
    """A block in a process of its own; what it printed."""
    # `python` in the page is this one; from here bhyt is the package under test, not the checkout.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    command = [sys.executable, "-c", code] if language == "python" else ["bash", "-euo", "pipefail", "-c", code]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=dict(os.environ, PATH=path))
    assert run.returncode == 0, f"{code}\n{run.stdout}\n{run.stderr}"
    return run.stdout
