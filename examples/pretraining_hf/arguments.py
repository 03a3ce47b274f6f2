"""The arguments of `examples/pretrain_hf.py`, and what they amount to."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import NoReturn

from pretraining.distributed import first_line, world_of_environment

from .plan import NORMS, Plan
from .presets import PRESETS, Preset


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, of one process."""
        self.exit(2, f"{self.prog}: {message}\n" if world_of_environment().writes else None)


def parse_arguments(argv: list[str] | None, page: str) -> argparse.Namespace:
    summary, examples = page.split("\n\n", 1)
    parser = OneLineParser(
        prog="pretrain_hf.py",
        description=summary,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", choices=PRESETS, help="size, and settings that go with it (default: tiny)")
    parser.add_argument(
        "--norm",
        choices=NORMS,
        default="bhyt",
        help="bhyt: approximate second sites; bhyt-exact (default: %(default)s)",
    )
    parser.add_argument(
        "--exact-layers",
        type=int,
        default=0,
        metavar="N",
        help="with bhyt, so many layers from the first on have exact second sites (default: 0, the authors')",
    )
    parser.add_argument(
        "--unit-gains",
        action="store_true",
        help="gains start at kappa / lam, so that what sub-layers read has the size it has with RMSNorm",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan, of every preset if none is given, and end"
    )
    parser.add_argument("--devices", type=int, metavar="N", help="with --dry-run: devices to plan for (default: one)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("pretrain-hf-out"),
        metavar="DIR",
        help="checkpoints, logs and the model go here (default: %(default)s)",
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in --out, where there is one"
    )
    existing.add_argument("--overwrite", action="store_true", help="start anew, though --out has a run")

    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="PLACE",
        help="files, folders, patterns or the name of a data set (default: Python's own sources)",
    )
    data.add_argument("--data-config", metavar="NAME", help="configuration of the data set")
    data.add_argument("--split", default="train", metavar="NAME", help="of the data set (default: %(default)s)")
    data.add_argument("--field", default="text", metavar="NAME", help="that has the text (default: %(default)s)")
    data.add_argument("--held-out", type=float, metavar="SHARE", help="of the documents, for evaluation")
    data.add_argument(
        "--eval-data",
        nargs="+",
        default=[],
        metavar="PLACE",
        help="evaluate on these documents instead; where --data has the same ones, they are left out",
    )
    data.add_argument(
        "--eval-split",
        default="validation",
        metavar="NAME",
        help="of a data set given to --eval-data (default: %(default)s)",
    )
    data.add_argument("--eval-sequences", type=int, metavar="N", help="at most so many")
    data.add_argument(
        "--tokenizer", metavar="PLACE", help="folder or name (default: byte-level BPE, trained on the data)"
    )
    data.add_argument("--vocab-size", type=int, metavar="N", help="of the model, and of a tokenizer that is trained")
    data.add_argument(
        "--streams",
        type=int,
        metavar="N",
        help="parts of the data, read side by side (default: the number of processes)",
    )

    train = parser.add_argument_group("training (defaults are the preset's)")
    for flag, kind, meaning in (
        ("--seq-len", int, "tokens per sequence, and what the variance offsets are for"),
        ("--batch", int, "sequences per step, of all processes together"),
        ("--micro-batch", int, "sequences per process at once"), ("--steps", int, "optimiser steps"),
        ("--warmup", int, "warmup steps"), ("--lr", float, "peak learning rate; a cosine goes down to a tenth"),
        ("--weight-decay", float, "of the matrices; gains and lambdas have none"),
        ("--clip", float, "largest gradient norm; 0: none"), ("--beta2", float, "of AdamW"),
    ):  # fmt: skip
        train.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=meaning)
    train.add_argument("--seed", type=int, default=0, help="of the weights and the order of documents (default: 0)")
    train.add_argument(
        "--refresh", type=int, default=10, help="steps between updates of the variance offsets (default: 10)"
    )

    machine = parser.add_argument_group("machine")
    machine.add_argument("--bf16", action="store_true", help="compute in bfloat16; weights stay float32")
    machine.add_argument("--compile", action="store_true", help="run the model through torch.compile")
    machine.add_argument(
        "--checkpoint-activations", action="store_true", help="compute layers again in backward: less memory"
    )
    machine.add_argument("--fsdp", type=Path, metavar="JSON", help="shard with FSDP2, as this file says (needs GPUs)")
    machine.add_argument(
        "--deepspeed", type=Path, metavar="JSON", help="shard with DeepSpeed's ZeRO, as this file says"
    )
    machine.add_argument("--cpu", action="store_true", help="though there is a GPU")

    reports = parser.add_argument_group("reports")
    reports.add_argument("--log-every", type=int, default=10, help="steps (default: %(default)s)")
    reports.add_argument("--eval-every", type=int, help="steps (default: a tenth of all)")
    reports.add_argument("--save-every", type=int, help="steps between checkpoints (default: a tenth of all)")
    reports.add_argument("--keep", type=int, default=2, help="so many of the last checkpoints, at least 2 (default: 2)")
    return parser.parse_args(argv)


def settings_of(arguments: argparse.Namespace, preset: str) -> Preset:
    """The preset, with what the arguments change."""
    names = [field.name for field in dataclasses.fields(Preset) if field.name != "shape"]
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    shape = PRESETS[preset].shape
    if arguments.vocab_size is not None:
        shape = {**shape, "vocab_size": arguments.vocab_size}
    return dataclasses.replace(PRESETS[preset], shape=shape, **given)


def plan_of(arguments: argparse.Namespace, settings: Preset, devices: int) -> Plan:
    """
    Raises:
        SystemExit: numbers that mean nothing, alone or together.
    """
    least = {"seq_len": 2, "batch": 1, "micro_batch": 1, "steps": 1, "warmup": 0, "weight_decay": 0, "clip": 0,
             "eval_sequences": 1}  # fmt: skip
    values = {
        **vars(settings),
        **{name: getattr(arguments, name) for name in ("exact_layers", "refresh", "log_every", "keep")},
    }
    for name, value in {**least, "exact_layers": 0, "refresh": 1, "log_every": 1, "keep": 2}.items():
        if not values[name] >= value:
            raise SystemExit(f"--{name.replace('_', '-')}: expected at least {value}, got {values[name]}")
    for name in ("eval_every", "save_every", "streams", "devices", "vocab_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise SystemExit(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    if not 0 < settings.lr < math.inf or not 0 <= settings.beta2 < 1:
        raise SystemExit(
            f"--lr and --beta2: expected above 0, and from 0 to below 1, got {settings.lr} and {settings.beta2}"
        )
    if not 0 < settings.held_out < 1:
        raise SystemExit(f"--held-out: expected a share between 0 and 1, got {settings.held_out}")
    if arguments.exact_layers and arguments.norm != "bhyt":
        raise SystemExit(f"--exact-layers: means nothing with --norm {arguments.norm}")
    if arguments.unit_gains and arguments.norm == "rmsnorm":
        raise SystemExit("--unit-gains: means nothing with --norm rmsnorm")
    if settings.batch % devices:
        raise SystemExit(f"--batch: expected a multiple of the {devices} processes, got {settings.batch}")
    share = settings.batch // devices
    micro_batch = min(settings.micro_batch, share) if arguments.micro_batch is None else settings.micro_batch
    if share % micro_batch:
        raise SystemExit(f"--micro-batch: expected a divisor of the {share} sequences of a process, got {micro_batch}")
    return Plan(settings.shape, arguments.norm, arguments.exact_layers, arguments.unit_gains, settings.seq_len,
                settings.batch, micro_batch, settings.steps, devices, strategy_of(arguments), arguments.bf16,
                arguments.checkpoint_activations)  # fmt: skip


def strategy_of(arguments: argparse.Namespace) -> str:
    if arguments.fsdp and arguments.deepspeed:
        raise SystemExit("--fsdp and --deepspeed: give one of them")
    if not (arguments.fsdp or arguments.deepspeed):
        return "ddp"
    file = arguments.fsdp or arguments.deepspeed
    try:
        config = json.loads(file.read_text())
        return "fsdp2" if arguments.fsdp else f"zero{int(config['zero_optimization']['stage'])}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{file}: cannot be read as such a configuration: {first_line(error)}") from error
