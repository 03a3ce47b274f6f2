r"""Pretrains a Llama with BHyT, or RMSNorm, with transformers' Trainer: one CPU core or many nodes.

    pip install ".[pretrain]"
    python examples/pretrain_hf.py                             a tiny model on Python's own sources, minutes on a CPU
    python examples/pretrain_hf.py --dry-run --devices 8       what every preset would be, on 8 devices; trains nothing
    torchrun --nproc-per-node 8 examples/pretrain_hf.py --preset 374m --data allenai/c4 --data-config en --bf16
    torchrun .. examples/pretrain_hf.py --preset 1b --fsdp examples/pretraining_hf/fsdp2.json --data shards/ --bf16

Documents are JSON lines or Parquet (a field of text), plain text (separated by blank lines), or a data set on a hub,
all streamed; each has an end-of-sequence token behind it, and sequences are cut from the row, without padding. A
document is held out or trained on by a hash of its text, so that no held-out text is trained on, wherever it stands.

Ctrl-C and SIGTERM save and stop; --resume goes on with the batches that would have come, with any number of processes
that divides --streams. Nothing is overwritten unless --overwrite says so. The trained model lies in OUT/model.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import sys
from itertools import islice
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # a thread that waits soon gives up its core; read with torch

try:
    import accelerate  # noqa: F401  the trainer's
    import tensorboard  # noqa: F401
    import torch
    from transformers import TrainingArguments, set_seed
    from transformers.utils.logging import disable_progress_bar

    from pretraining.distributed import Signals, World, connected, world_of_environment
    from pretraining_hf.arguments import parse_arguments, plan_of, settings_of
    from pretraining_hf.data import HeldOut, Sequences, Stream, evaluation, whole_batches
    from pretraining_hf.documents import Source
    from pretraining_hf.folder import checked_tokenizer, claim, ensure_tokenizer, note_run
    from pretraining_hf.plan import Plan, build_model, checkpoint_activations
    from pretraining_hf.presets import PRESETS, Preset
    from pretraining_hf.train import last_checkpoint, load_position, make_trainer, save_model, step_of
except ModuleNotFoundError as error:
    if error.name not in {"accelerate", "bhyt", "datasets", "tensorboard", "tokenizers", "torch", "transformers"}:
        raise
    message = f'this example needs {error.name}: run pip install ".[pretrain]" in the repository'
    raise SystemExit(message) from error


def main(argv: list[str] | None = None) -> int:
    world = world_of_environment()
    arguments = parse_arguments(argv, __doc__)
    try:
        presets = [arguments.preset] if arguments.preset else list(PRESETS) if arguments.dry_run else ["tiny"]
        plans = {
            name: plan_of(arguments, settings_of(arguments, name), arguments.devices or world.size) for name in presets
        }
        if arguments.dry_run:
            if world.writes:
                for name, plan in plans.items():
                    print("\n    ".join([name, *plan.lines()]), flush=True)
            return 0
        if arguments.devices:
            raise SystemExit("--devices: is for --dry-run; torchrun --nproc-per-node says how many processes there are")
        device = device_of(arguments, world)
        with connected(world, device), contextlib.ExitStack() as until_the_end:
            world.from_writer(lambda: claim(arguments, until_the_end))
            return pretrain(arguments, settings_of(arguments, presets[0]), plans[presets[0]], world, device)
    except (SystemExit, OSError) as error:  # every process comes here with the same words
        raise SystemExit(f"pretrain_hf.py: {error}" if world.writes else 1) from error
    except KeyboardInterrupt:  # not in training, which would save
        print("pretrain_hf.py: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def device_of(arguments: argparse.Namespace, world: World) -> str:
    """
    Raises:
        SystemExit: it is not one that can do what is asked for.
    """
    if arguments.deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise SystemExit("--deepspeed: deepspeed is not installed")
    if arguments.cpu or not torch.cuda.is_available():
        if arguments.fsdp:
            raise SystemExit("--fsdp: accelerate shards on GPUs only")
        return "cpu"
    if world.size == 1 and torch.cuda.device_count() > 1 and "LOCAL_RANK" not in os.environ:
        count = torch.cuda.device_count()
        raise SystemExit(f"{count} GPUs: start a process for each with torchrun --nproc-per-node {count}, or show one "
                         "of them with CUDA_VISIBLE_DEVICES=0")  # fmt: skip
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    torch.cuda.set_device(device)
    return device


def pretrain(arguments: argparse.Namespace, settings: Preset, plan: Plan, world: World, device: str) -> int:
    out = arguments.out
    disable_progress_bar()
    source, held_out, eval_texts = world.together(lambda: documents(arguments, settings))
    run = {**vars(settings), "norm": plan.norm, "exact_layers": plan.exact_layers,
           "unit_gains": plan.unit_gains, "refresh": arguments.refresh, "seed": arguments.seed, "bf16": plan.bf16,
           "strategy": plan.strategy, "data": source.identity(),
           "eval_data": arguments.eval_data, "tokenizer": arguments.tokenizer}  # fmt: skip
    for name in ("steps", "micro_batch", "eval_sequences"):  # may be others when a run goes on
        del run[name]
    streams = world.from_writer(lambda: note_run(out, run, arguments.streams, world.size))
    place = arguments.tokenizer or str(out / "tokenizer")
    if not arguments.tokenizer:
        world.from_writer(lambda: ensure_tokenizer(out / "tokenizer", source, held_out, settings.shape["vocab_size"]))
    tokenizer = world.together(lambda: checked_tokenizer(place, settings.shape["vocab_size"]))

    say = print if world.writes else lambda *_, **__: None
    mine = range(world.rank * streams // world.size, (world.rank + 1) * streams // world.size)
    sequences = Sequences(
        [Stream(source, j, streams, tokenizer, settings.seq_len, held_out, arguments.seed) for j in mine],
        lambda epoch: say(f"all of {source.name} has been read {epoch} time(s), and is read again", flush=True),
    )
    held_out_sequences = world.together(lambda: whole_batches(
        evaluation(eval_texts, tokenizer, settings.seq_len, settings.eval_sequences), streams))  # fmt: skip
    checkpoint = world.from_writer(lambda: last_checkpoint(out) if arguments.resume else None)
    if checkpoint:
        if step_of(checkpoint) > settings.steps:
            raise SystemExit(f"--steps: {checkpoint} has gone beyond {settings.steps}")
        load_position(checkpoint, sequences, world)
        sequences.ended = step_of(checkpoint) == settings.steps  # the trainer would make one step more
    world.together(sequences.begin)

    say("\n    ".join([f"{source.name} in {streams} stream(s), {len(held_out_sequences)} held-out sequences, "
                       f"{len(tokenizer):,} tokens; on {world.size} x {device}", *plan.lines()]),
        flush=True)  # fmt: skip
    set_seed(arguments.seed)
    ends = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    model = build_model({**settings.shape, **ends}, plan.norm, settings.seq_len, plan.exact_layers,
                        plan.unit_gains)  # fmt: skip
    if plan.checkpointing:
        checkpoint_activations(model)
    # ZeRO-3 would have the arguments made first, and then build the model in parts, which sites cannot be put into.
    training = training_arguments(arguments, settings, plan, len(held_out_sequences) // world.size, device)
    with Signals(world) as signals:
        trainer, stop = make_trainer(model, training, sequences, held_out_sequences, tokenizer, world,
                                     arguments.refresh if plan.norm == "bhyt" else 0, arguments.keep,
                                     lambda: signals.received)  # fmt: skip
        if checkpoint:
            say(f"resumes {checkpoint.name}", flush=True)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.stopped_by:
        say(f"pretrain_hf.py: {signal.Signals(stop.stopped_by).name}: saved at step {trainer.state.global_step} of "
            f"{settings.steps}; the same command with --resume goes on", file=sys.stderr)  # fmt: skip
        return 128 + stop.stopped_by
    loss = trainer.evaluate()["eval_loss"]  # of the model that is saved: its offsets have been refreshed
    save_model(trainer, out / "model", world)
    trainer.save_state()
    say(f"held-out loss {loss:.4f}; AutoModelForCausalLM.from_pretrained({str(out / 'model')!r}) loads it", flush=True)
    return 0


def documents(arguments: argparse.Namespace, settings: Preset) -> tuple[Source, HeldOut, Any]:
    """What is trained on, what is not, and the texts to evaluate on."""
    source = source_of(arguments.data, arguments, arguments.split)
    if not arguments.eval_data:
        held_out = HeldOut(settings.held_out)
        return source, held_out, (text for text in source.texts() if text in held_out)
    other = source_of(arguments.eval_data, arguments, arguments.eval_split)
    # A document has a hundredth of a sequence at least.
    texts = list(islice(other.texts(), 100 * settings.eval_sequences))
    return source, HeldOut(0.0, texts), texts


def source_of(places: list[str], arguments: argparse.Namespace, split: str) -> Source:
    """Says which files of the places are not read."""
    source = Source(places, arguments.field, arguments.data_config, split)
    if source.note and world_of_environment().writes:
        print(source.note, flush=True)
    return source


def training_arguments(
    arguments: argparse.Namespace, settings: Preset, plan: Plan, eval_share: int, device: str
) -> TrainingArguments:
    """eval_share: held-out sequences of a process, which full batches divide: their mean is that of all tokens."""
    often = max(1, settings.steps // 10)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(arguments.out / "logs")
    return TrainingArguments(
        str(arguments.out), max_steps=settings.steps, per_device_train_batch_size=plan.micro_batch,
        gradient_accumulation_steps=plan.accumulation, learning_rate=settings.lr, warmup_steps=settings.warmup,
        lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.1},
        weight_decay=settings.weight_decay, adam_beta1=0.9, adam_beta2=settings.beta2, max_grad_norm=settings.clip,
        seed=arguments.seed, bf16=arguments.bf16, torch_compile=arguments.compile, use_cpu=device == "cpu",
        ignore_data_skip=True, prediction_loss_only=True,
        per_device_eval_batch_size=max(n for n in range(1, plan.micro_batch + 1) if eval_share % n == 0),
        eval_strategy="steps", eval_steps=arguments.eval_every or often, save_steps=arguments.save_every or often,
        logging_steps=arguments.log_every, logging_nan_inf_filter=False,
        report_to=["tensorboard"], disable_tqdm=True, ddp_find_unused_parameters=False,
        fsdp=True if arguments.fsdp else None, fsdp_config=str(arguments.fsdp) if arguments.fsdp else None,
        deepspeed=str(arguments.deepspeed) if arguments.deepspeed else None,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
