"""The stages of benchmarks/run_gpu.sh, with programs that do nothing."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from support.paths import BENCHMARKS

# Programs that do nothing but say that they were called and, some, let the clock go on. bash for timeout: it hands
# functions on.
FAKE = """#!/bin/sh
echo "$(basename "$0") $* ${PYTHONPATH:+in $PYTHONPATH}" >> "$CALLS"
case "$*" in
  *tarfile*) mkdir -p "$5" && echo dsl/packages > "$5/dsl.pth";;
  *device_capability*) echo 90;;
  *xdist*) exit 1;;
  SLOW) echo $(($(cat "$CLOCK") + TAKES)) > "$CLOCK";;
  FAILS) exit 3;;
esac
"""
DATE = """#!/bin/sh
cat "$CLOCK"
"""
TIMEOUT = """#!/usr/bin/env bash
end=$(($(cat "$CLOCK") + $2))
shift 2
"$@" || exit
[ "$(cat "$CLOCK")" -le "$end" ] || { echo "$end" > "$CLOCK"; exit 124; }
"""
STAGES = ["device", "build", "check", "goals", "tests", "peers", "sanitizers", "tests_slow", "compile", "model", "more"]


def run_gpu(tmp_path: Path, **environment: str) -> "tuple[int, list[dict[str, Any]], list[str]]":
    """Exit status, stages and the commands called, with every program a machine with a GPU would have."""
    programs = dict.fromkeys(("python", "nvidia-smi", "nvcc", "compute-sanitizer"), FAKE)
    patterns = {"SLOW": "none", "FAILS": "none", **environment}
    for name, text in {**programs, "date": DATE, "timeout": TIMEOUT}.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(text.replace("SLOW", patterns["SLOW"]).replace("FAILS", patterns["FAILS"]))
        program.chmod(0o755)
    calls, clock = tmp_path / "calls", tmp_path / "clock"
    clock.write_text("1000")
    variables = {
        **os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "bin/python"),
        "CALLS": str(calls), "PYTHONPATH": "", "CLOCK": str(clock), "TAKES": "0", **environment,
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(BENCHMARKS / "run_gpu.sh"), str(tmp_path / "out")],
        env=variables, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (tmp_path / "out/stages.json").exists(), done.stdout + done.stderr
    stages = json.loads((tmp_path / "out/stages.json").read_text())["stages"]
    return done.returncode, stages, calls.read_text().splitlines()


def seconds_of(call: str) -> int:
    return int(call.split("--seconds ")[1].split()[0])


def test_stages_in_order_of_worth(tmp_path: Path) -> None:
    """All of them once, the benchmarks into one file, each with what its stage allows; peers from their file."""
    status, stages, calls = run_gpu(tmp_path, PEERS="peers.tar.xz")
    assert status == 0 and [stage["stage"] for stage in stages] == STAGES
    assert {stage["status"] for stage in stages} == {"passed"}
    benchmarks = [call for call in calls if "bench_cuda.py" in call]
    assert [call.split("--parts ")[1].split()[0] for call in benchmarks] == ["goals,decode,quantized", "peers", "compiled,more"]
    assert all("--resume" in call and "out/cuda.json" in call for call in benchmarks)
    assert [seconds_of(call) for call in benchmarks] == [60, 85, 105]
    at = next(i for i, call in enumerate(calls) if "tarfile -e peers.tar.xz" in call)
    site = tmp_path / "out/.peers"
    assert calls[at + 1] == benchmarks[1] and benchmarks[1].endswith(f" in {site}:{site}/dsl/packages")
    assert not site.exists() and " in " not in benchmarks[0] + benchmarks[2]
    assert sum("compute-sanitizer" in call for call in calls) == 2


def test_stages_that_fail_or_outlast_the_run(tmp_path: Path) -> None:
    """Failed ones are counted and the next one runs; one stops at its own limit, or with the run; what no time is
    left for is said."""
    slow = '*"-m pytest"*|*bench_cuda*peers'
    status, stages, calls = run_gpu(tmp_path, LIMIT="300", SLOW=slow, TAKES="90", FAILS="*,decode,*")
    outcome = {stage["stage"]: (stage["status"], stage["seconds"]) for stage in stages}
    assert list(outcome) == STAGES and outcome["goals"] == ("failed (3)", 0)
    assert outcome["tests"] == ("passed", 90) and outcome["peers"] == ("passed", 90)
    assert outcome["tests_slow"] == ("stopped after 45 s", 45)
    assert {outcome[name] for name in ("device", "build", "check", "sanitizers", "compile", "model", "more")} == {
        ("passed", 0)
    }
    assert status == 2 and [seconds_of(call) for call in calls if "bench_cuda.py" in call] == [60, 85, 60]

    (tmp_path / "calls").unlink()
    status, stages, calls = run_gpu(tmp_path, LIMIT="100", SLOW='*"-m pip"*', TAKES="95")
    outcome = {stage["stage"]: (stage["status"], stage["seconds"]) for stage in stages}
    assert outcome["build"] == ("passed", 95)
    assert {outcome[name] for name in STAGES[2:]} == {("not run: no time left", 0)}
    assert status == len(STAGES[2:]) and not any("-m pytest" in call for call in calls)
