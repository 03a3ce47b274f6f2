"""Fixtures: the device, a fixed seed, and a number of threads that is put back. See README.md."""

import os
from typing import Iterator, List

import pytest

# Read when libgomp is loaded. Several workers have more threads than the machine has cores: those that wait must not
# spin, which takes half of the CPU time of some tests.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "every_tier: also run with every CPU instruction set, by test_tiers.py"
    )


def pytest_collection_modifyitems(items: List[pytest.Item]) -> None:
    """Files with slow tests first: pytest-xdist hands out files in this order, and a long last one has no company."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_report_header() -> str:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return f"torch {torch.__version__}, cpu tier {torch.backends.cpu.get_cpu_capability()}, CUDA device {gpu}"


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(20260119)


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Each device that has kernels; CUDA rows are skipped where there is no GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Whatever a test does to the number of threads is undone."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
