"""What a run leaves in its folder: log and checkpoint, whole whenever a process is killed, and written by one alone.

A checkpoint knows how long the log was. What came behind, a torn line too, is of steps that are done again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
from pathlib import Path
from typing import Any, Iterator

import torch

from .distributed import first_line

PARTS = {"step", "identity", "log_bytes", "model", "optimizer"}  # of a checkpoint


class RunFiles:
    """FOLDER/NAME.jsonl and FOLDER/NAME.pt."""

    def __init__(self, folder: Path, name: str) -> None:
        self.log, self.checkpoint = folder / f"{name}.jsonl", folder / f"{name}.pt"
        self._unfinished = self.checkpoint.with_suffix(".tmp")

    def exist(self) -> list[Path]:
        return [path for path in (self.log, self.checkpoint) if path.exists()]

    def remove(self) -> None:
        # The checkpoint first: without one a log is nothing to go on from.
        for path in (self.checkpoint, self._unfinished, self.log):
            path.unlink(missing_ok=True)

    # -- log

    def start_log(self) -> None:
        self.log.write_bytes(b"")

    def append(self, record: dict[str, Any]) -> None:
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    # -- checkpoint

    def save(self, state: dict[str, Any]) -> None:
        """Either the whole of it is there afterwards, or the previous one; its log is on the disk before it."""
        with self.log.open("rb") as log:
            os.fsync(log.fileno())
            state = {**state, "log_bytes": os.fstat(log.fileno()).st_size}
        with self._unfinished.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(self._unfinished, self.checkpoint)
        folder = os.open(self.checkpoint.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name
        finally:
            os.close(folder)

    def load(self) -> dict[str, Any] | None:
        """What was last saved, on the host; None if nothing was.

        Raises:
            SystemExit: a file that is no checkpoint, or one without its log.
        """
        if not self.checkpoint.exists():
            return None
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:  # what a damaged file raises is anything
            raise SystemExit(f"{self.checkpoint} cannot be read: {first_line(error)}") from error
        if not isinstance(state, dict) or not PARTS <= state.keys():
            raise SystemExit(f"{self.checkpoint} is no checkpoint of this version: it lacks some of {sorted(PARTS)}")
        length = self.log.stat().st_size if self.log.exists() else 0
        if length < state["log_bytes"]:
            had = state["log_bytes"]
            raise SystemExit(f"{self.log} has {length} bytes; {self.checkpoint} was saved when it had {had}")
        return state

    def shorten_log(self, length: int) -> None:
        os.truncate(self.log, length)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes out, until this one ends in whatever way.

    Raises:
        SystemExit: another one is in.
    """
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SystemExit(f"{folder}: another process writes here; give --out another folder") from error
        except OSError as error:  # some network file systems have no locks
            print(f"{folder} cannot be locked ({error}): see to it that nothing else writes there", file=sys.stderr)
        yield
