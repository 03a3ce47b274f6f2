"""What can be known of the CUDA kernels without a GPU.

Their real source runs on the CPU under tests/cpp/simt.h, compiled by g++ alone, and is compared with float64. With
nvcc or a CUDA build at hand, the machine code for every architecture is read: no spills, and 16-byte accesses where the
kernels are tuned.
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import bhyt

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "csrc" / "cuda"
PROGRAMS = ("test_cuda_ladder", "test_cuda_math", "test_cuda_forward", "test_cuda_backward")
# What is tuned: 16-byte packs, row in registers, streaming or persistent.
TUNED = re.compile(r"forward_row_in_registers|forward_approx_streaming<.*true>|backward_rows_persistent|sum_partials")


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit or of the nvidia-cuda-* packages, or None."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    folders = [Path(home) / "bin"]
    try:
        import nvidia

        folders += [folder / "bin" for root in nvidia.__path__ for folder in Path(root).iterdir()]
    except ImportError:
        pass
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(map(str, folders)))


def run(command: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
    # cuobjdump looks for nvdisasm on the path, and finds it beside itself.
    path = os.pathsep.join([os.environ.get("PATH", ""), str(Path(command[0]).parent)])
    environment = {**os.environ, "PATH": path}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)


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
        if path.name != "bhyt_cuda.cpp":
            assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text()), path.name


def resources(files: list[Path], cuobjdump: str) -> dict[tuple[str, str], int]:
    """Bytes of stack, which is where registers spill to, by (architecture, kernel)."""
    log = "".join(run([cuobjdump, "-res-usage", str(file)], 60).stdout for file in files)
    found = re.findall(r"arch = (sm_\d+)|Function (\w+):\s+REG:\d+ STACK:(\d+)", log)
    names = subprocess.run(["c++filt"], input="\n".join(f[1] for f in found), text=True, capture_output=True).stdout
    arch, stacks = "", {}
    for (new_arch, _, stack), name in zip(found, names.split("\n")):
        arch = new_arch or arch
        if stack:
            stacks[arch, name] = int(stack)
    return stacks


def architectures() -> tuple[str, ...]:
    """Those that the build was asked for; else the list in setup.py, the one place that holds it."""
    if asked := os.environ.get("BHYT_CUDA_ARCHS"):
        return tuple(asked.split())
    match = re.search(r'"BHYT_CUDA_ARCHS", "([\d ]+)"', (ROOT / "setup.py").read_text())
    assert match, "setup.py: CUDA_ARCHS"
    return tuple(match.group(1).split())


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    program = tool("cuobjdump")
    if program is None or tool("nvdisasm") is None:
        pytest.skip("no cuobjdump: the machine code was not read")
    return program


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What has the machine code: the installed library; where that is built for fewer GPUs or none, objects made here."""
    if set(architectures()) <= set(re.findall(r"\d+", torch.ops.bhyt.build_info()["cuda_archs"])):
        return [Path(bhyt.library_path())]
    nvcc = tool("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc: the CUDA kernels were not compiled")
    folder, objects = tmp_path_factory.mktemp("cuda"), []
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures()]
    for name in ("forward", "backward"):
        objects.append(folder / f"{name}.o")
        options = ["-std=c++17", "-O3", "--threads", "2", *codes, "-c", str(KERNELS / f"{name}.cu")]
        done = run([nvcc, *options, "-o", str(objects[-1])], 900)
        assert done.returncode == 0, done.stderr
    return objects


@pytest.mark.slow
def test_kernels_compile_without_spills(compiled: list[Path], cuobjdump: str) -> None:
    """For every architecture: the tuned kernels need no stack."""
    found = resources(compiled, cuobjdump)
    assert {arch for arch, _ in found} == {f"sm_{arch}" for arch in architectures()}
    tuned = {key: stack for key, stack in found.items() if TUNED.search(key[1])}
    assert len(tuned) >= 70 * len(architectures())
    assert not any(tuned.values()), {key: stack for key, stack in tuned.items() if stack}


@pytest.mark.slow
def test_tuned_kernels_move_16_bytes_at_a_time(compiled: list[Path], cuobjdump: str) -> None:
    """Rows are read and written by 16-byte instructions, without local memory, in the code for sm_90."""
    sass = "".join(run([cuobjdump, "-sass", "-arch", "sm_90", str(file)], 600).stdout for file in compiled)
    functions = [part.partition("\n") for part in re.split(r"\n\s*Function : ", sass)[1:]]
    symbols = "\n".join(symbol.strip() for symbol, _, _ in functions)
    names = subprocess.run(["c++filt"], input=symbols, text=True, capture_output=True).stdout.splitlines()
    checked = 0
    for name, (symbol, _, body) in zip(names, functions):
        if not TUNED.search(name) or "sum_partials" in name:
            continue
        assert "LDG.E.128" in body and "STG.E.128" in body, symbol
        assert not re.search(r"\b(LDL|STL)\b", body), symbol
        checked += 1
    assert checked >= 36
