r"""Pretrains a small Llama-like language model, once per norm, and draws how they compare.

    pip install ".[example]"
    python examples/pretrain.py                               BHyT beside RMSNorm, 2 minutes on 2 CPU cores
    python examples/pretrain.py --norm bhyt rmsnorm           BHyT as the paper starts it, with gains of 1
    python examples/pretrain.py --norm all --layers 12        other norms, deeper
    torchrun --nproc-per-node 2 examples/pretrain.py          the same batches, shared by two processes
    python examples/pretrain.py --norm bhyt --export folder   AutoModelForCausalLM.from_pretrained("folder")
    python examples/pretrain.py --text corpus.jsonl --layers 16 --dim 512 --heads 8 --seq-len 1024 \
        --batch 32 --steps 5000 --lr 1e-3 --device cuda --dtype bfloat16 --compile

Every norm sees the same text in the same order from the same initial matrices, in one process or several. How
the layer is used is in pretraining/norms.py (`BlockBHyT`), the decoder around it in pretraining/model.py.

Ctrl-C and SIGTERM save and stop; --resume goes on from there, or from the last checkpoint if the process was killed,
with any number of processes. The learning rate follows from the step and --steps: with more --steps than before it
goes on as that of the longer run, which is said and logged. Nothing is overwritten unless --overwrite says so. What
ends a run early is one line; under torchrun the launcher adds a report of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic cuBLAS; read when CUDA starts
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # a thread that waits soon gives up its core; read with torch

try:
    import torch

    from pretraining.data import VOCAB, load_corpus
    from pretraining.distributed import (
        Signals, World, connected, device_of_process, first_line, is_lost_process, world_of_environment,
    )
    from pretraining.export import EXPORTABLE, check_exportable, export
    from pretraining.files import RunFiles, locked
    from pretraining.model import ModelConfig
    from pretraining.norms import BLOCKS
    from pretraining.plot import plot_comparison, read_log
    from pretraining.sample import sample
    from pretraining.train import Run, TrainConfig
except ModuleNotFoundError as error:
    if error.name not in {"bhyt", "matplotlib", "torch", "tqdm"}:
        raise
    message = f'this example needs {error.name}: run pip install ".[example]" in the repository'
    raise SystemExit(message) from error


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, of one process."""
        self.exit(2, f"{self.prog}: {message}\n" if world_of_environment().writes else None)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    summary, examples = __doc__.split("\n\n", 1)
    parser = OneLineParser(
        prog="pretrain.py", description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--norm", nargs="+", metavar="NORM", choices=[*BLOCKS, "all"],
                        default=["bhyt-unit-gains", "rmsnorm"],
                        help=f"what to compare: {', '.join(BLOCKS)}, or all (default: bhyt-unit-gains rmsnorm)")
    parser.add_argument("--text", nargs="+", type=Path, metavar="FILE", default=[],
                        help='plain text, or .jsonl with a "text" per line (default: Python\'s own sources)')
    parser.add_argument("--out", type=Path, default=Path("pretrain-out"), metavar="DIR",
                        help="logs, checkpoints and comparison.png go here (default: %(default)s)")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true",
                          help="go on from the checkpoints in --out, where there are any")
    existing.add_argument("--overwrite", action="store_true",
                          help="start anew, though --out has results of these norms")
    parser.add_argument("--stop-at", type=int, metavar="STEP",
                        help="save and stop at this step; --resume goes on")

    model = parser.add_argument_group("model")
    _add(model, "--layers", 6, "blocks")
    _add(model, "--dim", 96, "width of the residual stream")
    _add(model, "--heads", 4, "query heads")
    _add(model, "--kv-heads", 2, "key/value heads, shared by groups of query heads")
    _add(model, "--seq-len", 128, "tokens per sequence; a token is a byte")

    train = parser.add_argument_group("training")
    _add(train, "--steps", 600, "optimiser steps")
    _add(train, "--batch", 8, "sequences per step, of all processes together")
    _add(train, "--accumulate", 1, "parts in which a process computes its share of a batch: less memory, same losses")
    _add(train, "--lr", 5e-3, "peak learning rate, after the warmup and before the cosine")
    _add(train, "--warmup", 50, "warmup steps")
    _add(train, "--weight-decay", 0.1, "of the matrices; gains and lambdas have none")
    _add(train, "--clip", 1.0, "largest gradient norm")
    _add(train, "--seed", 0, "of the weights and the data order")
    _add(train, "--refresh", 10, "steps between updates of BHyT's variance offsets")

    machine = parser.add_argument_group("machine")
    _add(machine, "--device", "cuda" if torch.cuda.is_available() else "cpu", "torch device")
    machine.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32",
                         help="bfloat16: weights and residual stream stay float32 (default: %(default)s)")
    machine.add_argument("--compile", action="store_true", help="run the model through torch.compile")

    reports = parser.add_argument_group("reports")
    _add(reports, "--log-every", 10, "steps per line of the log")
    _add(reports, "--eval-every", 60, "steps between held-out losses")
    _add(reports, "--checkpoint-every", 200, "steps between checkpoints; the last step always has one")
    _add(reports, "--samples", 2, "places of the held-out text from which each model goes on; 0: none")
    reports.add_argument("--export", type=Path, metavar="DIR",
                         help="write the trained model and its tokenizer as a folder that AutoModelForCausalLM loads; "
                              f"of several norms, folders in DIR ({', '.join(EXPORTABLE)})")
    arguments = parser.parse_args(argv)
    arguments.norm = list(BLOCKS) if "all" in arguments.norm else list(dict.fromkeys(arguments.norm))
    return arguments


def _add(group: argparse._ArgumentGroup, flag: str, default: int | float | str, meaning: str) -> None:
    group.add_argument(flag, type=type(default), default=default, metavar=type(default).__name__.upper(),
                       help=f"{meaning} (default: %(default)s)")


def configure(config_class: type, arguments: argparse.Namespace, **more: object) -> object:
    """A configuration whose fields come from the arguments of the same name."""
    names = {field.name for field in dataclasses.fields(config_class)} - more.keys()
    return config_class(**{name: getattr(arguments, name) for name in names}, **more)


def main(argv: list[str] | None = None) -> int:
    world = world_of_environment()
    arguments = parse_arguments(argv)
    try:
        model, config = configure_run(arguments, world)
        with connected(world, config.device):
            return pretrain(arguments, model, config, world)
    except (SystemExit, OSError) as error:  # every process comes here with the same words
        raise SystemExit(f"pretrain.py: {error}" if world.writes else 1) from error
    except KeyboardInterrupt:  # not in training, which would save
        if world.writes:
            print("pretrain.py: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except torch.OutOfMemoryError as error:
        raise SystemExit(f"pretrain.py: {first_line(error)} Try a larger --accumulate.") from error
    except RuntimeError as error:
        if world.size == 1 or not is_lost_process(error):
            raise
        reason = first_line(error).split(". ")[0]
        raise SystemExit(f"pretrain.py: process {world.rank} has lost another one: {reason}") from error


def configure_run(arguments: argparse.Namespace, world: World) -> tuple[ModelConfig, TrainConfig]:
    """
    Raises:
        SystemExit: arguments that mean nothing, alone or together.
    """
    try:
        torch.device(arguments.device)
    except RuntimeError as error:
        raise SystemExit(f"--device {arguments.device}: {first_line(error)}") from error
    try:
        if arguments.stop_at is not None and arguments.stop_at < 1:
            raise ValueError(f"stop-at must be at least 1, got {arguments.stop_at}")
        if arguments.samples < 0:
            raise ValueError(f"samples must be at least 0, got {arguments.samples}")
        if arguments.export:
            check_exportable(arguments.norm)
        return (configure(ModelConfig, arguments, vocab=VOCAB),
                configure(TrainConfig, arguments, processes=world.size))
    except ValueError as error:
        raise SystemExit(str(error)) from error


def pretrain(arguments: argparse.Namespace, model: ModelConfig, config: TrainConfig, world: World) -> int:
    device = world.together(lambda: device_of_process(config.device, world))
    config = dataclasses.replace(config, device=device)
    if torch.device(device).type == "cuda":
        torch.use_deterministic_algorithms(True)
    with contextlib.ExitStack() as until_the_end:
        world.from_writer(lambda: claim_folders(arguments, until_the_end))
        corpus = world.together(lambda: load_corpus(arguments.text, model.seq_len))
        say = print if world.writes else lambda *_, **__: None
        say(f"{corpus.name}: {len(corpus.train):,} training and {len(corpus.valid):,} held-out tokens, "
            f"unigram entropy {corpus.unigram_entropy():.3f} nats", flush=True)

        logs, samples, failed, began = {}, {}, False, time.perf_counter()
        for norm in arguments.norm:
            run = Run(norm, model, config, corpus, arguments.out, world=world)
            if arguments.resume:
                say(go_on(run), flush=True)
            try:
                with Signals(world) as signals:
                    received = run.train(arguments.stop_at, lambda: signals.received)
                    received = received or world.largest(signals.received)
            except FloatingPointError as error:
                failed = True
                say(error, file=sys.stderr)
            else:
                if received:
                    say(f"pretrain.py: {signal.Signals(received).name}: {norm} is saved at step {run.step} of "
                        f"{config.steps}; the same command with --resume goes on", file=sys.stderr)
                    return 128 + received
                if world.writes:
                    samples[norm] = list(sample(run, arguments.samples)) if arguments.samples else []
                    if arguments.export and run.step == config.steps:
                        export(run.model, norm, export_folder(arguments, norm))
                    elif arguments.export:
                        print(f"{norm}: not exported at step {run.step} of {config.steps}", flush=True)
            if world.writes:
                logs[norm] = read_log(run.files.log)

        if world.writes:
            picture = arguments.out / "comparison.png"
            plot_comparison(logs, picture)
            print_samples(samples)
            print_summary(logs)
            print(f"{time.perf_counter() - began:.0f} s; {picture} shows it")
        return int(failed)


def claim_folders(arguments: argparse.Namespace, until_the_end: contextlib.ExitStack) -> None:
    """Locks --out, and sees to it that nothing in it and in --export is written over unasked.

    Raises:
        SystemExit: there is something, or somebody.
    """
    arguments.out.mkdir(parents=True, exist_ok=True)
    until_the_end.enter_context(locked(arguments.out))
    if arguments.resume:
        return
    if arguments.overwrite:
        for norm in arguments.norm:
            RunFiles(arguments.out, norm).remove()
        return
    there = [path for norm in BLOCKS for path in RunFiles(arguments.out, norm).exist()]
    if arguments.export:
        there += [path for norm in arguments.norm for path in export_folder(arguments, norm).glob("*")]
    if there:
        raise SystemExit(f"{there[0]} is there: --resume goes on, --overwrite starts anew, or give another folder")


def export_folder(arguments: argparse.Namespace, norm: str) -> Path:
    return arguments.export if len(arguments.norm) == 1 else arguments.export / norm


def go_on(run: Run) -> str:
    planned = run.resume()
    if not planned:
        return f"{run.norm}: no checkpoint, starts at step 0"
    if planned == run.config.steps:
        return f"{run.norm}: resumed at step {run.step}"
    before = dataclasses.replace(run.config, steps=planned)
    return (f"{run.norm}: resumed at step {run.step}; for {run.config.steps} steps instead of {planned} the learning "
            f"rate is {run.config.learning_rate(run.step):.3g} here instead of {before.learning_rate(run.step):.3g}")


def print_summary(logs: dict) -> None:
    print(f"\n{'norm':>10} {'parameters':>11} {'tokens':>11} {'training':>9} {'held-out':>9} {'tokens/s':>9}")
    for norm, records in logs.items():
        last = records["train"][-1]
        speeds = sorted(record["tokens_per_second"] for record in records["train"])
        print(f"{norm:>10} {records['start'][0]['parameters']:11,} {last['tokens']:11,} {last['loss']:9.3f} "
              f"{records['valid'][-1]['loss']:9.3f} {speeds[len(speeds) // 2]:9,.0f}")


def print_samples(samples: dict[str, list[tuple[str, str]]]) -> None:
    for norm, lines in samples.items():
        for prompt, text in lines:
            print(f"{norm:>10} {prompt!r} goes on {text!r}")


if __name__ == "__main__":
    sys.exit(main())
