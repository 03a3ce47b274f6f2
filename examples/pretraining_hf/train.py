"""transformers' Trainer on streams of packed sequences: positions in its checkpoints, signals, what it prints."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any, Callable

import torch.distributed as dist
from torch.utils.data import DataLoader, default_collate
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import bhyt.hf
from bhyt.gain import whole
from pretraining.distributed import World

from .data import Sequences

POSITION = "data.json"  # in a checkpoint; written last, so that a checkpoint without it is not whole


class StreamTrainer(Trainer):
    """Its batches are those of its own process's streams, which need no sharding and are not read ahead.

    Its forwards build no cache. The model's config says use_cache, as saved models should: generate reads it.
    """

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        model.config.use_cache = True  # Trainer sets it to false

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, {**inputs, "use_cache": False}, *args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(
            self.train_dataset, self.args.per_device_train_batch_size, pin_memory=self.args.device.type == "cuda"
        )


class Position(TrainerCallback):
    """Puts the position of every stream, of all processes, beside what a checkpoint has; then deletes old checkpoints.

    Trainer's own rotation goes by the time of folders, and counts those that are not whole.
    """

    def __init__(self, sequences: Sequences, world: World, keep: int) -> None:
        """keep: so many of the last whole checkpoints."""
        self._sequences, self._world, self._keep = sequences, world, keep

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        parts: list[Any] = [self._sequences.state_dict()] * self._world.size
        if self._world.size > 1:
            dist.all_gather_object(parts, parts[0])
        if self._world.writes:
            file = Path(args.output_dir, f"checkpoint-{state.global_step}", POSITION)
            unfinished = file.with_suffix(".tmp")
            unfinished.write_text(json.dumps([position for part in parts for position in part]))
            os.replace(unfinished, file)
            rotate(Path(args.output_dir), self._keep)


def checkpoints_of(out: Path) -> list[Path]:
    """The folders `checkpoint-STEP`, by step; other names are the user's."""
    found = [path for path in out.glob("checkpoint-*") if re.fullmatch("checkpoint-[0-9]+", path.name)]
    return sorted(found, key=step_of)


def whole_checkpoints(out: Path) -> list[Path]:
    return [checkpoint for checkpoint in checkpoints_of(out) if (checkpoint / POSITION).exists()]


def last_checkpoint(out: Path) -> Path | None:
    """The newest one that is whole."""
    return next(reversed(whole_checkpoints(out)), None)


def rotate(out: Path, keep: int) -> None:
    """Deletes all checkpoints but the last `keep` whole ones."""
    kept = whole_checkpoints(out)[-keep:]
    for checkpoint in checkpoints_of(out):
        if checkpoint not in kept:
            (checkpoint / POSITION).unlink(missing_ok=True)  # from now on it is not whole
            shutil.rmtree(checkpoint, ignore_errors=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def load_position(checkpoint: Path, sequences: Sequences, world: World) -> None:
    """Puts this process's streams where they were, however many processes there were."""
    positions = json.loads((checkpoint / POSITION).read_text())
    mine = len(positions) // world.size
    sequences.load_state_dict(positions[world.rank * mine : (world.rank + 1) * mine])


class StopOnSignal(TrainerCallback):
    """Once any process has got a signal, all of them save and stop behind the same step."""

    def __init__(self, received: Callable[[], int], world: World) -> None:
        """received: the number of the signal that this process has got, or 0."""
        self._received, self._world, self.stopped_by = received, world, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.stopped_by = self._world.largest(self._received())
        if self.stopped_by:
            control.should_save = control.should_training_stop = True


class Report(TrainerCallback):
    """A line per log, with the speed; ends a run whose loss is no number."""

    def __init__(self, tokens_per_step: int, world: World) -> None:
        self._tokens_per_step, self._world = tokens_per_step, world

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._since = time.perf_counter(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        line = f"step {state.global_step:,} of {state.max_steps:,}"
        if "loss" in logs:
            now = time.perf_counter(), state.global_step
            speed = (now[1] - self._since[1]) * self._tokens_per_step / max(now[0] - self._since[0], 1e-9)
            self._since = now
            line += f": loss {logs['loss']:.4f}, learning rate {logs['learning_rate']:.3g}, {speed:,.0f} tokens/s"
        elif "eval_loss" in logs:
            loss = logs["eval_loss"]
            line += f": held-out loss {loss:.4f}, perplexity {math.exp(min(loss, 700)):.2f}"
            self._since = time.perf_counter(), state.global_step
        else:
            return
        if self._world.writes:
            print(line, flush=True)
        if not math.isfinite(logs.get("loss", 0.0)):  # the mean over all processes: each of them ends here
            raise SystemExit(f"the loss is {logs['loss']} at step {state.global_step}")


def make_trainer(
    model: Any,
    arguments: TrainingArguments,
    sequences: Sequences,
    evaluation: list[Any],
    tokenizer: Any,
    world: World,
    refresh: int,
    keep: int,
    received: Callable[[], int],
) -> tuple[StreamTrainer, StopOnSignal]:
    """
    Args:
        refresh: steps between updates of variance offsets; 0: the model has none.
        keep: see Position.
        received: see StopOnSignal.
    """  # fmt: skip
    stop = StopOnSignal(received, world)
    tokens = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * world.size
    tokens *= len(evaluation[0]["input_ids"])
    callbacks = [bhyt.hf.refresh_callback(refresh)] if refresh else []
    trainer = StreamTrainer(
        model, arguments, data_collator=default_collate, train_dataset=sequences, eval_dataset=evaluation,
        processing_class=tokenizer,
        callbacks=[*callbacks, stop, Position(sequences, world, keep), Report(tokens, world)],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer, stop


def save_model(trainer: StreamTrainer, folder: Path, world: World) -> None:
    """Whole weights, config and tokenizer, as the Auto classes load them; every process calls it."""
    if not trainer.is_fsdp_enabled:
        trainer.save_model(str(folder))
        return
    model, weights = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False), {}
    once: dict[int, Any] = {}  # tied weights stay one tensor
    for name, part in model.state_dict(keep_vars=True).items():  # of all processes, one at a time
        tensor = whole(part.detach())
        if world.writes:
            weights[name] = once.setdefault(id(part), tensor.cpu())
    if world.writes:
        model.save_pretrained(folder, state_dict=weights)
        trainer.processing_class.save_pretrained(folder)
