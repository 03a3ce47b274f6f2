"""As in tests/: waiting threads do not spin, and every test starts from the same random state."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when libgomp is loaded

import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("research/study", "benchmarks", "examples")]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(20260119)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} squared is {i * i}, and cubed {i**3}.\n" for i in range(1500)))
    return path
