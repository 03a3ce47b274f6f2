"""Text as byte tokens: which text, what is held out, and which windows a step sees."""

from __future__ import annotations

import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

import torch
from torch import Tensor

BOS = 256  # in front of every document
VOCAB = 257  # the bytes and BOS
HELD_OUT = 20  # one document in 20 is for validation


@dataclass(frozen=True)
class Corpus:
    name: str
    train: Tensor  # [N] int16
    valid: Tensor  # [M] int16

    def batch(self, step: int, size: int, seq_len: int, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, [size, seq_len] int64 each, from random places of the training text.

        A function of (seed, step) alone: every norm sees the same data, and so does a run that resumes.
        """
        generator = torch.Generator().manual_seed((seed << 32) + step)
        starts = torch.randint(len(self.train) - seq_len, (size,), generator=generator)
        return _split(self.train.unfold(0, seq_len + 1, 1)[starts])

    def validation(self, count: int, seq_len: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, [count, seq_len] int64 each, evenly spread over the held-out text."""
        starts = torch.linspace(0, len(self.valid) - seq_len - 1, count, dtype=torch.float64).long()
        return _split(self.valid.unfold(0, seq_len + 1, 1)[starts])

    def unigram_entropy(self) -> float:
        """Nats per token: the loss of the best model that knows only how often each token occurs."""
        counts = torch.bincount(torch.cat((self.train, self.valid)).int(), minlength=VOCAB).double()
        frequency = counts[counts > 0] / counts.sum()
        return -(frequency * frequency.log()).sum().item()


def load_corpus(paths: list[Path], seq_len: int) -> Corpus:
    """Every 20th document is held out; of fewer than 20 documents, the last 5 % of each."""
    try:
        documents = list(_documents(paths) if paths else _standard_library())
    except OSError as error:
        raise SystemExit(f"text cannot be read: {error}") from error
    if len(documents) >= HELD_OUT:
        train = [text for i, text in enumerate(documents) if i % HELD_OUT != HELD_OUT - 1]
        valid = documents[HELD_OUT - 1 :: HELD_OUT]
    else:
        cuts = [len(text) - len(text) // HELD_OUT for text in documents]
        train = [text[:cut] for text, cut in zip(documents, cuts)]
        valid = [text[cut:] for text, cut in zip(documents, cuts)]
    name = ", ".join(path.name for path in paths) or "Python standard library"
    corpus = Corpus(name, _tokens(train), _tokens(valid))
    if min(len(corpus.train), len(corpus.valid)) <= seq_len:
        raise SystemExit(
            f"too little text: {len(corpus.train)} tokens to train on, {len(corpus.valid)} to validate on, "
            f"and a sequence needs {seq_len + 1}; give more --text or a smaller --seq-len"
        )
    return corpus


def _standard_library() -> Iterator[bytes]:
    """The sources that come with every Python, without its tests, in the order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    sources = [path for path in root.rglob("*.py") if skipped.isdisjoint(path.relative_to(root).parts)]
    if not sources:
        raise SystemExit(f"this Python has no sources under {root}; give some text with --text")
    for path in sorted(sources, key=lambda path: path.relative_to(root).as_posix()):
        yield path.read_bytes()


def _documents(paths: list[Path]) -> Iterator[bytes]:
    """A plain file is one document; a .jsonl file has one per line, in the field "text"."""
    for path in paths:
        if path.suffix != ".jsonl":
            yield path.read_bytes()
            continue
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    yield json.loads(line)["text"].encode()
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    message = f'{path}:{number}: expected a JSON object with a string "text"'
                    raise SystemExit(message) from error


def _tokens(documents: list[bytes]) -> Tensor:
    text = [torch.frombuffer(bytearray(document), dtype=torch.uint8) for document in documents if document]
    bos = torch.tensor([BOS], dtype=torch.int16)
    return torch.cat([piece for document in text for piece in (bos, document.short())] or [bos[:0]])


def _split(windows: Tensor) -> tuple[Tensor, Tensor]:
    """[n, T + 1] -> inputs and targets [n, T]: each token's target is its successor."""
    windows = windows.long()
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
