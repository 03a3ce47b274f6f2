"""examples/pretrain.py under torchrun, which starts killed processes again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.checks import same_bits
from support.packages import needs
from support.paths import EXAMPLES

EXAMPLE = EXAMPLES / "pretrain.py"


@pytest.mark.slow
def test_elastic_restart(tmp_path: Path) -> None:
    """torchrun starts a killed process again: with --resume it goes on from its checkpoint, and ends with the bits of a
    run without a pause. USERS row 60."""
    needs("matplotlib")
    needs("tqdm")
    (tmp_path / "text.txt").write_text("".join(f"{i} squared is {i * i}.\n" for i in range(500)))
    (tmp_path / "once.py").write_text(
        "import os, runpy, signal, sys\n"
        "first = os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'\n"
        "sys.argv = sys.argv[1:] + (['--stop-at', '4'] if first else [])\n"
        "sys.path.insert(0, os.path.dirname(sys.argv[0]))\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally:\n    first and os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    tiny = (
        "--layers 2 --dim 32 --heads 4 --kv-heads 2 --seq-len 16 --batch 4 --steps 8 --warmup 2 --eval-every 50"
        " --device cpu --samples 0 --norm bhyt --text text.txt --out"
    ).split()
    torchrun = "-m torch.distributed.run --standalone --local-addr 127.0.0.1 --max-restarts 1 once.py".split()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    saved = []
    for out, launcher, more in (("whole", [], []), ("restarted", torchrun, ["--resume"])):
        command = [sys.executable, *launcher, str(EXAMPLE), *tiny, out, *more]
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stdout + run.stderr
        assert bool(launcher) == ("exitcode: -9" in run.stderr), run.stderr
        saved.append(torch.load(tmp_path / out / "bhyt.pt", weights_only=True))
    assert saved[0]["step"] == saved[1]["step"] == 8
    assert all(same_bits(saved[1]["model"][name], tensor) for name, tensor in saved[0]["model"].items())
