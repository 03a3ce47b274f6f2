"""Every CPU instruction set: the tests marked `every_tier`, each in a process whose tier is forced.

They assert docs/numbers.md against float64; USERS rows 7, 8, 11, 13, 14, 15, 17 and 18 for every tier. And which tier
a call gets.
"""

import os
import platform
import subprocess
import sys

import pytest
import torch

import bhyt  # noqa: F401
from support.paths import ROOT, TESTS
from support.programs import built

FILES = ("test_accuracy.py", "test_determinism.py", "test_dtypes.py", "test_nonfinite.py", "test_quantized.py")
# How torch names what ATEN_CPU_CAPABILITY asks for.
TIERS = {"default": "DEFAULT", "avx2": "AVX2", "avx512": "AVX512"}


def in_tier(tier: str, *command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": tier, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *command], cwd=TESTS / "ops", env=environment, capture_output=True, text=True, timeout=900
    )


@pytest.mark.slow
@pytest.mark.parametrize("tier", TIERS)
def test_tier(tier: str) -> None:
    """The error targets, determinism and non-finite rules of docs/numbers.md hold with this instruction
    set."""
    if TIERS[tier] == torch.backends.cpu.get_cpu_capability():
        pytest.skip(f"{tier} is what this process runs: the tests marked every_tier cover it here")
    if tier not in torch.ops.bhyt.build_info()["cpu_tiers"].split():  # torch would believe the variable, and crash
        pytest.skip(f"this CPU has no {tier}")
    run = in_tier(
        tier,
        "-m",
        "pytest",
        "-x",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "-m",
        "every_tier and not slow",
        "-k",
        "not cuda",
        *FILES,
    )
    assert run.returncode == 0, f"{tier}:\n{run.stdout[-6000:]}\n{run.stderr[-2000:]}"
    assert f"cpu tier {TIERS[tier]}" in run.stdout


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86-64 has tiers")
def test_best_tier_within_what_is_asked() -> None:
    """ATEN_CPU_CAPABILITY that names more than the CPU has gets the CPU's best kernels, one that names less its own."""
    sources = [TESTS / "cpp" / "test_cpu_tiers.cpp", ROOT / "csrc" / "cpu" / "kernels.cpp"]
    program = built("test_cpu_tiers", sources, ["-std=c++20", f"-I{ROOT / 'csrc'}"])
    run = subprocess.run([program], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
