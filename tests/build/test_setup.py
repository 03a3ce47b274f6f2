"""What setup.py decides before it compiles anything. Real installs are in packaging.sh."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Dict

import pytest

from support.fresh import run_fresh
from support.packages import needs
from support.paths import ROOT

# Runs setup.py up to the first compilation; prints what it would compile with.
STOPPED = """
import os, runpy, sys
import torch, setuptools
import torch.utils.cpp_extension as build
torch.version.cuda = sys.argv[1] or torch.version.cuda
torch.__version__ = os.environ.get("FAKE_TORCH", torch.__version__)
really = setuptools.setup
def linked(**kwargs):
    print("LINKS", *kwargs["ext_modules"][0].libraries)
    really(**kwargs)
setuptools.setup = linked
def stop(*args, **kwargs):
    print("COMPILES", os.environ["MAX_JOBS"], *kwargs.get("cuda_post_cflags") or [])
    sys.exit(0)
build._write_ninja_file_and_compile_objects = stop
os.cpu_count = lambda: 64
sys.path.insert(0, os.getcwd())
sys.argv = ["setup.py", "build_ext", "-b", sys.argv[2], "-t", sys.argv[2]]
runpy.run_path("setup.py", run_name="__main__")
"""


def setup(folder: Path, torch_cuda: str = "", **environment: str) -> "subprocess.CompletedProcess[str]":
    own = ("MAX_JOBS", "BHYT_CUDA_ARCHS", "CC", "CXX", "PYTORCH_NVCC")
    variables: Dict[str, str] = {k: v for k, v in os.environ.items() if k not in own}
    return run_fresh(STOPPED, torch_cuda, folder, cwd=ROOT, environment=variables | environment)


@pytest.fixture
def cuda_build(tmp_path: Path) -> Path:
    """A folder to build in, on a machine with nvcc."""
    if setup(tmp_path, BHYT_CUDA="1").returncode:
        pytest.skip("no nvcc")
    return tmp_path


def test_parallel_build_is_bounded(tmp_path: Path) -> None:
    """Four compilers at most, of a gigabyte each, even with 64 cores; MAX_JOBS overrules. USERS row 3."""
    assert "COMPILES 4" in setup(tmp_path, BHYT_CUDA="0").stdout
    assert "COMPILES 2" in setup(tmp_path, BHYT_CUDA="0", MAX_JOBS="2").stdout


def test_cuda_versions(cuda_build: Path) -> None:
    """A toolkit of another minor version than torch's warns and builds; of another major one it fails, naming
    both. USERS row 3."""
    minor = setup(cuda_build, "13.9", BHYT_CUDA="1")
    assert minor.returncode == 0 and "COMPILES" in minor.stdout
    assert "minor version mismatch" in minor.stdout + minor.stderr
    major = setup(cuda_build, "11.8", BHYT_CUDA="1")
    assert major.returncode != 0 and "COMPILES" not in major.stdout
    assert "11.8" in major.stderr and "mismatches the version" in major.stderr


def test_cuda_targets(cuda_build: Path) -> None:
    """Machine code for the architectures asked for, and PTX of the newest. USERS row 4."""
    assert "code=sm_90" in (only := setup(cuda_build, BHYT_CUDA="1", BHYT_CUDA_ARCHS="90").stdout)
    assert "code=compute_90" in only and "sm_80" not in only
    assert "LINKS cudart_static" in only and "c10_cuda" not in only  # this torch is 2.11 or newer: see below


def toolkit(folder: Path, version: str, archs: str) -> str:
    """A CUDA_HOME whose nvcc can say what it is, and nothing else."""
    home = folder / f"cuda-{version}"
    for name in ("bin", "include", "lib64"):
        (home / name).mkdir(parents=True)
    (home / "include" / "cuda_runtime_api.h").touch()
    nvcc = home / "bin" / "nvcc"
    listed = "\n".join(f"compute_{arch}" for arch in archs.split())
    nvcc.write_text(
        "#!/bin/sh\ncase $1 in\n"
        f"--list-gpu-arch) echo '{listed}';;\n"
        f"--version) echo 'Cuda compilation tools, release {version}, V{version}.1';;\n"
        "*) exit 1;;\nesac\n"
    )
    nvcc.chmod(0o755)
    return str(home)


TOOLKITS = {  # version: what nvcc --list-gpu-arch names (the older ones in part), machine code for, PTX of
    "12.4": ("50 70 75 80 86 89 90", "80 90", "90"),
    "12.9": ("75 80 90 100 101 103 120 121", "80 90 100 120", "100"),
    "13.0": ("75 80 90 100 110 103 120 121", "80 90 100 110 120", "100"),
}


def test_targets_are_those_of_the_toolkit(tmp_path: Path) -> None:
    """Machine code for each generation that nvcc knows, and PTX that all later ones run: of 100 before 13.0,
    which knows 11.0 by another number. What nvcc lacks and was asked for stops the build. USERS row 4."""

    def targets(version: str) -> "tuple[str, str]":
        home = toolkit(tmp_path, version, TOOLKITS[version][0])
        done = setup(tmp_path / version, BHYT_CUDA="1", CUDA_HOME=home)
        assert done.returncode == 0, done.stdout + done.stderr
        found = re.findall(r"arch=compute_(\d+),code=(sm|compute)_(\d+)", done.stdout)
        assert all(virtual == real for virtual, _, real in found)
        machine, ptx = ([arch for arch, kind, _ in found if kind == of] for of in ("sm", "compute"))
        return " ".join(machine), " ".join(ptx)

    for version in TOOLKITS:
        assert targets(version) == TOOLKITS[version][1:], version
    home = toolkit(tmp_path / "asked", "12.4", TOOLKITS["12.4"][0])
    refusal = setup(tmp_path, BHYT_CUDA="1", CUDA_HOME=home, BHYT_CUDA_ARCHS="120 90 90a")
    assert refusal.returncode == 1 and "COMPILES" not in refusal.stdout
    message = refusal.stderr.strip().splitlines()[-1]
    assert 'BHYT_CUDA_ARCHS="120 90 90a"' in message and "has no 120 90a; it has 50 70 75 80 86 89 90" in message


def test_streams_of_older_torch(tmp_path: Path) -> None:
    """Before 2.11 only the CUDA part of torch hands out a stream: linked then, refused where torch has none."""
    home = toolkit(tmp_path, "12.4", TOOLKITS["12.4"][0])
    old, without, unasked = (
        setup(tmp_path, cuda, CUDA_HOME=home, FAKE_TORCH=version, BHYT_CUDA=wanted)
        for cuda, version, wanted in (("12.4", "2.10.0+cu124", "1"), ("", "2.10.0+cpu", "1"), ("", "2.10.0+cpu", ""))
    )
    assert "LINKS cudart_static rt dl pthread c10_cuda" in old.stdout
    assert without.returncode == 1 and "torch 2.10.0+cpu, before 2.11, needs CUDA" in without.stderr
    assert unasked.returncode == 0 and "cudart" not in unasked.stdout
    assert "building for the CPU only" in unasked.stderr


def test_workflows_are_valid() -> None:
    """The workflows that build wheels and the site, against GitHub's schema."""
    needs("check_jsonschema", "test")
    workflows = sorted(map(str, (ROOT / ".github" / "workflows").glob("*.yml")))
    assert len(workflows) >= 2
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", *workflows]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
