"""examples/pretrain.py in miniature: it trains, logs, resumes with the same bits, uses the layer as meant."""

import json
import math
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import bhyt

from support.packages import needs
from support.paths import EXAMPLES

needs("matplotlib")
needs("tqdm")

sys.path.insert(0, str(EXAMPLES))

import pretrain  # noqa: E402
from pretraining.data import VOCAB, load_corpus  # noqa: E402
from pretraining.model import Decoder, ModelConfig  # noqa: E402
from pretraining.norms import BLOCKS, DyT  # noqa: E402

TINY = ModelConfig(vocab=VOCAB, layers=3, dim=32, heads=4, kv_heads=2, seq_len=16)
TINY_ARGUMENTS = (
    "--layers 2 --dim 32 --heads 4 --kv-heads 2 --seq-len 16 --batch 4 --steps 8 --warmup 2 --lr 1e-2 "
    "--refresh 3 --log-every 1 --eval-every 4 --checkpoint-every 5 --device cpu"
).split()


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} squared is {i * i}, and cubed {i**3}.\n" for i in range(1500)))
    return path


def pretrain_in(out: Path, text: Path, *more: str) -> None:
    assert pretrain.main([*TINY_ARGUMENTS, "--text", str(text), "--out", str(out), *more]) == 0


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_trains_logs_and_draws(tmp_path, text, capsys):
    pretrain_in(tmp_path, text, "--norm", "bhyt", "rmsnorm", "--steps", "30", "--eval-every", "15")
    for norm in ("bhyt", "rmsnorm"):
        log = records(tmp_path / f"{norm}.jsonl")
        assert Counter(record["event"] for record in log) == {"start": 1, "train": 30, "valid": 3, "depth": 1}
        assert all(record["norm"] == norm for record in log)
        valid = [record["loss"] for record in log if record["event"] == "valid"]
        assert valid[-1] < valid[0] - 1
        depth = log[-1]
        assert len(depth["magnitude"]) == len(depth["variance"]) == 3  # the embeddings and two blocks
        assert (tmp_path / f"{norm}.pt").exists()
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    *_, bhyt_row, rmsnorm_row, _ = capsys.readouterr().out.splitlines()
    assert bhyt_row.split()[0] == "bhyt" and rmsnorm_row.split()[0] == "rmsnorm"


@pytest.mark.parametrize("stop_at", [5, 7])  # both between two refreshes; a checkpoint is due at 5, not at 7
def test_resume_has_the_bits_of_a_run_without_pause(tmp_path, text, stop_at, monkeypatch):
    monkeypatch.setattr(pretrain, "plot_comparison", lambda logs, path: None)  # slow, and not the subject
    whole, paused = tmp_path / "whole", tmp_path / "paused"
    pretrain_in(whole, text, "--norm", "bhyt")
    pretrain_in(paused, text, "--norm", "bhyt", "--stop-at", str(stop_at))
    pretrain_in(paused, text, "--norm", "bhyt", "--resume")

    one, other = (torch.load(out / "bhyt.pt", weights_only=True) for out in (whole, paused))
    assert one["step"] == other["step"] == 8
    assert one["model"].keys() == other["model"].keys()
    for name, value in one["model"].items():
        assert torch.equal(value, other["model"][name]), name
    one_log, other_log = (
        [(r["event"], r["step"], r.get("loss"), r.get("magnitude")) for r in records(out / "bhyt.jsonl")]
        for out in (whole, paused)
    )
    assert one_log == other_log


def test_resume_refuses_other_settings(tmp_path, text, monkeypatch):
    monkeypatch.setattr(pretrain, "plot_comparison", lambda logs, path: None)
    pretrain_in(tmp_path, text, "--norm", "bhyt", "--stop-at", "2")
    with pytest.raises(SystemExit, match="lr 0.01 .now 0.5"):
        pretrain_in(tmp_path, text, "--norm", "bhyt", "--resume", "--lr", "0.5")


@pytest.mark.parametrize("norm", BLOCKS)
def test_every_norm_reaches_every_parameter(norm):
    torch.manual_seed(0)
    model = Decoder(TINY, BLOCKS[norm])
    tokens = torch.randint(VOCAB, (2, TINY.seq_len))
    model(tokens).logsumexp(-1).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.count_nonzero() > 0, name


def test_bfloat16_keeps_the_stream_in_float32():
    model, tokens, streams = Decoder(TINY, BLOCKS["bhyt"]), torch.randint(VOCAB, (2, TINY.seq_len)), []
    for layer in model.layers:
        layer.register_forward_hook(lambda layer, inputs, output: streams.append([x.dtype for x in output]))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens).float().logsumexp(-1).mean()
    loss.backward()
    assert loss.isfinite() and streams == [[torch.bfloat16, torch.float32]] * TINY.layers


def test_norms_start_from_the_same_matrices():
    matrices = []
    for block in BLOCKS.values():
        torch.manual_seed(0)
        matrices.append([p for p in Decoder(TINY, block).parameters() if p.ndim == 2 and len(p) > 1])
    for others in matrices[1:]:
        assert all(torch.equal(one, other) for one, other in zip(matrices[0], others, strict=True))


def test_dyt():
    """Row by row and channel by channel with Python's own tanh, with parameters away from where they start: 1, 1 and
    0."""
    norm = DyT(8).double().requires_grad_(False)
    assert {name: set(value.flatten().tolist()) for name, value in norm.named_parameters()} == {
        "alpha": {1.0}, "weight": {1.0}, "bias": {0.0}
    }
    for parameter in norm.parameters():
        parameter.add_(torch.randn_like(parameter) / 4)
    x = torch.randn(5, 8, dtype=torch.float64)
    for row, result in zip(x.tolist(), norm(x)):
        for i, value in enumerate(row):
            expected = norm.weight[i] * math.tanh(norm.alpha * value) + norm.bias[i]
            assert result[i].item() == pytest.approx(expected.item(), rel=1e-12)


class CountedOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count[op._schema.name] += 1
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm", ["bhyt-unit-gains", "bhyt", "bhyt-exact"])
def test_second_site_reduces_nothing(norm):
    """With BHyT a block's only row reduction is its first site's, and no residual add is an op of its own."""
    model, tokens = Decoder(TINY, BLOCKS[norm]), torch.randint(VOCAB, (2, TINY.seq_len))
    model.norm = torch.nn.Identity()  # the final RMSNorm reduces too, and is not the subject
    with torch.no_grad(), CountedOps() as ops:
        model(tokens)
    exact_adds = 2 * TINY.layers - 1 if norm == "bhyt-exact" else TINY.layers - 1
    assert ops.count["bhyt::forward"] == 1  # the first block, which has nothing to add yet
    assert ops.count["bhyt::add_forward"] == exact_adds
    assert ops.count["bhyt::add_forward_approx"] == (0 if norm == "bhyt-exact" else TINY.layers)
    assert not {"aten::mean", "aten::sum", "aten::rsqrt", "aten::sqrt", "aten::pow"} & ops.count.keys()
    assert ops.count["aten::add"] == 1 + 2 * TINY.layers  # the one before the final norm; rotary, for q and k


def test_unit_gains_start_as_rmsnorm():
    """Rows reach the sub-layers as RMSNorm would hand them on, but for what tanh bends; the offset has the gains in
    it."""
    torch.manual_seed(0)
    layer = Decoder(TINY, BLOCKS["bhyt-unit-gains"]).layers[0]
    x = torch.randn(64, TINY.dim)
    y, variance = layer.input_layernorm.forward_with_variance(x)
    assert (y - x * variance.rsqrt()).abs().max() < 0.5 and abs(y.square().mean().sqrt() - 1) < 0.05
    assert y.abs().max() <= 5
    attention = layer.self_attn
    gain = bhyt.attention_gain(
        5 * attention.v_proj.weight, attention.o_proj.weight, TINY.seq_len, attention.heads // attention.kv_heads,
        head_dim=attention.head_dim,
    )
    torch.testing.assert_close(layer.post_attention_layernorm.variance_offset, (gain * 0.2**2).reshape(1))


def test_variance_offset_follows_the_weights():
    model = Decoder(TINY, BLOCKS["bhyt"])
    layer = model.layers[0]
    before = layer.post_attention_layernorm.variance_offset.clone()
    with torch.no_grad():
        layer.self_attn.o_proj.weight.mul_(2)
    model.refresh()
    torch.testing.assert_close(layer.post_attention_layernorm.variance_offset, 4 * before)


def test_default_text_is_the_standard_library():
    corpus = load_corpus([], seq_len=128)
    assert len(corpus.train) > 2_000_000 and len(corpus.valid) > 50_000
    inputs, targets = corpus.batch(step=3, size=4, seq_len=128, seed=1)
    assert inputs.shape == targets.shape == (4, 128) and torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(inputs, corpus.batch(step=3, size=4, seq_len=128, seed=1)[0])
    assert not torch.equal(inputs, corpus.batch(step=4, size=4, seq_len=128, seed=1)[0])
    assert 2.5 < corpus.unigram_entropy() < 4


def test_json_lines(tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i} " * 9}) + "\n" for i in range(40)))
    corpus = load_corpus([path], seq_len=16)
    assert (corpus.train == 256).sum() == 38 and (corpus.valid == 256).sum() == 2
    path.write_text('{"title": "no text"}\n')
    with pytest.raises(SystemExit, match='documents.jsonl:1: expected a JSON object with a string "text"'):
        load_corpus([path], seq_len=16)
