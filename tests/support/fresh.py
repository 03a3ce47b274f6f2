"""Code in processes that have imported torch and nothing of bhyt, which start in milliseconds: forks of one that has.

As a script it is that one process. A line of its input has code, arguments, a folder to work in, an environment, and
files for the output; a line of its output is the status that the process ended with.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, Dict, Optional

_TURN = threading.Lock()


@functools.cache
def _server() -> "subprocess.Popen[str]":
    """Ends with this process, at the end of its input."""
    return subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run_fresh(
    code: str, *arguments: object, cwd: Path, environment: Optional[Dict[str, str]] = None
) -> "subprocess.CompletedProcess[str]":
    """As `python -c CODE ARGUMENTS..` in this folder, torch being imported already, in any environment."""
    server, names = _server(), [str(argument) for argument in arguments]
    assert server.stdin and server.stdout
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "stdout", Path(folder) / "stderr"]
        work: Dict[str, Any] = {"code": code, "arguments": names, "cwd": str(cwd), "files": list(map(str, files))}
        work["environment"] = dict(os.environ) if environment is None else environment
        with _TURN:
            server.stdin.write(json.dumps(work) + "\n")
            server.stdin.flush()
            status = int(server.stdout.readline())
        return subprocess.CompletedProcess(["-c", *names], status, *(file.read_text() for file in files))


def _serve() -> Optional[str]:
    """The code to run, in a process that was started for it."""
    for line in sys.stdin:
        work = json.loads(line)
        if (child := os.fork()) == 0:
            for target, name in zip((1, 2), work["files"]):
                os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), target)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.environ.clear()
            os.environ.update(work["environment"])
            os.chdir(work["cwd"])
            sys.argv = ["-c", *work["arguments"]]
            return work["code"]
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return None


if __name__ == "__main__":
    import torch  # noqa: F401

    sys.path[0] = ""  # as with -c
    given = _serve()
    if given is not None:
        exec(compile(given, "<string>", "exec"), {"__name__": "__main__"})
