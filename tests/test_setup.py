"""What setup.py decides before it compiles anything. Real installs are in packaging.sh."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Dict

import pytest

ROOT = Path(__file__).parent.parent
# Runs setup.py up to the first compilation; prints what it would compile with.
STOPPED = """
import os, runpy, sys
import torch, setuptools
import torch.utils.cpp_extension as build
torch.version.cuda = sys.argv[1] or torch.version.cuda
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
    command = [sys.executable, "-c", STOPPED, torch_cuda, str(folder)]
    variables: Dict[str, str] = {k: v for k, v in os.environ.items() if k not in ("MAX_JOBS", "BHYT_CUDA_ARCHS")}
    return subprocess.run(
        command, cwd=ROOT, env=variables | environment, capture_output=True, text=True, timeout=300
    )


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
    """Machine code for four generations, and PTX of the newest for those to come. USERS row 4."""
    flags = setup(cuda_build, BHYT_CUDA="1").stdout
    for arch in ("80", "90", "100", "120"):
        assert f"arch=compute_{arch},code=sm_{arch}" in flags
    assert "arch=compute_120,code=compute_120" in flags
    assert "code=sm_90" in (only := setup(cuda_build, BHYT_CUDA="1", BHYT_CUDA_ARCHS="90").stdout)
    assert "code=compute_90" in only and "sm_80" not in only


def test_wheels_workflow_is_valid() -> None:
    """The workflow that builds wheels per torch minor version, against GitHub's schema."""
    pytest.importorskip("check_jsonschema")
    workflow = str(ROOT / ".github" / "workflows" / "wheels.yml")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", workflow]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
