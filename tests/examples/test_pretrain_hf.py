"""Pretraining with Trainer: two processes, stopped and resumed, are one; the model that is left."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.paths import ROOT
from hf_runs import TINY, assert_same_losses, corpus, history, no_network, run, sites_of, whole  # noqa: F401

import transformers  # noqa: E402

import bhyt  # noqa: E402
from pretraining_hf.data import HeldOut, evaluation  # noqa: E402
from pretraining_hf.documents import Source  # noqa: E402
from pretraining_hf.presets import PRESETS  # noqa: E402
from pretraining_hf.train import last_checkpoint  # noqa: E402


@pytest.mark.slow
def test_two_processes_stopped_and_resumed(corpus: Path, whole: Path, tmp_path: Path) -> None:
    """torchrun gets SIGTERM: both processes save and end in one line. One process goes on from there, and all losses
    are those of one process without a pause to 1e-4. USERS row 26."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "examples" / "pretrain_hf.py"), *TINY, "--data", str(corpus), "--out", str(out)]
    environment = dict(
        os.environ, OMP_NUM_THREADS="1", PATH="/usr/bin:/bin"
    )  # another folder; no python of ours on the path
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line.startswith("step 4 of"):
            process.send_signal(signal.SIGTERM)
    assert process.wait() != 0
    said = [line for line in printed if line.startswith("pretrain_hf.py:")]
    assert len(said) == 1 and "SIGTERM: saved at step" in said[0] and "--resume goes on" in said[0], "".join(printed)
    stopped = int(said[0].split("step ")[1].split()[0])
    assert 4 <= stopped < 9 and (out / f"checkpoint-{stopped}" / "data.json").exists() and not (out / "model").exists()
    assert list((out / "logs").glob("events.out.tfevents.*"))
    assert run(corpus, out, "--resume") == 0
    assert_same_losses(out, whole, 1e-4)


def test_resume_has_the_bits_of_a_run_without_pause(corpus: Path, whole: Path, tmp_path: Path) -> None:
    """From a checkpoint between two refreshes, with a newer one that is not whole passed over."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for name in ("model", "checkpoint-9"):
        shutil.rmtree(out / name)
    (out / "trainer_state.json").unlink()
    (out / "checkpoint-6" / "data.json").unlink()
    assert run(corpus, out, "--resume") == 0
    assert_same_losses(out, whole, 0)
    one, other = (
        transformers.AutoModelForCausalLM.from_pretrained(path / "model").state_dict() for path in (out, whole)
    )
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

    shutil.rmtree(out / "model")  # killed behind its last step: what is left to do is done, and no step more
    assert run(corpus, out, "--resume") == 0
    again = transformers.AutoModelForCausalLM.from_pretrained(out / "model").state_dict()
    assert all(torch.equal(one[name], again[name]) for name in one)
    with pytest.raises(SystemExit, match="--steps: .*checkpoint-9 has gone beyond 8"):
        run(corpus, out, "--resume", "--steps", "8")


def test_the_model_that_is_left(corpus: Path, whole: Path) -> None:
    """The Auto classes load it; its loss on the held-out text is what was reported, and less than in the beginning."""
    model = transformers.AutoModelForCausalLM.from_pretrained(whole / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(whole / "model")
    assert type(model).__name__ == "BHyTLlamaForCausalLM" and model.config.seq_len == 48
    assert model.config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    text = "Bytes: é, 漢, \x00, and  two spaces"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    source, held_out = Source([str(corpus)]), HeldOut(PRESETS["tiny"].held_out)
    texts = [text for text in source.texts() if text in held_out]
    rows = evaluation(texts, tokenizer, 48, 16)
    with torch.no_grad():
        loss = torch.stack([model(**{name: row[None] for name, row in r.items()}).loss for r in rows]).mean().item()
    losses = [value for _, name, value in history(whole) if name == "eval_loss"]
    assert len(rows) == 16 and abs(loss - losses[-1]) < 1e-5 and losses[-1] < losses[0] - 0.2


def test_saved_configs_are_those_of_a_model_to_use(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that only training wants is saved, in the model's folder and in checkpoints: generate reads its cache."""
    fresh = transformers.LlamaConfig(**PRESETS["tiny"].shape)
    training = {"vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "dtype"}
    for folder in (whole / "model", whole / "checkpoint-3"):
        config = transformers.AutoConfig.from_pretrained(folder)
        described = {"model_type", "architectures", "transformers_version", "_name_or_path", *training}
        differing = {name for name, value in fresh.to_dict().items() if getattr(config, name, value) != value}
        assert config.use_cache is True and differing <= described, differing
        generation = transformers.GenerationConfig.from_pretrained(folder)
        assert generation.use_cache is not False

        model, widths = transformers.AutoModelForCausalLM.from_pretrained(folder), []
        model.model.embed_tokens.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
        model.generate(torch.arange(7)[None], max_new_tokens=4, min_new_tokens=4, pad_token_id=0)
        assert widths == [7, 1, 1, 1]


def test_old_checkpoints_with_later_times(corpus: Path, whole: Path, tmp_path: Path) -> None:
    """What is kept goes by steps: a copied run's times say nothing. The newest whole checkpoints stay, folders of
    other names stay, one that is not whole does not count, and goes."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "model")
    shutil.copytree(out / "checkpoint-3", out / "checkpoint-1")
    shutil.copytree(out / "checkpoint-3", out / "checkpoint-3-mine")
    for unfinished in ("checkpoint-9", "checkpoint-8"):
        shutil.rmtree(out / unfinished, ignore_errors=True)
        (out / unfinished).mkdir()
    for folder in out.glob("checkpoint-*"):
        os.utime(folder, (2**31, 2**31))
    assert run(corpus, out, "--resume", "--keep", "2") == 0
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-9", "checkpoint-3-mine"}
    assert (out / "checkpoint-9" / "data.json").exists() and last_checkpoint(out) == out / "checkpoint-9"
    assert_same_losses(out, whole, 0)


def test_bfloat16_and_accumulation(corpus: Path, tmp_path: Path) -> None:
    """Exact sites, activations computed again: the loss of a batch is that of its parts; weights stay float32."""
    losses = []
    for micro_batch in ("8", "2"):
        out = tmp_path / micro_batch
        options = [
            "--norm",
            "bhyt-exact",
            "--steps",
            "2",
            "--bf16",
            "--checkpoint-activations",
            "--micro-batch",
            micro_batch,
        ]
        assert run(corpus, out, *options, "--eval-every", "2") == 0
        losses.append([value for _, name, value in history(out) if name.endswith("loss")])
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)  # bfloat16 rounds other sums
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "8" / "model")
    assert model.dtype == torch.float32 and sites_of(model) == [bhyt.BHyT] * 8
    assert model.config.use_cache is True


def test_nothing_is_overwritten(corpus: Path, whole: Path, tmp_path: Path) -> None:
    """A run in --out is in the way, unless it is resumed, with the same settings, or overwritten; strangers stay."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "notes").write_text("mine")
    before = (out / "model" / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="is there: --resume goes on, --overwrite starts anew"):
        run(corpus, out)
    with pytest.raises(SystemExit, match=r"has other settings: lr 0.003 \(now 0.5\), seed 0 \(now 1\)"):
        run(corpus, out, "--resume", "--lr", "0.5", "--seed", "1")
    corpus_of_another_size = tmp_path / "corpus.jsonl"
    corpus_of_another_size.write_text(corpus.read_text() * 2)
    with pytest.raises(SystemExit, match="has other settings: data"):
        run(corpus_of_another_size, out, "--resume")
    (out / "run.json").rename(out / "not-run.json")
    with pytest.raises(SystemExit, match="no run of this program to resume"):
        run(corpus, out, "--resume")
    assert (out / "model" / "model.safetensors").read_bytes() == before
    (out / "not-run.json").unlink()
    assert run(corpus, out, "--overwrite", "--steps", "1", "--eval-every", "1") == 0
    assert (out / "model" / "model.safetensors").read_bytes() != before and (out / "notes").read_text() == "mine"
    assert not (out / "checkpoint-3").exists()
