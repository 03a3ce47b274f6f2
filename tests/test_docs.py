"""The documents: blocks of docs/deploy.md, run as they stand; tests named in docs/users.md."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(python|bash)( \S+)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_deploy_page(programs: Path) -> None:
    """Every route of the page, where its C++ build stands; a block with a file name is written. USERS rows 22, 23."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    blocks = BLOCK.findall((ROOT / "docs" / "deploy.md").read_text())
    assert len(blocks) >= 10, "the page has lost its blocks"
    folder = programs.parent
    # `python` in the page is this one; from here bhyt is the package under test, not the checkout.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    for language, name, code in blocks:
        if name:
            (folder / name.strip()).write_text(code)
            continue
        command = [sys.executable, "-c", code] if language == "python" else ["bash", "-euo", "pipefail", "-c", code]
        run = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, env=dict(os.environ, PATH=path)
        )
        assert run.returncode == 0, f"{code}\n{run.stdout}\n{run.stderr}"


def test_users_page() -> None:
    """Rows 1 to 30, each with tests that exist."""
    page = (ROOT / "docs" / "users.md").read_text()
    rows = {int(n): tests for n, tests in re.findall(r"^\| (\d+) \|.*\| (.*) \|$", page, re.MULTILINE)}
    assert list(rows) == list(range(1, 31))
    for n, tests in rows.items():
        file = ""
        for name in re.findall(r"`([^`]+)`", tests):
            file, _, test = name.partition("::") if not name.startswith("::") else (file, "", name[2:])
            code = (ROOT / "tests" / file).read_text()
            assert not test or f"def {test}(" in code, f"row {n}: {file}::{test}"
        assert file, f"row {n} names no test"
