"""The folder of a run: whose it is, what it was started with, its tokenizer."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

from pretraining.files import locked

from .data import HeldOut, load_tokenizer, train_tokenizer
from .documents import Source
from .train import checkpoints_of

TOKENIZER_DOCUMENTS = 100_000  # the first so many are what a tokenizer is trained on


def claim(arguments: argparse.Namespace, until_the_end: contextlib.ExitStack) -> None:
    """Locks --out, and sees to it that nothing in it is written over unasked.

    Raises:
        SystemExit: there is something, or somebody.
    """
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    until_the_end.enter_context(locked(out))
    there = [path for path in sorted(out.iterdir()) if path.name != "lock"]
    if arguments.overwrite:
        for path in [*checkpoints_of(out), *(out / name for name in ("logs", "model", "tokenizer"))]:
            shutil.rmtree(path, ignore_errors=True)
        for name in ("run.json", "trainer_state.json"):
            (out / name).unlink(missing_ok=True)
    elif arguments.resume and there and not (out / "run.json").exists():
        raise SystemExit(f"{out} has no run of this program to resume: run.json is missing")
    elif there and not arguments.resume:
        raise SystemExit(f"{there[0]} is there: --resume goes on, --overwrite starts anew, or give another --out")


def note_run(out: Path, run: dict[str, Any], streams: int | None, processes: int) -> int:
    """Notes what decides the result, or compares it with what a run that is resumed has noted; the number of streams.

    Raises:
        SystemExit: they differ.
    """
    file = out / "run.json"
    before = json.loads(file.read_text()) if file.exists() else None
    run = json.loads(json.dumps({**run, "streams": streams or (before or {}).get("streams") or processes}))
    if before is not None and run != before:
        changed = [f"{name} {before.get(name)} (now {run[name]})" for name in run if run[name] != before.get(name)]
        raise SystemExit(f"{out} has other settings: {', '.join(changed)}")
    if run["streams"] % processes or run["batch"] % run["streams"]:
        raise SystemExit(f"--streams: expected a multiple of the {processes} processes that divides the {run['batch']} "
                         f"sequences of a step, got {run['streams']}")  # fmt: skip
    file.write_text(json.dumps(run, indent=1))
    return run["streams"]


def ensure_tokenizer(folder: Path, source: Source, held_out: HeldOut, vocab_size: int) -> None:
    if not folder.exists():
        texts = (text for text in islice(source.texts(), TOKENIZER_DOCUMENTS) if text not in held_out)
        unfinished = folder.with_suffix(".tmp")
        train_tokenizer(texts, vocab_size).save_pretrained(unfinished)
        unfinished.replace(folder)


def checked_tokenizer(place: str, vocab_size: int) -> Any:
    tokenizer = load_tokenizer(place)
    largest = max(tokenizer.get_vocab().values())  # there may be holes below
    if largest >= vocab_size:
        raise SystemExit(f"--vocab-size: expected at least the {len(tokenizer)} tokens of {place}, whose largest id is "
                         f"{largest}, got {vocab_size}")  # fmt: skip
    return tokenizer
