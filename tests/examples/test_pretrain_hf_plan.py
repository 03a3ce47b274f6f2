"""What examples/pretrain_hf.py decides before it trains: norms, sizes, memory, what is refused; the commands of
docs/pretraining.md."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from support.pages import blocks
from support.paths import ROOT
from hf_runs import TINY, corpus, no_network, sites_of  # noqa: F401 (fixtures among them)

import pretrain_hf  # noqa: E402
import transformers  # noqa: E402

import bhyt  # noqa: E402
from pretraining.distributed import World  # noqa: E402
from pretraining_hf.plan import Plan, build_model, checkpoint_activations  # noqa: E402
from pretraining_hf.presets import PRESETS  # noqa: E402
from pretraining_hf.train import StreamTrainer  # noqa: E402


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


def test_commands_of_the_page() -> None:
    """Every command of docs/pretraining.md has arguments that its program takes, and numbers that go together."""
    import pretrain

    checked = {"pretrain.py": 0, "pretrain_hf.py": 0}
    for _, _, code in blocks("docs/pretraining.md"):
        for line in code.replace("\\\n", " ").splitlines():
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
