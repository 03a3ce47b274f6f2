"""examples/pretrain.py in miniature: it trains, logs, resumes with the same bits, uses the layer as meant."""

import json
import math
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import pretrain  # noqa: E402
from pretraining.data import VOCAB, load_corpus  # noqa: E402
from pretraining.model import Decoder, ModelConfig  # noqa: E402
from pretraining.norms import BLOCKS, CRMSNorm, Derf, DyT, SeeDNorm, SingleScaleRMSNorm, compress  # noqa: E402
from pretraining.train import make_optimizer  # noqa: E402

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
    for module in model.modules():
        if isinstance(module, SeeDNorm):
            torch.nn.init.normal_(module.direction)  # at 0, where it starts, the gradient of the other factor is 0
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


# ---- the norms, against their papers' formulas


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """In float64, with parameters away from where they start, so that each counts."""
    generator = torch.Generator().manual_seed(1)
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 4)
    return module


def test_formulas():
    """Row by row and channel by channel, with Python's own tanh and erf."""
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norms = DyT(32), Derf(32), SeeDNorm(32), SingleScaleRMSNorm(32)
    dyt, derf, seed, single = (randomised(norm).requires_grad_(False) for norm in norms)
    for row, *results in zip(x.tolist(), dyt(x), derf(x), seed(x), single(x)):
        rms = math.sqrt(sum(value**2 for value in row) / 32 + 1e-6)
        self_rescaling = math.tanh(sum(a * b for a, b in zip(row, seed.direction.flatten().tolist())))
        for i, value in enumerate(row):
            expected = (
                dyt.weight[i] * math.tanh(dyt.alpha * value) + dyt.bias[i],
                derf.weight[i] * math.erf(derf.alpha * value + derf.shift) + derf.bias[i],
                (self_rescaling * seed.rescale[0, i] + seed.weight[i]) * value / rms,
                single.weight * value / rms,
            )
            for result, y in zip(results, expected):
                assert result[i].item() == pytest.approx(y.item(), rel=1e-12)


@pytest.mark.parametrize(
    ("norm", "start"),
    [(DyT, {"alpha": 1, "weight": 1, "bias": 0}), (Derf, {"alpha": 1, "shift": 0, "weight": 1, "bias": 0}),
     (SeeDNorm, {"weight": 1, "rescale": 1, "direction": 0}), (SingleScaleRMSNorm, {"weight": 1})],
)
def test_where_the_parameters_start(norm, start):
    parameters = dict(norm(8).named_parameters())
    assert parameters.keys() == start.keys()
    assert all((parameters[name] == value).all() for name, value in start.items())


def test_seednorm_decays_what_its_authors_decay():
    """alpha and beta, and no gain; and at its start it is RMSNorm."""
    config = SimpleNamespace(weight_decay=0.1, lr=1e-3)
    block = BLOCKS["seednorm"](TINY, 1)
    decayed = {id(p) for p in make_optimizer(block, config).param_groups[0]["params"]}
    site, x = block.input_layernorm, torch.randn(4, 32)
    assert {id(site.rescale), id(site.direction)} <= decayed and id(site.weight) not in decayed
    torch.testing.assert_close(site(x), torch.nn.RMSNorm(32, eps=1e-6)(x))


def test_pre_crmsnorm_is_layernorm():
    """The same function of the same matrices, of gains and biases too, from streams of d - 1 channels."""
    logits, gradients = [], []
    for norm in ("layernorm", "pre-crmsnorm"):
        torch.manual_seed(0)
        model = randomised(Decoder(TINY, BLOCKS[norm]))
        tokens = torch.randint(VOCAB, (2, TINY.seq_len), generator=torch.Generator().manual_seed(2))
        logits.append(model(tokens))
        logits[-1].logsumexp(-1).mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*logits, rtol=1e-10, atol=1e-10)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
    assert model.embed_tokens(tokens).shape[-1] == TINY.dim - 1
    x = torch.randn(3, 32, dtype=torch.float64)
    expected = torch.nn.functional.layer_norm(x, (32,))
    torch.testing.assert_close(CRMSNorm(32).double()(compress(x)), expected)


def test_mix_ln():
    """Twelve blocks: three Post-LN, nine Pre-LN, with the residual adds written out."""
    config = ModelConfig(vocab=VOCAB, layers=12, dim=32, heads=4, kv_heads=2, seq_len=16)
    model = randomised(Decoder(config, BLOCKS["mix-ln"]))
    tokens = torch.randint(VOCAB, (2, 16))
    x = model.embed_tokens(tokens)
    rotary, layers = model.rotary(x), model.layers
    behind_mlp = [layers[1].input_layernorm, layers[2].input_layernorm, layers[3].previous_output_layernorm]
    for layer, norm in zip(layers[:3], behind_mlp):
        x = layer.post_attention_layernorm(x + layer.self_attn(x, rotary))
        x = norm(x + layer.mlp(x))
    for layer in layers[3:]:
        x = x + layer.self_attn(layer.input_layernorm(x), rotary)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    torch.testing.assert_close(model(tokens), model.lm_head(model.norm(x)))
    norms = [name for name, _ in model.named_parameters() if name.endswith("norm.weight")]
    assert len(norms) == 2 * 12 + 1


class CountedOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count[op._schema.name] += 1
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm", ["bhyt", "bhyt-exact"])
def test_second_site_reduces_nothing(norm):
    """With BHyT a block's only row reduction is its first site's, and no residual add is an op of its own."""
    model, tokens = Decoder(TINY, BLOCKS[norm]), torch.randint(VOCAB, (2, TINY.seq_len))
    model.norm = torch.nn.Identity()  # the final RMSNorm reduces too, and is not the subject
    with torch.no_grad(), CountedOps() as ops:
        model(tokens)
    exact_adds = TINY.layers - 1 if norm == "bhyt" else 2 * TINY.layers - 1
    assert ops.count["bhyt::forward"] == 1  # the first block, which has nothing to add yet
    assert ops.count["bhyt::add_forward"] == exact_adds
    assert ops.count["bhyt::add_forward_approx"] == (TINY.layers if norm == "bhyt" else 0)
    assert not {"aten::mean", "aten::sum", "aten::rsqrt", "aten::sqrt", "aten::pow"} & ops.count.keys()
    assert ops.count["aten::add"] == 1 + 2 * TINY.layers  # the one before the final norm; rotary, for q and k


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
