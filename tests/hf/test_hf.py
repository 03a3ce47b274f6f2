"""bhyt.hf: converted decoders against the formulas in float64, and everything one does with such a model.

Runs with transformers 4.51 as well, see test_hf_versions.py.
"""

import copy
import pickle
import types
from typing import Any, List

import pytest
import torch
from torch import Tensor, nn

from support.checks import same_bits
from support.hf_models import FAMILIES, SIZES, converted, hf, ids, logits_by_hand, stock, transformers

@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    (
        {}, {"norm_type": "bhytstar"}, {"last_layer_lam": 1.5}, {"use_gamma_var": True, "seq_len": 2},
        {"learnable_lam": False}, {"exact_layers": 1},
    ),
    ids=str,
)
def test_logits(family: str, options: dict) -> None:
    """Logits within 1e-4 of the float64 evaluation, with grouped-query attention; the count of sites."""
    model = stock(family)
    sites = hf.convert(model, **{"seq_len": 32} | options)
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


def padded() -> Tensor:
    """Two rows, the second with five places of padding (token 0) on its left."""
    tokens = ids() % 63 + 1
    tokens[1, :5] = 0
    return tokens


def recomputed(model: nn.Module, tokens: Tensor, count: int = 8) -> Tensor:
    """Greedy tokens [batch, count], each row alone, without its padding, from the beginning at every step."""
    rows = []
    for row in tokens:
        row = row[row != 0][None]
        for _ in range(count):
            with torch.no_grad():
                row = torch.cat([row, model(row, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        rows.append(row[:, -count:])
    return torch.cat(rows)


def cache_kinds() -> List[str]:
    from transformers.generation import configuration_utils

    return sorted({*configuration_utils.ALL_CACHE_IMPLEMENTATIONS, "dynamic"} - {"quantized", "mamba"})


OPTIONS = dict(do_sample=False, pad_token_id=0, eos_token_id=None, max_new_tokens=8)


@pytest.mark.parametrize("family", FAMILIES)
def test_generate(family: str) -> None:
    """Greedy generation of a left-padded batch equals recomputing each row at each step."""
    model, tokens = converted(family), padded()
    made = model.generate(tokens, attention_mask=(tokens != 0).long(), **OPTIONS)
    assert torch.equal(made[:, tokens.shape[1] :], recomputed(model, tokens))


@pytest.mark.parametrize("kind", cache_kinds())
def test_generate_with_every_cache(kind: str) -> None:
    """The same with each cache that the model has in transformers, under a sliding window shorter than the text."""
    tokens = padded()
    options = OPTIONS | dict(cache_implementation=kind, attention_mask=(tokens != 0).long())
    try:
        stock("Mistral", sliding_window=8).generate(tokens, **options)
    except Exception as error:
        pytest.skip(f"Mistral itself does not run with it here: {str(error)[:90]}")
    model = converted("Mistral", sliding_window=8)
    made = model.generate(tokens, **options)
    assert torch.equal(made[:, tokens.shape[1] :], recomputed(model, tokens))


def test_generate_with_a_quantized_cache() -> None:
    """Keys and values in fp8: logits are those of the formulas with such a cache. A key's last bits may round it to
    another fp8 number, so the bound is loose, but a fifth of what fp8 itself changes."""
    tokens = ids() % 63 + 1
    options = OPTIONS | dict(return_dict_in_generate=True, output_logits=True, attention_mask=torch.ones_like(tokens))
    options |= dict(cache_implementation="quantized", cache_config={"backend": "fp8"})
    try:
        stock().generate(tokens, **options)
    except Exception as error:
        pytest.skip(f"Llama itself does not run with it here: {str(error)[:90]}")
    model = converted()
    made = model.generate(tokens, **options)
    cache = transformers.QuantizedCache("fp8", model.config)
    parts = tokens, *made.sequences[:, tokens.shape[1] : -1].split(1, dim=1)
    with torch.no_grad():
        expected = torch.stack([logits_by_hand(model, part, cache=cache)[:, -1] for part in parts], 1)
        unquantised = model(made.sequences[:, :-1], use_cache=False).logits[:, tokens.shape[1] - 1 :]
    error = (torch.stack(made.logits, 1) - expected).norm()
    assert error <= 0.2 * (unquantised - expected).norm() and (unquantised - expected).norm() > 0


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
    with pytest.raises(ValueError, match="exact_layers.*-1"):
        hf.convert(stock(), seq_len=8, exact_layers=-1)
    with pytest.raises(ValueError, match="converted already"):
        hf.convert(converted(), seq_len=8)
    with pytest.raises(ValueError, match="has not been converted"):
        hf.refresh(stock())
    trained = stock()
    nn.init.uniform_(trained.model.layers[1].input_layernorm.weight, 0.5, 1.5)
    with pytest.warns(UserWarning, match="trained"):
        hf.convert(trained, seq_len=8)


REFUSED = {
    "Gemma2": "pre_feedforward_layernorm",
    "Gemma": "not weight",  # the gain is 1 + weight
    "StableLm": "LayerNorm has other parameters|attention_dropout",
    "Olmo2": "nothing was converted",  # post-norm
    "Granite": "more than residual adds",
    "Phi3": "no v_proj",
    "DiffLlama": "lambda_q1",
}


@pytest.mark.parametrize("family", REFUSED)
def test_other_decoders_are_refused(family: str) -> None:
    """What computes something else than the formula's block is refused and left as it was. USERS row 28."""
    extra = {"residual_multiplier": 0.5} if family == "Granite" else {}
    model = stock(family, pad_token_id=0, **extra)
    with torch.no_grad():
        expected = model(ids()).logits
        with pytest.raises(ValueError, match=REFUSED[family]):
            hf.convert(model, seq_len=8)
        assert same_bits(model(ids()).logits, expected)
    assert not hasattr(model.config, "norm_type")


@pytest.mark.parametrize("change", ("parallel", "dropout", "mask", "instance"))
def test_changed_layers_are_refused(change: str) -> None:
    """Layers of the right parts whose forward does something else with them."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    def forward(self: nn.Module, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        x = hidden_states
        if change == "mask":
            attention_mask = None
        branch = self.self_attn(hidden_states=self.input_layernorm(x), attention_mask=attention_mask, **kwargs)[0]
        if change == "parallel":
            return x + branch + self.mlp(self.post_attention_layernorm(x))
        if change == "dropout":
            branch = nn.functional.dropout(branch, 0.5, self.training)
        x = x + branch
        return x + self.mlp(self.post_attention_layernorm(x))

    model = stock()
    layer = model.model.layers[1]
    if change == "instance":
        layer.forward = types.MethodType(forward, layer)
    else:
        layer.__class__ = type("Changed", (LlamaDecoderLayer,), {"forward": forward})
    with pytest.raises(ValueError, match="replaced" if change == "instance" else "Changed is more than"):
        hf.convert(model, seq_len=8)
    assert isinstance(model.model.layers[0].input_layernorm, type(model.model.norm))


@pytest.mark.parametrize("family", ("Granite", "Helium", "Glm", "Phi3", "DiffLlama", "Olmoe", "Mixtral", "Qwen3Moe"))
def test_other_decoders_convert(family: str) -> None:
    """Families with the same block: in exact sites with a small lam, a warm start is the model it was."""
    # All experts take part: there is no choice that a small deviation could change.
    experts = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=4)
    mixed = family in ("Olmoe", "Mixtral", "Qwen3Moe")
    model = stock(family, pad_token_id=0, **experts if mixed else {})
    if mixed and transformers.__version__ < "5":  # there an MLP returns its router's logits as well
        with pytest.raises(ValueError, match="is not converted|could not be probed|nothing was converted"):
            hf.convert(model, norm_type="bhytstar")
    else:
        check_twin(model)


def test_meta_device() -> None:
    """Converted without memory, then given weights: offsets that come with them are in force, and a layer that got none
    computes its own at its first call."""
    model = converted()
    for dropped in ("", "variance_offset"):
        with torch.device("meta"):
            empty = stock()
        hf.convert(empty, seq_len=32)
        with pytest.raises(RuntimeError, match="offset has not been set"):
            hf.refresh(empty)
        state = {name: tensor for name, tensor in model.state_dict().items() if not dropped or dropped not in name}
        empty.load_state_dict(state, assign=True)
        empty.model.rotary_emb = model.model.rotary_emb
        for layer in empty.model.layers if dropped else ():
            layer.post_attention_layernorm.variance_offset = torch.tensor(float("nan"))
        with torch.no_grad():
            assert same_bits(empty.eval()(ids()).logits, model(ids()).logits)


def test_outputs_of_every_layer() -> None:
    """Hidden states and attention weights come out as from the model that was converted, in number and shape."""
    outputs = []
    for model in (stock(), converted()):
        model.config._attn_implementation = "eager"
        out = model(ids(), output_hidden_states=True, output_attentions=True)
        outputs.append([[tuple(tensor.shape) for tensor in tensors] for tensors in (out.hidden_states, out.attentions)])
    assert outputs[0] == outputs[1] and list(map(len, outputs[1])) == [4, 3]


def check_twin(model: nn.Module) -> None:
    """The first deviation is the cubic term, (lam/kappa)^2 / 3 (x/rms)^2 relative: 3e-5 times at most d = 64."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                nn.init.uniform_(parameter, 0.5, 1.5)
        expected = model(ids()).logits
        hf.convert(model, norm_type="bhytstar", input_layer_lam=0.1, post_layer_lam=0.1, unit_gains=True)
        assert (model(ids()).logits - expected).norm() <= 2e-3 * expected.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_warm_start(family: str) -> None:
    """With exact sites and a small lam, a warm start is the RMSNorm model."""
    check_twin(stock(family))


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
