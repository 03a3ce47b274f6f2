"""The study's norms against their papers' formulas."""

import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("tqdm")

from norms import BLOCKS, CRMSNorm, Derf, SeeDNorm, SingleScaleRMSNorm, compress
from pretraining import norms as example
from pretraining.data import VOCAB
from pretraining.model import Decoder, ModelConfig
from pretraining.train import make_optimizer

TINY = ModelConfig(vocab=VOCAB, layers=3, dim=32, heads=4, kv_heads=2, seq_len=16)
ADDED = [norm for norm in BLOCKS if norm not in example.BLOCKS]


@pytest.mark.parametrize("norm", ADDED)
def test_every_norm_reaches_every_parameter(norm):
    model = Decoder(TINY, BLOCKS[norm])
    for module in model.modules():
        if isinstance(module, SeeDNorm):
            torch.nn.init.normal_(module.direction)  # at 0, where it starts, the gradient of the other factor is 0
    model(torch.randint(VOCAB, (2, TINY.seq_len))).logsumexp(-1).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.count_nonzero() > 0, name


def test_norms_start_from_the_same_matrices():
    """As the example's RMSNorm does."""
    matrices = []
    for norm in ("rmsnorm", *ADDED):
        torch.manual_seed(0)
        matrices.append([p for p in Decoder(TINY, BLOCKS[norm]).parameters() if p.ndim == 2 and len(p) > 1])
    for others in matrices[1:]:
        assert all(torch.equal(one, other) for one, other in zip(matrices[0], others, strict=True))


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
    norms = Derf(32), SeeDNorm(32), SingleScaleRMSNorm(32)
    derf, seed, single = (randomised(norm).requires_grad_(False) for norm in norms)
    for row, *results in zip(x.tolist(), derf(x), seed(x), single(x)):
        rms = math.sqrt(sum(value**2 for value in row) / 32 + 1e-6)
        self_rescaling = math.tanh(sum(a * b for a, b in zip(row, seed.direction.flatten().tolist())))
        for i, value in enumerate(row):
            expected = (
                derf.weight[i] * math.erf(derf.alpha * value + derf.shift) + derf.bias[i],
                (self_rescaling * seed.rescale[0, i] + seed.weight[i]) * value / rms,
                single.weight * value / rms,
            )
            for result, y in zip(results, expected):
                assert result[i].item() == pytest.approx(y.item(), rel=1e-12)


@pytest.mark.parametrize(
    ("norm", "start"),
    [(Derf, {"alpha": 1, "shift": 0, "weight": 1, "bias": 0}),
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
