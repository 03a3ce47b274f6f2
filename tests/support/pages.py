"""The blocks of README.md and the pages in docs/, which tests run.

    pages.py PAGE       all blocks of a page in this folder, one after the other: those with a file name are written,
                        Python ones get a process each, a fork of this one, which has imported torch and nothing of bhyt
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import List, Tuple

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(python|bash)( \S+)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BASH = ["bash", "-euo", "pipefail", "-c"]


def blocks(page: str) -> List[Tuple[str, str, str]]:
    """(language, file name or nothing, code) of each."""
    return [(language, name.strip(), code) for language, name, code in BLOCK.findall((ROOT / page).read_text())]


def run(command: List[str], folder: Path) -> str:
    """What it printed."""
    # `python` in the page is this one; from here bhyt is the package under test, not the checkout.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=dict(os.environ, PATH=path))
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def run_bash(code: str, folder: Path) -> str:
    return run([*BASH, code], folder)


def run_page(page: str, folder: Path) -> str:
    return run([sys.executable, __file__, page], folder)


def main(page: str) -> None:
    import torch._inductor.compile_fx  # noqa: F401  (else most forks do: seconds)

    sys.path[0] = ""  # as without a file
    for language, name, code in blocks(page):
        if name:
            Path(name).write_text(code)
        elif language == "bash":
            subprocess.run([*BASH, code], check=True)
        elif os.fork() == 0:
            return exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        elif os.wait()[1] != 0:
            sys.exit(f"{page}: failed\n{code}")


if __name__ == "__main__":
    main(sys.argv[1])
