"""One training run: optimiser, schedule, log, checkpoint and resume.

What a run does depends only on its configuration and the step it is at, so a run that was interrupted and
resumed has the bits of one that was not.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .data import Corpus
from .model import Block, Decoder, ModelConfig
from .norms import BLOCKS

VALIDATION_WINDOWS = 128
PROFILE_WINDOWS = 8


@dataclass(frozen=True)
class TrainConfig:
    steps: int
    batch: int
    lr: float
    warmup: int
    weight_decay: float
    clip: float
    seed: int
    refresh: int
    log_every: int
    eval_every: int
    checkpoint_every: int
    device: str
    dtype: str
    compile: bool

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "refresh", "log_every", "eval_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def learning_rate(self, step: int) -> float:
        """Linear warmup, then a cosine down to a tenth; step counts from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


class Run:
    """A model with one kind of norm on its way through training. Files: OUT/NORM.jsonl and OUT/NORM.pt."""

    def __init__(
        self, norm: str, model: ModelConfig, config: TrainConfig, corpus: Corpus, out: Path,
        block: type[Block] | None = None,
    ) -> None:
        """block: what the model is made of, if not what BLOCKS has under the name `norm`."""
        self.norm, self.config, self.corpus = norm, config, corpus
        self.log_path, self.checkpoint_path = out / f"{norm}.jsonl", out / f"{norm}.pt"
        self.step = 0
        self.device = torch.device(config.device)
        torch.manual_seed(config.seed)
        self.model = Decoder(model, block or BLOCKS[norm]).to(self.device)
        self.optimizer = make_optimizer(self.model, config)
        self.compute_logits = torch.compile(self.model) if config.compile else self.model

    @property
    def tokens(self) -> int:
        return self.step * self.config.batch * self.model.config.seq_len

    # -- training

    def train(self, stop_at: int | None = None) -> None:
        """Trains to the last step, or to step stop_at; logs, validates and saves on the way."""
        config = self.config
        stop = min(stop_at or config.steps, config.steps)
        if self.step >= stop:
            return
        if self.step == 0:
            self.log_path.write_text("")
            self.log("start", **self.describe())
            self.log("valid", loss=self.validate())
        losses, since = [], time.perf_counter()
        with progress_bar(self.norm, self.step, config.steps) as bar:
            while self.step < stop:
                loss, grad_norm = self.train_step()
                losses.append(loss)
                self.step += 1
                bar.update()
                last = self.step == config.steps
                validates = last or self.step % config.eval_every == 0
                saves = self.step == stop or self.step % config.checkpoint_every == 0
                if not (validates or saves or self.step % config.log_every == 0):
                    continue
                mean_loss = torch.stack(losses).mean().item()  # only here the host waits for the device
                tokens = len(losses) * config.batch * self.model.config.seq_len
                speed = round(tokens / (time.perf_counter() - since), 1)
                self.log("train", loss=mean_loss, lr=config.learning_rate(self.step - 1),
                         grad_norm=grad_norm.item(), tokens_per_second=speed)
                bar.set_postfix_str(f"loss {mean_loss:.3f}, {speed:,.0f} tokens/s")
                if not math.isfinite(mean_loss):
                    raise FloatingPointError(f"{self.norm}: the loss is {mean_loss} at step {self.step}")
                if validates:
                    self.log("valid", loss=self.validate())
                if last:
                    self.log("depth", **self.depth_profile())
                if saves:
                    self.save()
                losses, since = [], time.perf_counter()

    def train_step(self) -> tuple[Tensor, Tensor]:
        """One optimiser step -> (loss, gradient norm before clipping), both left on the device."""
        config = self.config
        if self.step % config.refresh == 0:
            self.model.refresh()
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate(self.step)
        loss = self.loss(*self.corpus.batch(self.step, config.batch, self.model.config.seq_len, config.seed))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        return loss.detach(), grad_norm

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per token; inputs and targets: [B, T]."""
        inputs, targets = inputs.to(self.device), targets.to(self.device)
        with self.autocast():
            logits = self.compute_logits(inputs)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def autocast(self) -> contextlib.AbstractContextManager:
        """bfloat16 means bfloat16 branches: parameters and the residual stream stay float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16")

    # -- measuring

    @torch.no_grad()
    def validate(self) -> float:
        """The loss over a fixed set of held-out windows."""
        inputs, targets = self.corpus.validation(VALIDATION_WINDOWS, self.model.config.seq_len)
        batches = zip(inputs.split(self.config.batch), targets.split(self.config.batch))
        total = sum(self.loss(x, y).item() * len(x) for x, y in batches)
        return total / len(inputs)

    def depth_profile(self) -> dict[str, list[float]]:
        """Magnitude and variance of the residual stream by depth, over held-out text."""
        inputs, _ = self.corpus.validation(PROFILE_WINDOWS, self.model.config.seq_len)
        with self.autocast():
            magnitude, variance = zip(*self.model.depth_profile(inputs.to(self.device)))
        return {"magnitude": list(magnitude), "variance": list(variance)}

    def describe(self) -> dict[str, Any]:
        return {
            "model": asdict(self.model.config),
            "train": asdict(self.config),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "text": self.corpus.name,
            "text_tokens": {"train": len(self.corpus.train), "valid": len(self.corpus.valid)},
            "unigram_entropy": self.corpus.unigram_entropy(),
        }

    def log(self, event: str, **fields: Any) -> None:
        record = {"event": event, "norm": self.norm, "step": self.step, "tokens": self.tokens, **fields}
        with self.log_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    # -- stopping and going on

    def save(self) -> None:
        state = {
            "step": self.step,
            "identity": self.identity(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        unfinished = self.checkpoint_path.with_suffix(".tmp")
        torch.save(state, unfinished)
        os.replace(unfinished, self.checkpoint_path)  # a crash while saving leaves the previous checkpoint

    def resume(self) -> bool:
        """Goes back to the last checkpoint, log included; False if there is none."""
        if not self.checkpoint_path.exists():
            return False
        state = torch.load(self.checkpoint_path, map_location=self.device, weights_only=True)
        here, there = self.identity(), state["identity"]
        if here != there:
            differing = [key for key in here if here[key] != there.get(key)]
            changed = [f"{key} {there.get(key)} (now {here[key]})" for key in differing]
            raise SystemExit(f"{self.checkpoint_path} has other settings: {', '.join(changed)}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        lines = self.log_path.read_text(encoding="utf-8").splitlines(keepends=True)
        self.log_path.write_text("".join(line for line in lines if json.loads(line)["step"] <= self.step))
        return True

    def identity(self) -> dict[str, Any]:
        """The settings that decide what is computed: a checkpoint goes on only under the same ones."""
        free = {"device", "compile", "log_every", "eval_every", "checkpoint_every"}
        train = {key: value for key, value in asdict(self.config).items() if key not in free}
        text = {"text": self.corpus.name, "text_tokens": len(self.corpus.train)}
        return {**asdict(self.model.config), **train, **text}


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices only: gains and lambdas are scales, and zero is no better place for them."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


def progress_bar(name: str, done: int, steps: int) -> tqdm:
    interval = 0.2 if sys.stderr.isatty() else 10.0  # seconds; a redirected bar should not fill a file
    return tqdm(desc=f"{name:>10}", initial=done, total=steps, unit="step", mininterval=interval)
