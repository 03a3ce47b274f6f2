"""What can be known of the CUDA kernels without a GPU.

Their real source runs on the CPU under tests/cpp/simt.h, compiled by g++ alone, and is compared with float64. With
nvcc present they also compile for every architecture, without spills and with 128-bit accesses where they are tuned.
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


def resources(log: str) -> dict[tuple[str, str], dict[str, int]]:
    """What ptxas -v reports, by (architecture, kernel)."""
    entry = re.compile(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    found = entry.findall(log)
    names = subprocess.run(["c++filt"], input="\n".join(f[0] for f in found), text=True, capture_output=True).stdout
    return {
        (arch, name): {"stack": int(stack), "stores": int(stores), "loads": int(loads), "registers": int(registers)}
        for (_, arch, stack, stores, loads, registers), name in zip(found, names.splitlines())
    }


def architectures() -> tuple[str, ...]:
    """The list in setup.py, the one place that holds it."""
    match = re.search(r'"BHYT_CUDA_ARCHS", "([\d ]+)"', (ROOT / "setup.py").read_text())
    assert match, "setup.py: CUDA_ARCHS"
    return tuple(match.group(1).split())


@pytest.fixture(scope="module", params=["forward", "backward"])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """An object with every architecture, what ptxas said of it, and its name."""
    nvcc = tool("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc: the CUDA kernels were not compiled")
    archs = architectures()
    target = tmp_path_factory.mktemp("cuda") / f"{request.param}.o"
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    options = ["-std=c++17", "-O3", "-Xptxas", "-v", "--threads", "2", *codes]
    done = run([nvcc, *options, "-c", str(KERNELS / f"{request.param}.cu"), "-o", str(target)], 900)
    assert done.returncode == 0, done.stderr
    return target, done.stdout + done.stderr, request.param


@pytest.mark.slow
def test_kernels_compile_without_spills(compiled: tuple[Path, str, str]) -> None:
    _, log, _ = compiled
    found = resources(log)
    assert {arch for arch, _ in found} == {f"sm_{arch}" for arch in architectures()}
    tuned = {key: use for key, use in found.items() if TUNED.search(key[1])}
    assert tuned
    spilled = {key: use for key, use in tuned.items() if use["stores"] or use["loads"]}
    assert not spilled, spilled


@pytest.mark.slow
def test_tuned_kernels_move_16_bytes_at_a_time(compiled: tuple[Path, str, str]) -> None:
    target, _, name = compiled
    cuobjdump = tool("cuobjdump")
    if cuobjdump is None or tool("nvdisasm") is None:
        pytest.skip("no cuobjdump: the machine code was not read")
    sass = run([cuobjdump, "-sass", "-arch", "sm_90", str(target)], 600).stdout
    kernels = re.split(r"\n\s*Function : ", sass)[1:]
    assert kernels
    checked = 0
    for kernel in kernels:
        symbol, _, body = kernel.partition("\n")
        if not TUNED.search(run(["c++filt", symbol.strip()], 10).stdout) or "sum_partials" in symbol:
            continue
        assert "LDG.E.128" in body and "STG.E.128" in body, symbol
        assert not re.search(r"\b(LDL|STL)\b", body), symbol
        checked += 1
    assert checked >= (9 if name == "backward" else 27)
