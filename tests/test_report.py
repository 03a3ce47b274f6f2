"""`python -m bhyt`: the report and its self-check."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import bhyt
from bhyt import __main__ as report


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
    """Built for the torch that runs; the tier in use is one that this CPU runs."""
    build = torch.ops.bhyt.build_info()
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
