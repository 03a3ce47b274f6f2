"""examples/pretrain_hf.py in miniature: two processes train what one trains, are stopped, go on; the plan, and what is
refused. Its data: test_pretrain_documents.py, test_pretrain_data.py."""

import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

for package in ("accelerate", "datasets", "tensorboard", "tqdm", "transformers"):
    pytest.importorskip(package)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import pretrain_hf  # noqa: E402
import transformers  # noqa: E402
from pages import blocks  # noqa: E402

import bhyt  # noqa: E402
from pretraining.distributed import World  # noqa: E402
from pretraining_hf import documents as documents_module  # noqa: E402
from pretraining_hf.data import HeldOut, evaluation  # noqa: E402
from pretraining_hf.documents import Source  # noqa: E402
from pretraining_hf.plan import Plan, build_model, checkpoint_activations  # noqa: E402
from pretraining_hf.presets import PRESETS  # noqa: E402
from pretraining_hf.train import StreamTrainer, last_checkpoint  # noqa: E402

TINY = (
    "--steps 9 --batch 8 --seq-len 48 --warmup 2 --vocab-size 512 --eval-sequences 16 --streams 2 --refresh 2 "
    "--log-every 1 --eval-every 3 --save-every 3 --keep 9 --cpu"
).split()


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 documents: of the C4 sample, or, where it is not, of Python's own sources."""
    sample = ROOT.parent / "shared" / "data" / "c4_en_valid_1k.jsonl"
    if sample.exists():
        lines = sample.read_text().splitlines()[:400]
    else:
        rows = itertools.islice(documents_module._python_sources(), 400)
        lines = [json.dumps({"text": row["text"][:2000]}) for row in rows]
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def run(corpus: Path, out: Path, *more: str) -> int:
    return pretrain_hf.main([*TINY, "--data", str(corpus), "--out", str(out), *more])


def history(out: Path) -> list[tuple[int, str, float]]:
    """(step, what, how much) of all losses and learning rates."""
    logs = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [
        (log["step"], name, log[name]) for log in logs for name in ("loss", "learning_rate", "eval_loss") if name in log
    ]


def assert_same_losses(actual: Path, expected: Path, tolerance: float) -> None:
    assert [entry[:2] for entry in history(actual)] == [entry[:2] for entry in history(expected)]
    for (step, name, one), (_, _, other) in zip(history(actual), history(expected)):
        assert abs(one - other) <= tolerance, (step, name, one, other)


@pytest.fixture(scope="session")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, all steps without a pause. Its training and evaluation build no cache."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.models.llama.modeling_llama, "DynamicCache", None)
        assert run(corpus, out) == 0
    return out


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


def sites_of(model: torch.nn.Module) -> list[type]:
    return [type(module) for module in model.modules() if isinstance(module, (bhyt.BHyT, bhyt.BHyTApprox))]


def test_norms() -> None:
    shape = PRESETS["tiny"].shape
    assert sites_of(build_model(shape, "rmsnorm", 32)) == []
    assert sites_of(build_model(shape, "bhyt-exact", 32)) == [bhyt.BHyT] * 8
    assert sites_of(build_model(shape, "bhyt", 32)) == [bhyt.BHyT, bhyt.BHyTApprox] * 4
    assert (
        sites_of(build_model(shape, "bhyt", 32, exact_layers=1)) == [bhyt.BHyT] * 2 + [bhyt.BHyT, bhyt.BHyTApprox] * 3
    )
    model = build_model(shape, "bhyt", 32, unit_gains=True)
    layer = model.model.layers[0]
    first, second, attention = layer.input_layernorm, layer.post_attention_layernorm, layer.self_attn
    assert first.weight.unique().item() == 5 and second.weight.unique().item() == 10
    read = bhyt.attention_gain(5 * attention.v_proj.weight, attention.o_proj.weight, 32, kv_groups=2, head_dim=32)
    torch.testing.assert_close(second.variance_offset.squeeze(), (read * (2 / 10) ** 2).squeeze(), rtol=1e-4, atol=0)


# ---- the plan


def parameters_by_hand(shape: dict[str, Any]) -> int:
    d, layers, ffn, vocabulary = (
        shape[name] for name in ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
    )
    kv = d * shape["num_key_value_heads"] // shape["num_attention_heads"]
    layer = 2 * d * d + 2 * d * kv + 3 * d * ffn + 2 * (d + 1)  # two sites: a gain and a lam
    return vocabulary * d * (1 if shape["tie_word_embeddings"] else 2) + layers * layer + d


def test_dry_run(capsys: pytest.CaptureFixture) -> None:
    """Every preset's plan, its parameters counted by hand."""
    assert pretrain_hf.main(["--dry-run", "--devices", "4", "--bf16"]) == 0
    printed = capsys.readouterr().out
    plans = dict(zip(PRESETS, printed.replace("\n    ", " ").splitlines(), strict=True))
    for name, million in {"tiny": 1, "71m": 71, "130m": 134, "374m": 375, "1b": 1236}.items():
        count = parameters_by_hand(PRESETS[name].shape)
        assert round(count / 1e6) == million
        assert plans[name].startswith(f"{name} {count:,} parameters"), plans[name]
        settings = PRESETS[name]
        assert f"{settings.steps * settings.batch * settings.seq_len:,} tokens" in plans[name]
        assert "memory per device, ddp in bf16, estimated in GiB: weights" in plans[name]


def test_memory_is_counted() -> None:
    """Activations are the bytes that a real forward saves, to a tenth; the rest follows from the strategy."""
    shape, settings = (
        PRESETS["tiny"].shape,
        dict(norm="bhyt", exact_layers=0, unit_gains=False, seq_len=32, batch=8, micro_batch=4, steps=1),
    )
    count = parameters_by_hand(shape)
    for bf16, checkpointing in ((False, False), (True, False), (False, True)):
        plan = Plan(shape, **settings, devices=2, strategy="ddp", bf16=bf16, checkpointing=checkpointing)
        model, kept = build_model(shape, "bhyt", 32).train(), {}
        if checkpointing:
            checkpoint_activations(model)

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        ids = torch.zeros(4, 32, dtype=torch.int64)
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            model(input_ids=ids, labels=ids, use_cache=False)
        for parameter in model.parameters():
            kept.pop(parameter.untyped_storage().data_ptr(), None)
        saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        # Without storage a mask is made, and with it keys are repeated for the heads that share them.
        assert saved <= sum(plan.saved(checkpointing)) < 1.1 * saved, (bf16, checkpointing)
        layer = (
            sum(plan.saved(False)) - sum(plan.saved(checkpointing))
        ) / 4  # is computed again; its gradients are not counted
        assert plan.activations() == sum(plan.saved(checkpointing)) + layer + max(plan.saved(checkpointing))
    totals = {}
    for strategy in ("ddp", "fsdp2", "zero1", "zero2", "zero3"):
        plan = Plan(shape, **settings, devices=2, strategy=strategy, bf16=True, checkpointing=False)
        totals[strategy] = plan.memory(build_model(shape, "bhyt", 32))
    assert (
        totals["ddp"]["AdamW"] == 8 * count and totals["ddp"]["DDP's buckets"] == totals["ddp"]["weights"] == 4 * count
    )
    assert totals["fsdp2"]["AdamW"] == 4 * count and totals["fsdp2"]["gradients"] == 2 * count
    assert totals["zero1"]["gradients"] == totals["zero1"]["weights"] == totals["zero2"]["weights"] == 2 * count
    assert totals["zero2"]["gradients"] == count and totals["zero3"]["AdamW"] == 6 * count


def test_decay(tmp_path: Path) -> None:
    """The optimiser decays what bhyt.parameter_groups lets it: no gain, no lam."""
    model = build_model(PRESETS["tiny"].shape, "bhyt", 32)
    arguments = transformers.TrainingArguments(str(tmp_path), weight_decay=0.1, report_to=[], use_cpu=True)
    groups = StreamTrainer(model, arguments).create_optimizer().param_groups
    decayed, others = (bhyt.parameter_groups(model, 0.1)[i]["params"] for i in (0, 1))
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    for group, expected in zip(groups, (decayed, others)):
        assert {id(p) for p in group["params"]} == {id(p) for p in expected} and expected


# ---- what is refused


@pytest.mark.parametrize(
    "options, reason",
    (
        (["--preset", "71m", "--seq-len", "1"], "--seq-len: expected at least 2, got 1"),
        (["--batch", "0"], "--batch: expected at least 1, got 0"),
        (
            ["--batch", "9", "--micro-batch", "4"],
            "--micro-batch: expected a divisor of the 9 sequences of a process, got 4",
        ),
        (["--dry-run", "--devices", "3"], "--batch: expected a multiple of the 3 processes, got 8"),
        (
            ["--streams", "3"],
            "--streams: expected a multiple of the 1 processes that divides the 8 sequences of a step, got 3",
        ),
        (["--lr", "nan"], "--lr and --beta2: expected above 0, and from 0 to below 1, got nan and 0.95"),
        (["--held-out", "0"], "--held-out: expected a share between 0 and 1, got 0.0"),
        (["--norm", "rmsnorm", "--exact-layers", "1"], "--exact-layers: means nothing with --norm rmsnorm"),
        (["--norm", "rmsnorm", "--unit-gains"], "--unit-gains: means nothing with --norm rmsnorm"),
        (["--devices", "2"], "--devices: is for --dry-run"),
        (["--refresh", "0"], "--refresh: expected at least 1, got 0"),
        (["--keep", "1"], "--keep: expected at least 2, got 1"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file or folder, and no name of a data set"),
        (["--data", "nobody/nothing"], "nobody/nothing:train cannot be read: "),
        (["--field", "body"], "expected a string in the field 'body' (--field), got None; there are text"),
        (["--seq-len", "100000"], "too little held-out text: 0 sequences for 2 streams"),
        (["--fsdp", "fsdp2.json"], "fsdp2.json: cannot be read as such a configuration: "),
        (["--fsdp", str(ROOT / "examples/pretraining_hf/fsdp2.json")], "--fsdp: accelerate shards on GPUs only"),
        (["--deepspeed", "a", "--fsdp", "b"], "--fsdp and --deepspeed: give one of them"),
        (["--tokenizer", "nowhere"], "nowhere: cannot be loaded as a tokenizer: "),
        (["--vocab-size", "100"], "--vocab-size: expected at least the 257 tokens of"),
    ),
    ids=str,
)
def test_refused(options: list[str], reason: str, corpus: Path, tmp_path: Path) -> None:
    """In one line."""
    given = [*TINY, "--data", str(corpus), "--out", str(tmp_path / "out"), *options]
    with pytest.raises(SystemExit) as error:
        pretrain_hf.main(given)
    message = str(error.value)
    assert message.startswith("pretrain_hf.py: ") and reason in message and "\n" not in message


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


# ---- the page


def test_commands_of_the_page() -> None:
    """Every command of docs/pretraining.md has arguments that its program takes, and numbers that go together."""
    import pretrain

    checked = {"pretrain.py": 0, "pretrain_hf.py": 0}
    for _, _, code in blocks("docs/pretraining.md"):
        for line in code.splitlines():
            words = shlex.split(line, comments=True)
            program = next((Path(word).name for word in words if word.endswith(".py")), None)
            if program is None:
                continue
            given = words[[Path(word).name for word in words].index(program) + 1 :]
            launcher = dict(zip(words, words[1:]))
            processes = int(launcher.get("--nnodes", 1)) * int(
                launcher.get("--nproc-per-node", launcher.get("--num_processes", 1))
            )
            checked[program] += 1
            if program == "pretrain.py":
                arguments = pretrain.parse_arguments(given)
                pretrain.configure_run(arguments, World(0, processes))
                continue
            arguments = pretrain_hf.parse_arguments(given, pretrain_hf.__doc__)
            for name in ("fsdp", "deepspeed"):
                if getattr(arguments, name):
                    setattr(arguments, name, ROOT / getattr(arguments, name))
            pretrain_hf.plan_of(arguments, pretrain_hf.settings_of(arguments, arguments.preset or "tiny"), processes)
    assert checked == {"pretrain.py": 3, "pretrain_hf.py": 10}
