"""Breaks the kernels one line at a time and asks the tests to notice.

    python tests/cpp/mutations.py [cpu | cuda]      every mutant, or those of one device; exit status 1 if one survives

Each mutant is a copy of the sources with one replacement. CUDA: the programs in this folder are built against it and
run.
CPU: the translation units of one instruction set are compiled anew, linked with the objects of an ordinary build (kept
in build/mutations) and put under the op-level tests, then with fuzz_rows.cpp, which alone reaches instruction sets
that this CPU surpasses; the kernels as they are go first and must pass. Those of an instruction set that this CPU lacks
are not run, and said so. A mutant is caught when a test fails, or the build; a CUDA one also when it does not end.
CUDA: some minutes on two cores; CPU: an hour.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mutants import AVX2, AVX512, CPU, CUDA, Mutant
from mutants_variants import CUDA_VARIANTS

ROOT = Path(__file__).resolve().parents[2]

NAMES = (
    "accuracy",
    "autograd",
    "determinism",
    "layouts",
    "dtypes",
    "nonfinite",
    "quantized",
    "quantized_calls",
    "memory",
    "tiers",
)
TESTS = [f"tests/ops/test_{name}.py" for name in NAMES]
FUZZ_SECONDS = 20
# Those of setup.py, but for a quick build.
FLAGS = ("-std=c++20 -O1 -fPIC -fopenmp -ffp-contract=off -fno-math-errno -fno-trapping-math -fvisibility=hidden -w "
         "-DPy_LIMITED_API=0x030a0000").split()


def mutate(csrc: Path, mutant: Mutant, device: str) -> None:
    file = csrc / device / mutant.file
    text = file.read_text()
    if mutant.old not in text:
        raise SystemExit(f"{mutant.file} no longer has: {mutant.old}")
    file.write_text(text.replace(mutant.old, mutant.new, 1))


def passes(command: list[str], **options) -> bool:
    try:
        return subprocess.run(command, capture_output=True, **options).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def cuda_passes(mutant: Mutant, folder: Path) -> bool:
    """Whether every program of the mutant builds in `folder`, against its csrc, and ends well."""
    programs = folder / "tests" / "cpp"  # beside the csrc that they include, some of it by a path from here
    include = [f"-I{programs}", f"-I{folder / 'csrc' / 'cuda'}"]
    options = ["-std=c++20", "-O1", "-ffp-contract=off", "-w", "-DBHYT_SIMT", *include]
    for program in mutant.targets:
        source, built = programs / f"test_cuda_{program}.cpp", folder / program
        if not passes(["g++", *options, str(source), "-o", str(built)]) or not passes([str(built)], timeout=300):
            return False
    return True


def cpu_objects() -> Path:
    """An ordinary build of the op library in build/mutations, and the fuzz target; ninja keeps what has not changed."""
    build = ROOT / "build" / "mutations"
    environment = {**os.environ, "BHYT_CUDA": "0", "BHYT_CXXFLAGS": "-O1"}
    command = ["setup.py", "-q", "build_ext", "--build-temp", str(build), "--build-lib", str(build)]
    subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    fuzz = ["g++", *FLAGS, "-Icsrc", f"-DBHYT_FUZZ_SECONDS={FUZZ_SECONDS}", "-c", "tests/cpp/fuzz_rows.cpp"]
    subprocess.run([*fuzz, "-o", str(build / "fuzz_rows.o")], cwd=ROOT, check=True)
    return build


def cpu_passes(build: Path, units: tuple[str, ...], folder: Path) -> str:
    """What notices folder/csrc with these translation units of it: "" if nothing does, else the build or a test."""
    from torch.utils import cpp_extension

    objects = {p.relative_to(build): p for p in (build / "csrc").rglob("*.o")}
    for unit in units:
        source = folder / "csrc" / "cpu" / f"{unit}.cpp"
        include = cpp_extension.include_paths() if unit == "binding" else []
        command = ["g++", *FLAGS, *(f"-I{p}" for p in (folder / "csrc", *include)), "-c", str(source), "-o"]
        built = source.with_suffix(".o")
        if not passes([*command, str(built)]):
            return "the compiler"
        objects[Path("csrc/cpu") / built.name] = built
    libraries = [f"-L{p}" for p in cpp_extension.library_paths()] + ["-lc10", "-ltorch_cpu", "-ltorch"]
    library = folder / "bhyt" / "_ops.abi3.so"
    if not passes(["g++", "-shared", *map(str, objects.values()), *libraries, "-o", str(library)]):
        return "the linker"
    tier = "avx512" if units == AVX512 else "avx2"
    # Child processes of the tests find the mutant too, not an installed bhyt.
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": tier, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2",
                   "PYTHONPATH": str(folder)}
    pytest = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-m", "not slow", *TESTS]
    run = subprocess.run(pytest, cwd=folder, env=environment, capture_output=True, text=True)
    failed = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if run.returncode != 0:
        return failed[0].split(" - ")[0] if failed else f"exit status {run.returncode}"
    kernels = [str(built) for name, built in objects.items() if name.name.startswith("kernels")]
    fuzz = [str(folder / "fuzz")]
    if not passes(["g++", str(build / "fuzz_rows.o"), *kernels, "-o", *fuzz, "-pthread"]):
        return "the fuzz target's linker"
    return "" if passes(fuzz) else "the fuzz target"


def copied(folder: Path, build: Path) -> None:
    """The sources, and a package `bhyt` with tests that import it, but for the library."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("csrc", "bhyt", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copy(build / "bhyt" / "_built_for.py", folder / "bhyt")


def of_this_cpu(mutants: tuple[Mutant, ...]) -> tuple[Mutant, ...]:
    from torch.backends.cpu import get_cpu_capability

    if get_cpu_capability() == "AVX512":
        return mutants
    within = tuple(mutant for mutant in mutants if mutant.targets != AVX512)
    print(f"not run: {len(mutants) - len(within)} of AVX-512, which this CPU has not", flush=True)
    return within


def cpu_survivors(mutants: tuple[Mutant, ...]) -> int:
    build, survivors = cpu_objects(), 0
    listed = {mutant.targets for mutant in mutants}
    as_they_are = tuple(Mutant("loops-inl.h", "", "", units) for units in (AVX2, AVX512) if units in listed)
    for mutant in as_they_are + mutants:
        with tempfile.TemporaryDirectory() as name:
            folder, started = Path(name), time.monotonic()
            copied(folder, build)
            mutate(folder / "csrc", mutant, "cpu")
            noticed = cpu_passes(build, mutant.targets, folder)
        if mutant in as_they_are:
            if noticed:
                raise SystemExit(f"the kernels as they are fail: {noticed}")
            print("passed   the kernels as they are", *mutant.targets, flush=True)
            continue
        survivors += not noticed
        report(mutant, noticed, time.monotonic() - started)
    return survivors


def cuda_survivors(mutants: tuple[Mutant, ...]) -> int:
    survivors = 0
    programs = tuple(dict.fromkeys(program for mutant in mutants for program in mutant.targets))
    as_they_are = Mutant("ladder.h", "", "", programs)
    for mutant in (as_they_are, *mutants):
        with tempfile.TemporaryDirectory() as name:
            folder, started = Path(name), time.monotonic()
            for part in ("csrc", "tests/cpp"):
                shutil.copytree(ROOT / part, folder / part)
            mutate(folder / "csrc", mutant, "cuda")
            noticed = "" if cuda_passes(mutant, folder) else "its program"
        if mutant is as_they_are:
            if noticed:
                raise SystemExit("the kernels as they are fail")
            print("passed   the kernels as they are", *mutant.targets, flush=True)
            continue
        survivors += not noticed
        report(mutant, noticed, time.monotonic() - started)
    return survivors


def report(mutant: Mutant, noticed: str, seconds: float) -> None:
    outcome = f"caught   by {noticed}" if noticed else "SURVIVED"
    print(f"{outcome} ({seconds:.0f} s)\n         {mutant.file}: {mutant.old!r} -> {mutant.new!r}", flush=True)


def main(devices: list[str]) -> int:
    survivors = mutants = 0
    for device, listed, survive in (("cuda", CUDA + CUDA_VARIANTS, cuda_survivors), ("cpu", CPU, cpu_survivors)):
        if device in devices or not devices:
            listed = of_this_cpu(listed) if device == "cpu" else listed
            survivors, mutants = survivors + survive(listed), mutants + len(listed)
    print(f"{mutants - survivors} of {mutants} caught")
    return survivors > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
