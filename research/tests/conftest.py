"""As in tests/: waiting threads do not spin, and every test starts from the same random state."""

import os

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when libgomp is loaded

import torch  # noqa: E402


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(20260119)
