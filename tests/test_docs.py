"""The blocks of docs/deploy.md, run as they stand: each in a process of its own, one after the other."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(python|bash)( \S+)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_deploy_page(tmp_path: Path) -> None:
    """Every route of the page. A block with a file name is written there. USERS rows 22 and 23."""
    if not shutil.which("cmake"):
        pytest.skip("no cmake")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    blocks = BLOCK.findall((ROOT / "docs" / "deploy.md").read_text())
    assert len(blocks) >= 10, "the page has lost its blocks"
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    # `python` in the page is this one; from here bhyt is the package under test, not the checkout.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    for language, name, code in blocks:
        if name:
            (tmp_path / name.strip()).write_text(code)
            continue
        command = [sys.executable, "-c", code] if language == "python" else ["bash", "-euo", "pipefail", "-c", code]
        run = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ, PATH=path)
        )
        assert run.returncode == 0, f"{code}\n{run.stdout}\n{run.stderr}"
