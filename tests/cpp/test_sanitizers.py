"""The fuzz target under AddressSanitizer, briefly; sanitizers.sh has the long runs, ROBUSTNESS.md their outcomes."""

import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SECONDS = 5
# Each access is checked by a call, not by code of its own: as thorough, and compiled in three quarters of the time.
QUICK_TO_COMPILE = "-O0 --param asan-instrumentation-with-call-threshold=0"


def has_address_sanitizer() -> bool:
    name = "libasan.so"
    try:
        found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return False
    return found not in ("", name)


@pytest.mark.slow
@pytest.mark.release
@pytest.mark.skipif(not has_address_sanitizer(), reason="no g++ with AddressSanitizer")
def test_random_calls_of_every_instruction_set(tmp_path: Path) -> None:
    """Random calls to the rows of each instruction set: within bounds of float64, in the buffers' bounds, no leak. And
    tanh of every 100,003rd float, through the program that takes them all."""
    environment = {**os.environ, "OUT": str(tmp_path), "FUZZ_SECONDS": str(SECONDS), "FUZZ_CXXFLAGS": QUICK_TO_COMPILE}
    command = ["bash", str(HERE / "sanitizers.sh"), "address"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    calls, *sweeps = run.stdout.splitlines()
    assert int(calls.split()[0]) > 20, run.stdout
    assert len(sweeps) % 5 == 0 and sweeps and all(sweep.endswith("  ok") for sweep in sweeps), run.stdout
