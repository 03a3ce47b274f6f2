"""How a model goes on from held-out text: not a measure, but the first thing one wants to see."""

from __future__ import annotations

from typing import Iterator

import torch

from .data import BOS
from .train import Run

PROMPT, LENGTH, TEMPERATURE = 32, 64, 0.8


@torch.no_grad()
def sample(run: Run, count: int) -> Iterator[tuple[str, str]]:
    """(prompt, continuation) of `count` places; what is drawn depends on the weights and the seed alone."""
    seq_len = run.model.config.seq_len
    prompt = min(PROMPT, max(1, seq_len // 2))
    tokens, _ = run.corpus.validation(count, prompt)
    generator = torch.Generator().manual_seed(run.config.seed)
    while tokens.shape[1] < min(prompt + LENGTH, seq_len):
        with run.autocast():
            logits = run.model(tokens.to(run.device))[:, -1]
        probabilities = (logits.float().cpu() / TEMPERATURE).softmax(-1)
        tokens = torch.cat((tokens, torch.multinomial(probabilities, 1, generator=generator)), dim=1)
    for row in tokens.tolist():
        yield _text(row[:prompt]), _text(row[prompt:])


def _text(tokens: list[int]) -> str:
    """A document that ends is followed by a line of its own."""
    return b"".join(b"\n" if token == BOS else bytes([token]) for token in tokens).decode("utf-8", "replace")
