r"""Pretrains a small Llama-like language model, once per norm, and draws how they compare.

    pip install ".[example]"
    python examples/pretrain.py                               BHyT beside RMSNorm, 2 minutes on 2 CPU cores
    python examples/pretrain.py --norm bhyt lns --layers 12   other norms, deeper
    python examples/pretrain.py --text corpus.jsonl --layers 16 --dim 512 --heads 8 --seq-len 1024 \
        --batch 32 --steps 5000 --lr 1e-3 --device cuda --dtype bfloat16 --compile

Every norm sees the same text in the same order from the same initial matrices. How the layer is used is in
pretraining/norms.py (`BlockBHyT`), the decoder around it in pretraining/model.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic cuBLAS; read when CUDA starts

try:
    import torch

    from pretraining.data import VOCAB, load_corpus
    from pretraining.model import ModelConfig
    from pretraining.norms import BLOCKS
    from pretraining.plot import plot_comparison, read_log
    from pretraining.train import Run, TrainConfig
except ModuleNotFoundError as error:
    if error.name not in {"bhyt", "matplotlib", "torch", "tqdm"}:
        raise
    message = f'this example needs {error.name}: run pip install ".[example]" in the repository'
    raise SystemExit(message) from error


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    summary, examples = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--norm", nargs="+", metavar="NORM", choices=[*BLOCKS, "all"],
                        default=["bhyt", "rmsnorm"],
                        help=f"what to compare: {', '.join(BLOCKS)}, or all (default: bhyt rmsnorm)")
    parser.add_argument("--text", nargs="+", type=Path, metavar="FILE", default=[],
                        help='plain text, or .jsonl with a "text" per line (default: Python\'s own sources)')
    parser.add_argument("--out", type=Path, default=Path("pretrain-out"), metavar="DIR",
                        help="logs, checkpoints and comparison.png go here (default: %(default)s)")
    parser.add_argument("--resume", action="store_true",
                        help="go on from the checkpoints in --out, where there are any")
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
    _add(train, "--batch", 8, "sequences per step")
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
    return parser.parse_args(argv)


def _add(group: argparse._ArgumentGroup, flag: str, default: int | float | str, meaning: str) -> None:
    group.add_argument(flag, type=type(default), default=default, metavar=type(default).__name__.upper(),
                       help=f"{meaning} (default: %(default)s)")


def configure(config_class: type, arguments: argparse.Namespace, **more: object) -> object:
    """A configuration whose fields come from the arguments of the same name."""
    names = {field.name for field in dataclasses.fields(config_class)} - more.keys()
    return config_class(**{name: getattr(arguments, name) for name in names}, **more)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        model, config = configure(ModelConfig, arguments, vocab=VOCAB), configure(TrainConfig, arguments)
    except ValueError as error:
        raise SystemExit(f"pretrain.py: {error}") from error
    if torch.device(config.device).type == "cuda":
        torch.use_deterministic_algorithms(True)
    norms = list(BLOCKS) if "all" in arguments.norm else list(dict.fromkeys(arguments.norm))
    arguments.out.mkdir(parents=True, exist_ok=True)
    corpus = load_corpus(arguments.text, model.seq_len)
    print(f"{corpus.name}: {len(corpus.train):,} training and {len(corpus.valid):,} held-out tokens, "
          f"unigram entropy {corpus.unigram_entropy():.3f} nats", flush=True)

    logs, failed, began = {}, False, time.perf_counter()
    for norm in norms:
        run = Run(norm, model, config, corpus, arguments.out)
        if arguments.resume and run.resume():
            print(f"{norm}: resumed at step {run.step}", flush=True)
        try:
            run.train(arguments.stop_at)
        except FloatingPointError as error:
            failed = True
            print(error, file=sys.stderr)
        logs[norm] = read_log(run.log_path)

    picture = arguments.out / "comparison.png"
    plot_comparison(logs, picture)
    print_summary(logs)
    print(f"{time.perf_counter() - began:.0f} s; {picture} shows it")
    return int(failed)


def print_summary(logs: dict) -> None:
    print(f"\n{'norm':>10} {'parameters':>11} {'tokens':>11} {'training':>9} {'held-out':>9} {'tokens/s':>9}")
    for norm, records in logs.items():
        last = records["train"][-1]
        speeds = sorted(record["tokens_per_second"] for record in records["train"])
        print(f"{norm:>10} {records['start'][0]['parameters']:11,} {last['tokens']:11,} {last['loss']:9.3f} "
              f"{records['valid'][-1]['loss']:9.3f} {speeds[len(speeds) // 2]:9,.0f}")


if __name__ == "__main__":
    sys.exit(main())
