"""examples/pretrain.py in processes of its own, which start in milliseconds: forks of one that has imported it.

As a script it is that one process. A line of its input has arguments, variables of the environment and a file for the
output, or a process to wait for; a line of its output is the process that was started, or the status that one had.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Mapping, Sequence

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
HUNG = 120.0  # seconds, after which a process is killed and the test fails


class Started:
    """A process on its way."""

    def __init__(self, forks: Forks, pid: int, output: Path) -> None:
        self._forks, self.pid, self._output = forks, pid, output

    @property
    def output(self) -> str:
        """Of both streams, so far."""
        return self._output.read_text(errors="replace")

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def status(self) -> int:
        """As subprocess gives it: negative after a signal."""
        return self._forks.ask(wait=self.pid)


class Forks:
    """`with Forks(folder) as forks`; folder is for the outputs."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0

    def __enter__(self) -> Forks:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads would not survive a fork
        self._errors = (self._folder / "errors").open("w+")
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            cwd=self._folder, env=environment,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stdin.close()
        self._server.wait(HUNG)
        self._errors.close()

    def ask(self, **request: Any) -> int:
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, (self._folder / "errors").read_text()
        return json.loads(answer)

    def start(self, arguments: Sequence[object], environment: Mapping[str, str] = {}) -> Started:
        self._count += 1
        output = self._folder / f"output-{self._count}"
        output.touch()
        pid = self.ask(arguments=[str(a) for a in arguments], environment=dict(environment), output=str(output))
        return Started(self, pid, output)

    def start_ranks(self, *arguments: Sequence[object]) -> list[Started]:
        """One process per list of arguments, as torchrun starts them: it holds the store through which they meet."""
        from torch.distributed import TCPStore

        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._store.port), "WORLD_SIZE": str(len(arguments)),
                   "TORCHELASTIC_USE_AGENT_STORE": "True"}
        return [self.start(a, {**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)})
                for rank, a in enumerate(arguments)]

    def run(self, *arguments: object) -> str:
        """To its end, which must be a good one."""
        started = self.start(arguments)
        assert started.status() == 0, started.output
        return started.output

    def run_ranks(self, count: int, *arguments: object) -> list[str]:
        ranks = self.start_ranks(*[arguments] * count)
        assert [rank.status() for rank in ranks] == [0] * count, [rank.output for rank in ranks]
        return [rank.output for rank in ranks]


def _serve() -> Mapping[str, Any] | None:
    """In the forks, what they are for; None at the end of the input."""
    for line in sys.stdin:
        request = json.loads(line)
        answer = _wait(request["wait"]) if "wait" in request else os.fork()
        if answer == 0 and "arguments" in request:
            return request
        print(answer, flush=True)
    return None


def _wait(pid: int) -> int:
    deadline = time.monotonic() + HUNG
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise SystemExit(f"process {pid} hung")


if __name__ == "__main__":
    sys.path.insert(0, str(EXAMPLES))
    import pretrain
    import torch._dynamo  # noqa: F401  # which the first step of an optimizer imports: two seconds
    import torch.fx.experimental.symbolic_shapes  # noqa: F401

    pretrain.plot_comparison = lambda logs, path: None  # slow, and drawn in test_example.py
    work = _serve()
    if work is not None:
        file = os.open(work["output"], os.O_WRONLY | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(work["environment"])
        sys.exit(pretrain.main(work["arguments"]))
