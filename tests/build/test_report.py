"""`python -m bhyt`: the report and its self-check."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, Dict, Iterator, NamedTuple, Tuple

import pytest
import torch
from torch import Tensor

import bhyt
from bhyt import __main__ as report
from bhyt import _built_for


def test_report_and_self_check(tmp_path: Path) -> None:
    """Versions, build, tier, devices; every op within bounds on every device here. USERS rows 2 and 4."""
    run = subprocess.run([sys.executable, "-m", "bhyt"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    build = torch.ops.bhyt.build_info()
    for text in (bhyt.__version__, torch.__version__, build["cpu_tier"], build["compiler"], "GPUs:"):
        assert text in run.stdout
    assert (build["cuda_archs"] or "not built") in run.stdout
    assert run.stdout.count("within bounds") == len(report.devices())


def test_build_info() -> None:
    """Built for the torch that runs, of this version; the package knows the same facts of it. The tier in use is one
    that this CPU runs."""
    build = torch.ops.bhyt.build_info()
    assert build["version"] == bhyt.__version__ == _built_for.VERSION
    assert build["cuda_archs"] == _built_for.CUDA_ARCHS
    assert torch.__version__.startswith(build["torch"].split("+")[0].rsplit(".", 1)[0])
    assert build["cpu_tier"] in build["cpu_tiers"].split()


def test_self_check_finds_a_wrong_kernel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A forward that is off by a hundredth of a percent fails the report by name."""
    right = bhyt.functional.forward_approx

    def wrong(*args: object) -> Tensor:
        return right(*args) * 1.0001

    monkeypatch.setattr(bhyt.functional, "forward_approx", wrong)
    assert report.main() == 1
    assert "WRONG: cpu float32 forward_approx" in capsys.readouterr().out


class Gpu(NamedTuple):
    name: str
    major: int
    minor: int


def facts_with(
    monkeypatch: pytest.MonkeyPatch, code: Callable[[int], str], backward: str = "two_launches", **build: str
) -> Dict[str, str]:
    """The report of a build for CUDA 13.0 on a machine with an H100."""
    own = torch.ops.bhyt.build_info()
    fake = {**own, "cuda_archs": "sm_80", "cuda_runtime": "13.0", "cuda_driver": "13.0", "cuda_problem": "", **build}
    ops = SimpleNamespace(build_info=lambda: fake, cuda_code=code, cuda_backward=lambda: backward)
    ops = SimpleNamespace(bhyt=ops)
    monkeypatch.setattr(report.torch, "ops", ops)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: Gpu("NVIDIA H100", 9, 0))
    return report.facts()


def test_report_names_the_code_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build for 8.0 on 9.0, as tests/cpp/test_cuda_device.cpp has it; a device without code is an entry too."""
    code = "PTX of compute_80, compiled for sm_90 when loaded: no clusters, long rows are slower"
    facts = facts_with(monkeypatch, lambda i: code)
    assert facts["GPUs"] == f"cuda:0 NVIDIA H100 sm_90 ({code})"
    assert facts["CUDA kernels"] == "sm_80; CUDA 13.0, driver for CUDA 13.0"

    def none(i: int) -> str:
        raise RuntimeError("bhyt: no kernels for device cuda:0\nand a stack")

    assert facts_with(monkeypatch, none)["GPUs"].endswith("sm_90 (bhyt: no kernels for device cuda:0)")


def test_report_names_a_variant_of_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that BHYT_CUDA_BACKWARD asks for."""
    facts = facts_with(monkeypatch, lambda i: "", backward="one_launch")
    assert facts["CUDA kernels"] == "sm_80; CUDA 13.0, driver for CUDA 13.0; backward: one_launch, experimental"


@pytest.mark.parametrize("name", ["", "two_launches", "one_launch", "ring"])
def test_variants_of_the_backward(name: str, tmp_path: Path) -> None:
    """By name; no name is the first; an unknown one raises before anything is computed."""
    if not torch.ops.bhyt.build_info()["cuda_archs"]:
        pytest.skip("built without CUDA")
    code = "import torch, bhyt; print(torch.ops.bhyt.cuda_backward())"

    def run(variant: str) -> "subprocess.CompletedProcess[str]":
        environment = {**os.environ, "BHYT_CUDA_BACKWARD": variant}
        command = [sys.executable, "-c", code]  # elsewhere: a checkout has no library
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert run(name).stdout.strip() == (name or "two_launches")
    done = run(f"{name}s")
    expected = "BHYT_CUDA_BACKWARD: expected one of two_launches, one_launch, ring, got"
    assert done.returncode != 0 and f"{expected} {name}s" in done.stderr


def test_report_of_an_old_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both versions, and what to do."""
    problem = "built with CUDA 13.0, but the driver supports CUDA 12.8: update the driver"
    facts = facts_with(monkeypatch, lambda i: "", cuda_driver="12.8", cuda_problem=problem)
    assert facts["CUDA kernels"] == f"sm_80; CUDA 13.0, driver for CUDA 12.8: {problem}"


def test_report_goes_on_after_a_device_that_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The devices behind it are checked, and the exit status says that one failed."""
    right = report.self_check

    def check(device: str) -> Iterator[Tuple[str, float, float]]:
        if device == "cuda:0":
            raise RuntimeError("bhyt: no kernels for device cuda:0\nand a stack")
        yield from right("cpu")

    monkeypatch.setattr(report, "self_check", check)
    monkeypatch.setattr(report, "devices", lambda: ["cuda:0", "cpu"])
    assert report.main() == 1
    out = capsys.readouterr().out
    assert "cuda:0 FAILED: bhyt: no kernels for device cuda:0\n" in out
    assert "within bounds" in out.split("FAILED")[1]
