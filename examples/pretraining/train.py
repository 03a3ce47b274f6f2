"""One training run: optimiser, schedule, measurements, going on.

What a run does depends only on its configuration and the step it is at, so a run that was interrupted and
resumed has the bits of one that was not. How many processes share its batches changes no more than rounding.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .data import Corpus
from .distributed import World, first_line
from .files import RunFiles
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
    accumulate: int = 1
    processes: int = 1

    def __post_init__(self) -> None:
        counts = ("steps", "batch", "refresh", "log_every", "eval_every", "checkpoint_every", "accumulate", "processes")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "seed"):
            if not 0 <= getattr(self, name) < 2**31:  # NaN is neither
                raise ValueError(f"{name} must be at least 0 and below 2^31, got {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if not self.clip > 0:
            raise ValueError(f"clip must be positive (inf: none), got {self.clip}")
        if self.batch % (self.processes * self.accumulate):
            raise ValueError(
                f"batch must be a multiple of {self.processes} processes * accumulate {self.accumulate}, "
                f"got {self.batch}"
            )

    @property
    def micro_batch(self) -> int:
        """Sequences that one process computes at a time."""
        return self.batch // (self.processes * self.accumulate)

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
        block: type[Block] | None = None, world: World = World(),
    ) -> None:
        """block: what the model is made of, if not what BLOCKS has under the name `norm`."""
        assert world.size == config.processes
        self.norm, self.config, self.corpus, self.world = norm, config, corpus, world
        self.files = RunFiles(out, norm)
        self.step = 0
        self.device = torch.device(config.device)
        torch.manual_seed(config.seed)
        self.model = Decoder(model, block or BLOCKS[norm]).to(self.device)
        self.optimizer = make_optimizer(self.model, config)
        self.parallel = world.parallel(self.model)
        self.compute_logits = torch.compile(self.parallel) if config.compile else self.parallel

    @property
    def tokens(self) -> int:
        return self.step * self.config.batch * self.model.config.seq_len

    # -- training

    def train(self, stop_at: int | None = None, signal: Callable[[], int] = lambda: 0) -> int:
        """Trains to the last step, or to step stop_at; logs, validates and saves on the way.

        signal: asked after every step. A number other than 0, in any process, is a reason to save and stop; it is
        returned, and 0 otherwise.
        """
        config = self.config
        stop = min(stop_at or config.steps, config.steps)
        if self.step >= stop:
            return 0
        if self.step == 0:
            if self.world.writes:
                self.files.start_log()
            self.log("start", **self.describe())
            self.log("valid", loss=self.validate())
        losses, since = [], time.perf_counter()
        with progress_bar(self.norm, self.step, config.steps, shown=self.world.writes) as bar:
            while self.step < stop:
                loss, grad_norm = self.train_step()
                losses.append(loss)
                self.step += 1
                bar.update()
                received = self.world.largest(signal())
                last = self.step == config.steps
                validates = last or self.step % config.eval_every == 0
                saves = received or self.step == stop or self.step % config.checkpoint_every == 0
                if not (validates or saves or self.step % config.log_every == 0):
                    continue
                # Only here the host waits for the device.
                mean_loss = self.world.sum(torch.stack(losses).mean().item()) / self.world.size
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
                if received:
                    return received
                losses, since = [], time.perf_counter()
        return 0

    def train_step(self) -> tuple[Tensor, Tensor]:
        """One optimiser step -> (loss, gradient norm before clipping), both left on the device.

        The loss is that of this process's part of the batch; the gradient is that of all of it.
        """
        config = self.config
        if self.step % config.refresh == 0:
            self.model.refresh()
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate(self.step)
        batch = self.corpus.batch(self.step, config.batch, self.model.config.seq_len, config.seed)
        micro_batches = zip(*(self.world.part(x).split(config.micro_batch) for x in batch))
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for number, (inputs, targets) in enumerate(micro_batches, start=1):
            with self.gradients_apart(number < config.accumulate):
                loss = self.loss(inputs, targets)
                (loss / config.accumulate).backward()
            losses.append(loss.detach())
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        return torch.stack(losses).mean(), grad_norm

    def gradients_apart(self, apart: bool) -> contextlib.AbstractContextManager:
        """Inside, no gradients are exchanged: those of the last micro-batch bring along what has accumulated."""
        return self.parallel.no_sync() if apart and self.world.size > 1 else contextlib.nullcontext()

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
        """The loss over a fixed set of held-out windows, which the processes share among them."""
        windows = self.corpus.validation(VALIDATION_WINDOWS, self.model.config.seq_len)
        mine = (x[self.world.rank :: self.world.size].split(self.config.micro_batch) for x in windows)
        total = self.world.sum(sum(self.loss(x, y).item() * len(x) for x, y in zip(*mine) if len(x)))
        return total / VALIDATION_WINDOWS

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
        if self.world.writes:
            self.files.append({"event": event, "norm": self.norm, "step": self.step, "tokens": self.tokens, **fields})

    # -- stopping and going on

    def save(self) -> None:
        if self.world.writes:
            self.files.save({
                "step": self.step,
                "identity": self.identity(),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            })

    def resume(self) -> int:
        """Goes back to the last checkpoint, log included; 0 if there is none, or the steps it had been going to.

        With other steps than those the schedule changes from here on, and the log says so.

        Raises:
            SystemExit: a file that cannot be read, or with which this run cannot go on.
        """
        state = self.world.from_writer(self._stored)
        if state is None:
            return 0
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise SystemExit(f"{self.files.checkpoint} does not fit this model: {first_line(error)}") from error
        self.step, planned = state["step"], state["identity"]["steps"]
        if self.world.writes:
            self.files.shorten_log(state["log_bytes"])
        if planned != self.config.steps:
            before = replace(self.config, steps=planned)
            self.log("steps", before=planned, now=self.config.steps, lr_before=before.learning_rate(self.step),
                     lr_now=self.config.learning_rate(self.step))
        return planned

    def _stored(self) -> dict[str, Any] | None:
        state, path = self.files.load(), self.files.checkpoint
        if state is None:
            return None
        here, there = self.identity(), state["identity"]
        differing = [key for key in here if key != "steps" and here[key] != there.get(key)]
        if differing:
            changed = [f"{key} {there.get(key)} (now {here[key]})" for key in differing]
            raise SystemExit(f"{path} has other settings: {', '.join(changed)}")
        if here["steps"] != there["steps"] and here["steps"] <= state["step"]:
            raise SystemExit(f"{path} is at step {state['step']} of {there['steps']}: cannot go on to {here['steps']}")
        return state

    def identity(self) -> dict[str, Any]:
        """The settings that decide what is computed: a checkpoint goes on only under the same ones, but for steps."""
        free = {"device", "compile", "log_every", "eval_every", "checkpoint_every", "accumulate", "processes"}
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


def progress_bar(name: str, done: int, steps: int, shown: bool) -> tqdm:
    interval = 0.2 if sys.stderr.isatty() else 10.0  # seconds; a redirected bar should not fill a file
    return tqdm(desc=f"{name:>10}", initial=done, total=steps, unit="step", mininterval=interval, disable=not shown)
