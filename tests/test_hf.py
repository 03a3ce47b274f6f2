"""bhyt.hf: converted decoders against the formulas in float64, and everything one does with such a model."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bhyt
from checks import same_bits

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("bhyt.hf")

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
SIZES = dict(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=128, tie_word_embeddings=False,
)


def stock(family: str = "Llama", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | options)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def converted(family: str = "Llama", **options: Any) -> nn.Module:
    """A converted model whose gains and lambdas are not what they were initialised to."""
    model = stock(family)
    hf.convert(model, seq_len=32, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and ".self_attn." not in name:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.8, 1.2))
    hf.refresh(model)
    return model


def ids(length: int = 12, batch: int = 2) -> Tensor:
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(1))


def logits_by_hand(model: nn.Module, tokens: Tensor) -> Tensor:
    """SPEC.md section 1 for a float64 model, with its own attention and MLP; the offset from the whole d x d product."""
    config, body = model.config, model.model

    def site(x: Tensor, variance: Tensor, norm: nn.Module) -> Tensor:
        a = norm.lam / (config.bhyt_kappa * torch.sqrt(variance + norm.eps))
        return norm.weight * torch.tanh(a * x)

    x = body.embed_tokens(tokens)
    rotary = body.rotary_emb(x, position_ids=torch.arange(tokens.shape[1])[None])
    mask = torch.full((tokens.shape[1],) * 2, float("-inf"), dtype=x.dtype).triu(1)[None, None]
    for layer in body.layers:
        first, second, attention = layer.input_layernorm, layer.post_attention_layernorm, layer.self_attn
        v = x.square().mean(-1, keepdim=True)
        branch = attention(hidden_states=site(x, v, first), position_embeddings=rotary, attention_mask=mask)[0]
        x = x + branch
        if config.norm_type == "bhytstar":
            v = x.square().mean(-1, keepdim=True)
        else:
            values = attention.v_proj.weight.view(2, 16, 64).repeat_interleave(2, 0).reshape(64, 64)
            c = (attention.o_proj.weight @ values).square().sum() / (config.seq_len * config.hidden_size)
            v = v + c.detach() * first.lam.detach() ** 2 / config.bhyt_kappa**2
        x = x + layer.mlp(site(x, v, second))
    last = body.norm
    x = site(x, x.square().mean(-1, keepdim=True), last) if isinstance(last, bhyt.BHyT) else last(x)
    return model.lm_head(x)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", ({}, {"norm_type": "bhytstar"}, {"last_layer_lam": 1.5}), ids=str)
def test_logits(family: str, options: dict) -> None:
    """Logits within 1e-4 of the float64 evaluation, with grouped-query attention; the count of sites."""
    model = stock(family)
    sites = hf.convert(model, seq_len=32, **options)
    assert sites == 2 * SIZES["num_hidden_layers"] + ("last_layer_lam" in options)
    model = converted(family, **options)
    with torch.no_grad():
        actual, expected = model(ids()).logits, logits_by_hand(copy.deepcopy(model).double(), ids())
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_gradients() -> None:
    """Gradients of every parameter within 1e-4 of those of the float64 evaluation."""
    model = converted()
    exact = copy.deepcopy(model).double()
    model(ids()).logits.square().mean().backward()
    logits_by_hand(exact, ids()).square().mean().backward()
    for (name, parameter), other in zip(model.named_parameters(), exact.parameters()):
        assert (parameter.grad - other.grad).norm() <= 1e-4 * other.grad.norm(), name

@pytest.mark.parametrize("family", FAMILIES)
def test_generate(family: str) -> None:
    """Greedy generation with its cache equals recomputing everything at each step, for a batch."""
    model = converted(family)
    options = dict(do_sample=False, pad_token_id=0, eos_token_id=None, attention_mask=torch.ones_like(ids()))
    made = model.generate(ids(), max_new_tokens=8, **options)
    slow = ids()
    with torch.no_grad():
        for _ in range(8):
            slow = torch.cat([slow, model(slow, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, slow)


@pytest.mark.parametrize("options", ({}, {"norm_type": "bhytstar"}, {"last_layer_lam": 1.5}), ids=str)
def test_save_and_load(options: dict, tmp_path: Path) -> None:
    """save_pretrained, then from_pretrained: the config carries every field and the logits have the same bits."""
    model = converted(**options)
    model.save_pretrained(tmp_path)
    loaded = hf.from_pretrained(tmp_path)
    assert loaded.config.norm_type == model.config.norm_type and loaded.config.seq_len == 32
    with torch.no_grad():
        assert same_bits(loaded(ids()).logits, model(ids()).logits)


def test_authors_checkpoint(tmp_path: Path) -> None:
    """Their key names and config fields, without kappa, load and compute the formulas; unknown schedules are refused."""
    from safetensors.torch import save_file

    model = converted()
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, tmp_path / "model.safetensors")
    fields = dict(
        norm_type="bhyt", input_layer_lam=2.0, post_layer_lam=1.0, last_layer_lam=0.0, learnable_lam=True, seq_len=32
    )
    (tmp_path / "config.json").write_text(json.dumps(stock().config.to_dict() | fields, default=str))
    loaded = hf.load_authors_checkpoint(tmp_path)
    with torch.no_grad():
        expected = logits_by_hand(copy.deepcopy(model).double(), ids())
        assert (loaded(ids()).logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    (tmp_path / "config.json").write_text(
        json.dumps(stock().config.to_dict() | fields | {"bhyt_kappa_schedule": "decay"}, default=str)
    )
    with pytest.raises(NotImplementedError, match="bhyt_kappa_schedule"):
        hf.load_authors_checkpoint(tmp_path)


def test_copies() -> None:
    """deepcopy and pickle: independent models, the same bits. USERS row 28."""
    model = converted()
    with torch.no_grad():
        expected = model(ids()).logits
        twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        model.model.layers[0].input_layernorm.weight.zero_()
        for twin in twins:
            assert same_bits(twin(ids()).logits, expected)
            assert isinstance(twin.model.layers[0], type(stock().model.layers[0]))


def test_gradient_checkpointing() -> None:
    """Checkpointed layers give the same gradients, bit for bit."""
    grads = []
    for checkpointed in (False, True):
        model = converted().train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids(), use_cache=False).logits.square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(map(same_bits, *grads))


def test_compiles_without_break() -> None:
    """One graph for the whole model; the ops are in it."""
    model = converted()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert same_bits(compiled(ids(), use_cache=False).logits, model(ids(), use_cache=False).logits)


def test_refusals() -> None:
    """Nothing converted, converted twice, no sequence length, a trained norm: said at once. USERS row 28."""
    with pytest.raises(ValueError, match="nothing was converted"):
        hf.convert(nn.Linear(2, 2), seq_len=8)
    with pytest.raises(ValueError, match="max_position_embeddings is 128"):
        hf.convert(stock())
    with pytest.raises(ValueError, match="norm_type.*'rms'"):
        hf.convert(stock(), seq_len=8, norm_type="rms")
    with pytest.raises(ValueError, match="converted already"):
        hf.convert(converted(), seq_len=8)
    with pytest.raises(ValueError, match="has not been converted"):
        hf.refresh(stock())
    trained = stock()
    nn.init.uniform_(trained.model.layers[1].input_layernorm.weight, 0.5, 1.5)
    with pytest.warns(UserWarning, match="trained"):
        hf.convert(trained, seq_len=8)


def test_warm_start() -> None:
    """With exact sites and a small lam, a warm start is the RMSNorm model: the cubic term is (lam/kappa)^2/3 x^2/rms^2."""
    model = stock()
    for layer in model.model.layers:
        nn.init.uniform_(layer.input_layernorm.weight, 0.5, 1.5)
    with torch.no_grad():
        expected = model(ids()).logits
        hf.convert(model, norm_type="bhytstar", input_layer_lam=0.1, post_layer_lam=0.1, warm_start=True)
        assert (model(ids()).logits - expected).norm() <= 2e-3 * expected.norm()


def test_refresh_follows_the_weights() -> None:
    """c is that of the weights at the time of the refresh, and of them only."""
    model = converted()
    site = model.model.layers[0].post_attention_layernorm
    before = site.variance_offset.clone()
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(2)
    assert same_bits(site.variance_offset, before)
    assert hf.refresh(model) == SIZES["num_hidden_layers"]
    assert torch.allclose(site.variance_offset, 4 * before)
