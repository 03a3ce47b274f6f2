"""The tests of bhyt.hf with the oldest transformers that is supported; the installed one is the newest."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.release
def test_oldest_transformers(tmp_path: Path) -> None:
    """test_hf.py, test_hf_loading.py and test_hf_training.py pass with transformers 4.51, whose layers return tuples: a
    few packages go in front of the installed ones."""
    packages = ["transformers==4.51.3", "tokenizers<0.22", "huggingface_hub<1", "datasets==3.6.0"]
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), *packages]
    installed = subprocess.run(install, capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"pip finds no package index: {installed.stderr.strip()[-200:]}")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    files = [str(HERE / name) for name in ("test_hf.py", "test_hf_loading.py", "test_hf_training.py")]
    code = (
        "import sys, transformers, pytest; assert transformers.__version__ == '4.51.3';"
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, "-q", "-m", "not slow", *files],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, cwd=HERE, capture_output=True, text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
