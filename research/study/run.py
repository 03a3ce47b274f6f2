r"""Trains all models of the study and adds their results to one file.

    python research/study/run.py --preset cpu --text c4.jsonl      about 2.5 hours on 2 CPU cores
    python research/study/run.py --preset gpu --text c4.jsonl      deeper, wider, longer, on one GPU
    python research/study/page.py --preset cpu                     the figures and tables of research/study.md

A run that has its result is not repeated: start the same command again after an interruption, and what was unfinished
starts anew. First every norm gets the same search over learning rates, further down where the lowest is the best; then
the rest runs at the best of each.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import signal
import sys
import time
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any, Callable, Sequence

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[1:1] = [str(ROOT / "benchmarks"), str(ROOT / "examples")]

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from common import environment  # noqa: E402
from jobs import PRESETS, Job, Preset, Results, best_lrs, experiments, searches  # noqa: E402
from measure import measure  # noqa: E402
from pretraining.data import VOCAB, Corpus, load_corpus  # noqa: E402
from pretraining.files import locked  # noqa: E402
from pretraining.model import ModelConfig  # noqa: E402
from pretraining.train import Run, TrainConfig  # noqa: E402
from results import SUFFIX, merge, read_results, runs_folder, write_run  # noqa: E402
from variants import block_of  # noqa: E402

RECORDS = 50  # of the training loss in one run
RISE = 0.5  # nats above the lowest record that count as a divergence


# ---- one run


def train(job: Job, preset: Preset, corpus: Corpus, after_step: Callable[[], None]) -> dict[str, Any]:
    """Trains one model from its first step to its last, or until the loss is no number.

    `seconds` count the training steps alone, without measurements. A run has diverged if a loss was not finite, or if
    the last held-out loss is far above the lowest training loss it had seen: slow learners have not.
    """
    run = Run(job.norm, model_config(preset), train_config(job, preset), corpus, Path(), block_of(job))
    due = {round(i * job.steps / job.measurements) for i in range(job.measurements + 1)}
    every = max(1, job.steps // RECORDS)
    seconds, since, records, measurements = 0.0, [], [], []

    def take_measurements() -> None:
        measurements.append({"step": run.step, "tokens": run.tokens, "seconds": seconds, **measure(run)})

    take_measurements()
    while run.step < job.steps:
        began = time.perf_counter()
        loss, gradient = (value.item() for value in run.train_step())
        seconds += time.perf_counter() - began
        run.step += 1
        after_step()
        since.append((loss, gradient))
        if run.step % every == 0 or run.step == job.steps or not math.isfinite(loss):
            losses, gradients = zip(*since)
            records.append({"step": run.step, "tokens": run.tokens, "seconds": seconds,
                            "loss": sum(losses) / len(losses), "largest_gradient": max(gradients)})
            since = []
        if not math.isfinite(loss):
            break
        if run.step in due:
            take_measurements()
    last, lowest = measurements[-1], min(record["loss"] for record in records)
    return rounded({
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "unigram_entropy": corpus.unigram_entropy(),
        "diverged": not (last["step"] == job.steps and last["loss"] <= lowest + RISE),
        "train": records,
        "measurements": measurements,
    })


def model_config(preset: Preset) -> ModelConfig:
    return ModelConfig(VOCAB, preset.layers, preset.dim, preset.heads, preset.kv_heads, preset.seq_len)


def train_config(job: Job, preset: Preset) -> TrainConfig:
    return TrainConfig(
        steps=job.steps, batch=preset.batch, lr=job.lr, warmup=job.steps // 10, weight_decay=0.1, clip=1.0,
        seed=job.seed, refresh=job.refresh or job.steps, log_every=1, eval_every=1, checkpoint_every=1,
        device=preset.device, dtype=preset.dtype, compile=False,
    )


def rounded(value: Any) -> Any:
    """Floats to six significant digits, and None for what JSON has no number for."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


# ---- processes: one per core, each with one thread


def start_worker(preset: Preset, corpus: Corpus, common: dict, file: Path, steps: Any) -> None:
    """steps: a counter shared by all workers."""
    global worker
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if preset.device == "cpu":
        torch.set_num_threads(1)
    worker = (preset, corpus, common, file, steps)


def work(job: Job) -> None:
    preset, corpus, common, file, steps = worker
    where = environment()

    def count(number: int = 1) -> None:
        with steps.get_lock():
            steps.value += number

    result = train(job, preset, corpus, count)
    count(job.steps - result["train"][-1]["step"])  # those that a diverged run leaves out
    write_run(file, {"job": asdict(job), "common": common, "environment": where, **result})


def run_all(name: str, jobs: Sequence[Job], results: Results, pool: ProcessPoolExecutor, steps: Any) -> None:
    """Runs those of the jobs that have no result yet; the bar counts the training steps of all."""
    missing = [job for job in jobs if job not in results]
    total, start = sum(job.steps for job in jobs), sum(job.steps for job in jobs if job not in missing)
    interval = 0.2 if sys.stderr.isatty() else 10.0
    with tqdm(desc=name, initial=start, total=total, unit="step", mininterval=interval) as bar:
        before, pending = steps.value, {pool.submit(work, job) for job in missing}
        while pending:
            finished, pending = wait(pending, timeout=0.5, return_when=FIRST_EXCEPTION)
            for future in finished:
                future.result()
            bar.update(start + steps.value - before - bar.n)


def common_settings(preset: Preset, corpus: Corpus) -> dict[str, Any]:
    """What all runs of a study share: results that differ in it are not comparable."""
    model = {key: value for key, value in asdict(preset).items() if key in
             {"layers", "dim", "heads", "kv_heads", "seq_len", "batch", "device", "dtype"}}
    return {**model, "text": corpus.name, "text_tokens": [len(corpus.train), len(corpus.valid)]}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    summary, examples = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="which sizes (default: %(default)s)")
    parser.add_argument("--text", nargs="+", type=Path, metavar="FILE", default=[],
                        help='plain text, or .jsonl with a "text" per line (default: Python\'s own sources)')
    parser.add_argument("--out", type=Path, metavar="FILE",
                        help=f"results (default: results/PRESET{SUFFIX} beside this script)")
    parser.add_argument("--processes", type=int, metavar="N",
                        help="runs at a time (default: one per core on the CPU, one on a GPU)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    preset = PRESETS[arguments.preset]
    file = arguments.out or HERE / "results" / f"{arguments.preset}{SUFFIX}"
    processes = arguments.processes or (os.cpu_count() if preset.device == "cpu" else 1)
    corpus = load_corpus(arguments.text, preset.seq_len)
    common = common_settings(preset, corpus)
    runs_folder(file).mkdir(parents=True, exist_ok=True)
    with locked(runs_folder(file)):
        status = run_study(preset, corpus, common, file, processes)
        print(f"{merge(file)} results in {file}")
    return status


def run_study(preset: Preset, corpus: Corpus, common: dict, file: Path, processes: int) -> int:
    """Trains whatever has no result yet; 130 if it was interrupted."""
    results = read_results(file, common)
    context = multiprocessing.get_context("spawn")
    steps = context.Value("q", 0)
    pool = ProcessPoolExecutor(
        processes, context, initializer=start_worker, initargs=(preset, corpus, common, file, steps)
    )
    try:
        while not results.keys() >= {*(search := searches(preset, results))}:
            run_all("learning rates", search, results, pool, steps)
            results = read_results(file, common)
        run_all("experiments", experiments(preset, best_lrs(preset, results)), results, pool, steps)
    except KeyboardInterrupt:
        return 130
    finally:
        pool.shutdown(cancel_futures=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
