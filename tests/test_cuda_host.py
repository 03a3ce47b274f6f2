"""What can be known of the CUDA kernels without a GPU.

Their real source runs on the CPU under tests/cpp/simt.h, compiled by g++ alone, and is compared with float64. Their
machine code is read by test_machine_code.py.
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "csrc" / "cuda"
PROGRAMS = ("test_cuda_device", "test_cuda_ladder", "test_cuda_math", "test_cuda_forward", "test_cuda_quantized",
            "test_cuda_backward")  # fmt: skip


def run(command: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the compiled test programs."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("cuda_host")
    launcher = [path] if (path := shutil.which("ccache")) else []

    def build(name: str) -> subprocess.CompletedProcess[str]:
        source = ROOT / "tests" / "cpp" / f"{name}.cpp"
        options = ["-std=c++20", "-O1", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas", "-DBHYT_SIMT"]
        includes = [f"-I{source.parent}", f"-I{KERNELS}"]
        return run([*launcher, compiler, *options, *includes, str(source), "-o", str(folder / name)], 300)

    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(build, PROGRAMS):
            assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", PROGRAMS)
def test_kernels_on_the_host(programs: Path, name: str) -> None:
    done = run([str(programs / name)], 300)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


def test_kernels_know_no_torch() -> None:
    for path in KERNELS.iterdir():
        if path.name != "binding.cpp":
            assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text()), path.name
