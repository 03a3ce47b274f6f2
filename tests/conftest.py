"""Fixtures: the device, a fixed seed, and a number of threads that is put back. See README.md."""

import importlib.util
import os
from pathlib import Path
from typing import Iterator, List, Optional

import pytest

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# Read when libgomp is loaded. Several workers have more threads than the machine has cores: those that wait must not
# spin, which takes half of the CPU time of some tests. Two threads each, so that rows are shared out at all.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(2, CORES // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))))

import torch  # noqa: E402

from support.packages import missing  # noqa: E402
from support.paths import TESTS  # noqa: E402

# What the rooms beyond the layer are about: a room is skipped in one line where none of its packages is installed.
ROOMS = {
    "hf": ("transformers",),
    "engines": ("transformers", "onnxruntime", "cmake"),
    "examples": ("transformers", "matplotlib"),
}


class SkippedRoom(pytest.Dir):
    def collect(self) -> List[pytest.Item]:
        return missing(f"one of {', '.join(ROOMS[self.path.name])}")


def pytest_collect_directory(path: Path, parent: pytest.Collector) -> Optional[pytest.Collector]:
    packages = ROOMS.get(path.name, ()) if path.parent == TESTS else ()
    if not packages or any(map(importlib.util.find_spec, packages)):
        return None
    return SkippedRoom.from_parent(parent, path=path)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "every_tier: also run with every CPU instruction set, by test_tiers.py")
    config.addinivalue_line("markers", "gpu: needs a CUDA device")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """For -n auto: a worker per core, at most eight; each takes half a gigabyte and imports torch."""
    return min(CORES, 8)


def pytest_collection_modifyitems(items: List[pytest.Item]) -> None:
    """Files with slow tests first: pytest-xdist hands out files in this order, and a long last one has no company."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """What needs a GPU, by its mark or its device, is skipped without one, for one reason."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if (item.get_closest_marker("gpu") or parameters.get("device") == "cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def pytest_report_header() -> str:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return f"torch {torch.__version__}, cpu tier {torch.backends.cpu.get_cpu_capability()}, CUDA device {gpu}"


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(20260119)


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Each device that has kernels."""
    return request.param


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Whatever a test does to the number of threads is undone."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
