"""run_gpu.sh without a GPU: a dry run goes through every stage; which stage runs when, and for how long, with commands
that do nothing; the experiments' arithmetic."""

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = next(p for p in Path(__file__).resolve().parents if (p / "benchmarks").is_dir()) / "benchmarks"
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
FIRST = ["device", "install", "check", "experiments", "ncu", "goals", "large", "tests", "more"]
SECOND = ["install", "variants", "sanitizers", "only_a_gpu", "peers"]
LIMITS = {"first": 420, "second": 300}


def run_gpu(tmp_path: Path, call: str, **environment: str) -> "tuple[int, list[dict[str, Any]], list[str]]":
    """Exit status, stages and the commands called, with every program a machine with a GPU would have."""
    programs = dict.fromkeys(("python", "nvidia-smi", "ncu", "compute-sanitizer"), FAKE)
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
        "CALLS": str(calls), "PYTHONPATH": "", "CLOCK": str(clock), "TAKES": "0", "TMPDIR": str(tmp_path),
        **environment,
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(BENCHMARKS / "run_gpu.sh"), str(tmp_path / "out"), call],
        env=variables, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    written = tmp_path / "out" / f"stages-{call}.json"
    assert written.exists(), done.stdout + done.stderr
    return done.returncode, json.loads(written.read_text())["stages"], calls.read_text().splitlines()


def seconds_of(call: str) -> int:
    return int(call.split("--seconds ")[1].split()[0])


def test_stages_in_order_of_worth(tmp_path: Path) -> None:
    """All of them once, the benchmarks into one file, each with what its stage allows; the last takes up what the
    others left; peers and other builds from their files, unpacked where no result lies."""
    status, stages, calls = run_gpu(tmp_path, "first", WHEEL="bhyt.whl")
    assert status == 0 and [stage["stage"] for stage in stages] == FIRST
    assert {stage["status"] for stage in stages} == {"passed"}
    assert any("pip install" in call and call.endswith("bhyt.whl ") for call in calls)
    benchmarks = [call for call in calls if "bench_cuda.py" in call]
    parts = [call.split("--parts ")[1].split()[0] for call in benchmarks]
    assert parts == ["goals,decode", "large", "goals,decode,large,quantized,more"]
    assert all("--resume" in call and "out/cuda.json" in call for call in benchmarks)
    assert [seconds_of(call) for call in calls if "--seconds" in call] == [33, 63, 13, 73]
    assert sum(call.startswith("ncu") for call in calls) == 1

    (tmp_path / "calls").unlink()
    files = {"WHEEL": "w.whl", "PEERS": "p.tar.xz", "VARIANTS": "before=a.whl now=b.whl one=b.whl@one_launch"}
    status, stages, calls = run_gpu(tmp_path, "second", **files)
    assert status == 0 and [stage["stage"] for stage in stages] == SECOND
    at = next(i for i, call in enumerate(calls) if "tarfile -e" in call)
    site = Path(calls[at].split()[-1])
    assert calls[at + 1].endswith(f" in {site}:{site}/dsl/packages") and "--parts peers" in calls[at + 1]
    variants = next(call for call in calls if "bench_variants.py" in call)
    assert re.search(r"--variant before=\S+/before --variant now=\S+/now --variant one=\S+/one@one_launch ", variants)
    assert sum("zipfile -e" in call and "b.whl " in call for call in calls) == 2
    assert not site.exists() and tmp_path / "out" not in site.parents
    assert sum("compute-sanitizer" in call for call in calls) == 2
    assert len(list((tmp_path / "out").iterdir())) <= 8


def test_limits_add_up() -> None:
    """Stages can take no more than the command, with a wheel and without: so none is left out for want of time."""
    text = (BENCHMARKS / "run_gpu.sh").read_text()
    first, second = text.split('if [ "$CALL" = first ]; then')[1].split("\nelse\n")
    for body, limit, with_wheel in ((first, 420, True), (first, 420, False), (second, 300, True)):
        seconds = 0
        for line in body.splitlines():
            wheel, _, built = line.partition("; else ")
            for part, counts in ((wheel, with_wheel or "if [" not in line), (built, not with_wheel)):
                seconds += sum(map(int, re.findall(r"\bstage \w+ (\d+)", part))) if counts else 0
        assert seconds == limit
    assert "first) limit=420" in text and "second) limit=300" in text


def test_stages_that_fail_or_outlast_the_run(tmp_path: Path) -> None:
    """Failed ones are counted and the next one runs; one stops at its own limit, or with the run; what no time is
    left for is said. The logs are packed after each."""
    slow = '*"-m pytest"*|*bench_backward*seconds*'
    patterns = {"SLOW": slow, "TAKES": "90", "FAILS": "*goals,decode"}
    status, stages, calls = run_gpu(tmp_path, "first", WHEEL="w", LIMIT="230", **patterns)
    outcome = {stage["stage"]: (stage["status"], stage["seconds"]) for stage in stages}
    assert list(outcome) == FIRST and outcome["goals"] == ("failed (3)", 0)
    assert outcome["experiments"] == ("stopped after 45 s", 45) and outcome["tests"] == ("passed", 90)
    assert {outcome[name] for name in ("device", "install", "check", "ncu", "large", "more")} == {("passed", 0)}
    assert status == 2 and [seconds_of(call) for call in calls if "bench_cuda.py" in call] == [63, 13, 73]
    with tarfile.open(tmp_path / "out/logs-first.tar.gz") as logs:
        assert {Path(name).stem for name in logs.getnames()} == {"logs-first", *FIRST}

    (tmp_path / "calls").unlink()
    status, stages, calls = run_gpu(tmp_path, "first", LIMIT="100", SLOW='*"-m pip"*', TAKES="98")
    outcome = {stage["stage"]: (stage["status"], stage["seconds"]) for stage in stages}
    assert outcome["build"] == ("passed", 98) and "install" not in outcome
    left = [name for name in outcome if name not in ("device", "build")]
    assert {outcome[name] for name in left} == {("not run: no time left", 0)}
    assert status == len(left) and not any("-m pytest" in call for call in calls)


@pytest.mark.slow
def test_a_dry_run_goes_through_every_stage(tmp_path: Path) -> None:
    """With the real benchmarks, on the CPU: every file is there and says that it is of a dry run."""
    import bhyt

    package = Path(bhyt.__file__).parent
    for name in ("before", "now", "one"):
        with zipfile.ZipFile(tmp_path / f"{name}.whl", "w") as wheel:
            for path in package.rglob("*"):
                if path.suffix in (".py", ".so"):
                    wheel.write(path, path.relative_to(package.parent))
    builds = " ".join(f"{name}={tmp_path / name}.whl" for name in ("before", "now", "one")) + "@one_launch"
    environment = {**os.environ, "DRY": "1", "OMP_NUM_THREADS": "1", "VARIANTS": builds, "PYTHON": sys.executable,
                   "WHEEL": str(tmp_path / "now.whl")}  # fmt: skip
    for call, names in (("first", FIRST), ("second", SECOND)):
        command = ["bash", str(BENCHMARKS / "run_gpu.sh"), str(tmp_path / "out"), call]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        stages = json.loads((tmp_path / "out" / f"stages-{call}.json").read_text())
        assert stages["dry"] and [stage["stage"] for stage in stages["stages"]] == names
    files = {path.name: path for path in (tmp_path / "out").iterdir()}
    expected = {"cuda.json", "experiments.json", "variants.json"}
    assert set(files) == expected | {f"stages-{c}.json" for c in LIMITS} | {f"logs-{c}.tar.gz" for c in LIMITS}
    payloads = {name: json.loads(files[name].read_text()) for name in expected}
    assert all(payload["environment"]["dry"] for payload in payloads.values())
    assert {r["part"] for r in payloads["cuda.json"]["results"]} >= {"goals", "large"}
    assert [p["goal"][:2] for p in payloads["experiments.json"]["predictions"]] == ["E1"] * 4 + ["E2", "E3"]
    assert all(set(r["us"]) == {"before", "now", "one"} for r in payloads["variants.json"]["results"])
    assert payloads["variants.json"]["variants"]["one"] == "one_launch"
    assert len(payloads["variants.json"]["results"]) > 0


def test_experiments_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fixed cost is what is left at no elements; what was not measured is not judged."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_backward

    us = {f"E3 2^{power}": {"copy": 2.0**power / 1e6, "and grad_weight": 5 + 1.1 * 2.0**power / 1e6}
          for power in range(24, 29)}  # fmt: skip
    assert bench_backward.fixed_cost(us) == pytest.approx(5)
    judged = {item["goal"]: item for item in bench_backward.judged(us)}
    assert judged["E3: fixed cost, us"]["met"] is True
    assert {item["met"] for goal, item in judged.items() if not goal.startswith("E3")} == {None}
    us["E1"] = {"copy": 100.0, "grad_x": 102.0, "and grad_lam": 106.0, "and grad_weight": 107.0}
    judged = {item["goal"]: item for item in bench_backward.judged(us)}
    assert judged["E1: grad_lam adds, us"]["measured"] == 4 and judged["E1: grad_lam adds, us"]["met"] is False
    assert judged["E1: grad_weight adds, us"]["met"] is True


def test_a_result_file_is_replaced_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Who is stopped while writing leaves what was there."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import common

    out = tmp_path / "cuda.json"
    common.write_json("cuda", {"results": [1]}, out=str(out))

    def stopped(self: Path, text: str) -> int:
        with open(self, "w") as file:
            file.write(text[:5])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", stopped)
    with pytest.raises(KeyboardInterrupt):
        common.write_json("cuda", {"results": [1, 2]}, out=str(out))
    assert json.loads(out.read_text()) == {"results": [1]}
