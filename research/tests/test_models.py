"""What the study trains and measures, against float64 and autograd."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("tqdm")

import jobs
import measure
import run as study
from jobs import PRESETS, Job
from norms import BLOCKS
from pretraining.data import VOCAB, load_corpus
from pretraining.model import Decoder, ModelConfig
from pretraining.train import Run
from variants import block_of, frozen

SMOKE = PRESETS["smoke"]
TINY = ModelConfig(vocab=VOCAB, layers=3, dim=32, heads=4, kv_heads=2, seq_len=16)


# ---- variants


def test_position_offset():
    """The second site's variance is v + c lam^2 / kappa^2 T / t: float64, from the weights."""
    config = TINY
    block = block_of(Job("bhyt-position", 1e-3, 1, 1))(config, 1)
    block.refresh()
    branch, stream = torch.randn(2, 12, 32), torch.randn(2, 12, 32)
    variance = stream.square().mean(-1, keepdim=True)
    y, total = block.enter_mlp(branch, stream, variance)

    per_head = block.self_attn.v_proj.weight.double().view(2, 8, 32)
    out = block.self_attn.o_proj.weight.double().view(32, 2, 2, 8).sum(2)  # a group's two query heads share one value
    product = torch.einsum("dkh,khe->de", out, per_head)
    offset = product.square().sum() / 32 / torch.arange(1, 13).double().unsqueeze(-1) * 0.2**2
    x = (branch + stream).double()
    expected = torch.tanh(0.1 * x / (variance.double() + offset + 1e-6).sqrt())
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total, branch + stream)


def test_offset_of_one_value():
    """c for T = 1; and so it is: with one token in all places the attention's variance is that of one value."""
    config = ModelConfig(vocab=VOCAB, layers=1, dim=64, heads=4, kv_heads=2, seq_len=16)
    model = Decoder(config, block_of(Job("bhyt-one-value", 1e-3, 1, 1)))
    with torch.no_grad():
        model.embed_tokens.weight.mul_(50)
        model.layers[0].input_layernorm.lam.fill_(0.1)
    model.refresh()
    (visit,) = measure.walk(model, torch.randint(VOCAB, (200, 1)).expand(200, 16))
    branch = visit.branch.double().square().mean()
    assert branch == pytest.approx(visit.block.post_attention_layernorm.variance_offset.item(), rel=0.1)
    _, estimates = measure.variances(visit, measure.attention_weights(visit))
    added = (estimates["one"] - estimates["none"]).mean()
    assert added == pytest.approx(visit.block.post_attention_layernorm.variance_offset.item(), rel=1e-5)


def test_first_block_exact():
    """Two exact sites in the first block, and BHyT behind it."""
    model = Decoder(TINY, block_of(Job("bhyt-first-exact", 1e-3, 1, 1)))
    assert [type(block) for block in model.layers] == [BLOCKS["bhyt-exact"], BLOCKS["bhyt"], BLOCKS["bhyt"]]
    assert [block.index for block in model.layers] == [1, 2, 3]


def readings(norm: str, config: ModelConfig = TINY) -> tuple[Decoder, list[list[float]]]:
    """A model, and the mean squares of what its sub-layers read, block by block, of embeddings that dwarf eps."""
    torch.manual_seed(0)
    model = Decoder(config, block_of(Job(norm, 1e-3, 1, 1)))
    with torch.no_grad():
        model.embed_tokens.weight.mul_(50)
    tokens = torch.randint(VOCAB, (4, config.seq_len))
    return model, [[site["mean_square"] for site in measure.sites(visit)] for visit in measure.walk(model, tokens)]


def test_where_gains_start():
    """(kappa / lam) ** power: sub-layers read mean squares of 1, of (lam / kappa)^4, and of 1 / l; a little less with
    tanh. RMSNorm that starts where BHyT does reads (lam / kappa)^2."""
    for norm, first, second in (
        ("bhyt-unit-exact", 1.0, 1.0), ("bhyt-small", 0.2**4, 0.1**4), ("rmsnorm-small", 0.2**2, 0.1**2),
        ("rmsnorm-embedding", 1.0, 1.0),
    ):
        for pair in readings(norm)[1]:
            assert pair == pytest.approx([first, second], rel=0.15)
    for index, pair in enumerate(readings(jobs.BY_DEPTH)[1], start=1):
        assert pair == pytest.approx([1 / index, 1 / index], rel=0.3)  # the second site's variance is an estimate


def test_gains_that_count():
    """Where gains start far from 1, c is that of W_V times the gains; else the estimate is 25 times too small."""
    model, _ = readings(jobs.UNIT)
    block = model.layers[1]
    plain = BLOCKS["bhyt"](TINY, 1)
    plain.load_state_dict(block.state_dict())
    plain.refresh()
    counted, without = (b.post_attention_layernorm.variance_offset.item() for b in (block, plain))
    assert counted == pytest.approx(25 * without, rel=1e-5) == measure.offset(block).item()


def test_gains_that_learn_faster():
    """Ten times AdamW's step, from the same start, in a gradient that clipping sees as it was."""
    slow, fast = (readings(norm)[0] for norm in ("bhyt", "bhyt-fast"))
    tokens, moved = torch.randint(VOCAB, (2, 16)), []
    for model in (slow, fast):
        site = model.layers[1].input_layernorm
        assert torch.equal(site.weight, torch.ones(32))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
        model(tokens).logsumexp(-1).mean().backward()
        behind = site.weight if model is slow else site.parametrizations.weight.original
        moved.append([behind.grad.clone(), None])
        optimizer.step()
        moved[-1][1] = site.weight.detach() - 1
    torch.testing.assert_close(moved[1][0], moved[0][0], rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(moved[1][1], 10 * moved[0][1], rtol=1e-2, atol=1e-6)


def test_unit_embedding():
    tokens = torch.randint(VOCAB, (4, 16))
    model = Decoder(TINY, block_of(Job("bhyt-embedding", 1e-3, 1, 1)))
    assert model.embed_tokens(tokens).var().item() == pytest.approx(1, rel=0.1)
    assert model.lm_head.weight.var().item() == pytest.approx(0.02**2, rel=0.1)


@pytest.mark.parametrize("norm", ["dyt", "derf"])
def test_smaller_alpha(norm):
    model = Decoder(TINY, block_of(Job(f"{norm}-0.1", 1e-3, 1, 1)))
    alphas = [value.item() for name, value in model.named_parameters() if name.endswith("alpha")]
    assert alphas == pytest.approx([0.1] * 7)
    assert type(model.norm) is type(BLOCKS[norm].make_final_norm(8)) is type(model.layers[0].input_layernorm)
    assert model.embed_tokens.scale.item() == pytest.approx(32**0.5)


@pytest.mark.parametrize("bound", [0.5, 1.0, 4.0])
def test_frozen_bound(bound):
    """lam / kappa = bound / sqrt(L), no parameter; and an exact site obeys mean(y^2) <= (lam / kappa)^2."""
    model = Decoder(TINY, frozen(bound))
    assert not [name for name, _ in model.named_parameters() if name.endswith("lam")]
    for visit in measure.walk(model, torch.randint(VOCAB, (4, 16))):
        for site in (visit.block.input_layernorm, visit.block.post_attention_layernorm):
            assert site.lam.item() / site.kappa == pytest.approx(bound / math.sqrt(3), rel=1e-6)
        assert 0 < measure.sites(visit)[0]["mean_square"] <= bound**2 / 3


# ---- measure.py


@pytest.mark.parametrize("norm", BLOCKS)
def test_walk_is_the_forward_pass(norm):
    model, tokens = Decoder(TINY, BLOCKS[norm]), torch.randint(VOCAB, (2, 16))
    *_, last = measure.walk(model, tokens)
    with torch.no_grad():
        stream = last.entered + last.block.leave_mlp(last.block.mlp(last.mlp_input))
        torch.testing.assert_close(model.lm_head(model.norm(stream)), model(tokens))
    torch.testing.assert_close(last.entered, last.stream + last.branch)


def test_independent_values_under_uniform_attention():
    """Where the assumptions hold (distinct random tokens, equal weights, small lam) the attention's variance is
    offset * T / t at every position; and the estimate from the weights is that of the position."""
    config = ModelConfig(vocab=4096, layers=1, dim=64, heads=4, kv_heads=2, seq_len=32)
    model = Decoder(config, BLOCKS["bhyt"])
    with torch.no_grad():
        model.embed_tokens.weight.mul_(50)  # variance 1: eps is nothing
        model.layers[0].input_layernorm.lam.fill_(0.1)
        model.layers[0].self_attn.q_proj.weight.zero_()
    tokens = torch.stack([torch.randperm(4096)[:32] for _ in range(200)])
    (visit,) = measure.walk(model, tokens)
    weights = measure.attention_weights(visit)
    uniform = torch.ones(32, 32).tril() / torch.arange(1, 33).unsqueeze(-1)
    torch.testing.assert_close(weights, uniform.expand_as(weights))

    truth, estimates = measure.variances(visit, weights)
    torch.testing.assert_close(estimates["weights"], estimates["t"])
    branch = visit.branch.double().square().mean((0, 2))  # [T]; 200 rows of 64 values: about 2 % of noise
    position = torch.arange(1, 33)
    added = (estimates["t"] - estimates["none"])[0]
    torch.testing.assert_close(branch, added, rtol=0.1, atol=0)
    torch.testing.assert_close(estimates["T"] - estimates["none"], (added * position / 32).expand_as(truth))
    torch.testing.assert_close(estimates["one"] - estimates["none"], (added * position).expand_as(truth))
    torch.testing.assert_close(truth, (visit.stream + visit.branch).double().square().mean(-1))
    (record,) = measure.approximation([visit])["layers"]
    first = record["terms"]
    x, o = visit.stream.double()[:, 1:3], visit.branch.double()[:, 1:3]
    assert first["cross"][1] == pytest.approx((2 * x * o).mean().item(), rel=1e-6)
    assert first["branch"][0] / first["offset"] == pytest.approx(32, rel=0.1)
    assert record["sink"] == pytest.approx(sum(1 / t for t in range(2, 33)) / 31, rel=1e-5)
    assert record["staleness"] == pytest.approx(math.log((2.0 / 0.1) ** 2), rel=1e-5)  # lam was 2 at the last refresh


def test_attention_weights_give_the_attention():
    """With the weights, values and W_O the branch comes out as the fused attention gives it."""
    model = Decoder(TINY, BLOCKS["bhyt"])
    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn.q_proj.weight.mul_(30)  # far from uniform
    visit = list(measure.walk(model, torch.randint(VOCAB, (2, 16))))[1]
    attention, weights = visit.block.self_attn, measure.attention_weights(visit)
    assert weights.square().sum(-1).mean() > 0.3
    values = attention.v_proj(visit.attention_input).view(2, 16, 2, 8).transpose(1, 2).repeat_interleave(2, dim=1)
    mixed = (weights @ values).transpose(1, 2).reshape(2, 16, 32)
    torch.testing.assert_close(attention.o_proj(mixed), visit.branch, rtol=1e-4, atol=1e-5)


def test_agreement():
    truth = torch.rand(7, 5, dtype=torch.float64) + 0.5
    noisy = truth * torch.linspace(1, 2, 5, dtype=torch.float64)
    record, error = measure.agreement(noisy, truth), np.log(np.linspace(1, 2, 5))
    r = np.corrcoef(noisy.flatten(), truth.flatten())[0, 1]
    assert record["pearson"] == pytest.approx(r)
    assert record["pearson_log"] == pytest.approx(np.corrcoef(noisy.log().flatten(), truth.log().flatten())[0, 1])
    assert record["bias"] == pytest.approx(error.mean()) and record["error"] == pytest.approx((error**2).mean() ** 0.5)
    assert record["bias_by_position"] == pytest.approx([error[0], error[1:3].mean(), error[3:].mean()])
    shifted = measure.agreement(truth + 3, truth)
    assert shifted["pearson"] == pytest.approx(1) and shifted["bias"] > 1  # r does not see an offset


def share(condition: torch.Tensor) -> object:
    """Of 2048 values; the tolerance is four that lie on the edge in float32."""
    return pytest.approx(condition.double().mean().item(), abs=2e-3)


@pytest.mark.parametrize("norm", ["bhyt", "bhyt-exact", "dyt"])
def test_sites(norm):
    """Against the argument of tanh in float64: |tanh| > 0.9, and for BHyT |argument| > lam, with kappa 1 so that there
    are such values among so few channels."""
    model = Decoder(TINY, BLOCKS[norm])
    with torch.no_grad():
        for layer in model.layers:
            for site in (layer.input_layernorm, layer.post_attention_layernorm):
                site.weight.normal_()
                if norm == "dyt":
                    site.bias.normal_()
                    site.alpha.fill_(0.3)
                else:
                    site.lam.fill_(1.5)
                    site.kappa = 1.0
        model.embed_tokens.weight.mul_(50)
    model.refresh()
    for visit in measure.walk(model, torch.randint(VOCAB, (4, 16))):
        first, second = measure.sites(visit)
        before, entered = visit.stream.double(), visit.entered.double()
        if norm == "dyt":
            arguments = 0.3 * before, 0.3 * entered
        else:
            v = before.square().mean(-1, keepdim=True)
            v2 = entered.square().mean(-1, keepdim=True)
            if norm == "bhyt":
                v2 = v + visit.block.post_attention_layernorm.variance_offset.double()
            arguments = 1.5 * before / (v + 1e-6).sqrt(), 1.5 * entered / (v2 + 1e-6).sqrt()
        for record, z, y in zip((first, second), arguments, (visit.attention_input, visit.mlp_input), strict=True):
            assert 0.1 < record["saturated"] < 0.95 and record["saturated"] == share(z.tanh().abs() > 0.9)
            assert record["mean_square"] == pytest.approx(y.double().square().mean().item(), rel=1e-4)
            if norm != "dyt":
                assert record["lam"] == 1.5
                assert 0.1 < record["unforeseen"] < 0.95 and record["unforeseen"] == share(z.abs() > 1.5)


def test_measuring_leaves_the_run_alone(text, tmp_path):
    """Two trainings, one measured after every step, end in the same bits; and the gradient norms are autograd's."""
    corpus, job = load_corpus([text], SMOKE.seq_len), Job("bhyt", 1e-2, 1, 4)
    config, model = study.train_config(job, SMOKE), study.model_config(SMOKE)
    runs = [Run(job.norm, model, config, corpus, tmp_path, block_of(job)) for _ in range(2)]
    for one in runs:
        for _ in range(3):
            one.train_step()
            one.step += 1
            record = measure.measure(one) if one is runs[1] else None
    for a, b in zip(runs[0].model.state_dict().values(), runs[1].model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not list(tmp_path.iterdir())

    layer = runs[1].model.layers[1]
    loss = runs[1].loss(*corpus.validation(8, SMOKE.seq_len))
    gradients = torch.autograd.grad(loss, list(layer.parameters()))
    expected = sum(gradient.double().square().sum() for gradient in gradients).sqrt().item()
    assert record["gradient"][1] == pytest.approx(expected, rel=1e-5)
