"""What can be known of the CUDA kernels without a GPU.

Their real source runs on the CPU under tests/cpp/simt.h, compiled by g++ alone, and is compared with float64. Their
machine code is read by test_machine_code.py.
"""

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Dict

import pytest

from support.paths import ROOT, TESTS
from support.programs import built

KERNELS, SOURCES = ROOT / "csrc" / "cuda", TESTS / "cpp"
PROGRAMS = ("test_cuda_device", "test_cuda_ladder", "test_cuda_math", "test_cuda_forward", "test_cuda_quantized",
            "test_cuda_backward", "test_cuda_one_launch", "test_cuda_ring")  # fmt: skip


@pytest.fixture(scope="module")
def programs() -> Dict[str, Path]:
    """The compiled test programs, two at a time."""

    def build(name: str) -> Path:
        options = ["-std=c++20", "-O1", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas", "-DBHYT_SIMT"]
        return built(name, [SOURCES / f"{name}.cpp"], [*options, f"-I{SOURCES}", f"-I{KERNELS}"])

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(PROGRAMS, pool.map(build, PROGRAMS)))


@pytest.mark.parametrize("name", PROGRAMS)
def test_kernels_on_the_host(programs: Dict[str, Path], name: str) -> None:
    done = subprocess.run([programs[name]], capture_output=True, text=True, timeout=300)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


def test_kernels_know_no_torch() -> None:
    for path in KERNELS.iterdir():
        if path.name != "binding.cpp":
            assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text()), path.name
