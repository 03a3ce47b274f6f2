"""What users of comparable projects reported of models of transformers, and what held here when it was tried: rows 53
to 59 of docs/users.md, as far as no other file covers them."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from support.checks import same_bits
from support.hf_models import converted, ids, transformers
from support.packages import needs


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return converted().requires_grad_(False)


def tokens() -> Tensor:
    return ids() % 63 + 1  # 0 is padding


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(tokens()).logits


def greedy(model: nn.Module, rows: Tensor, **options: object) -> Tensor:
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(rows)) | options
    return model.generate(rows, **options)


@pytest.mark.parametrize("variant", (None, "half"))
def test_dtype_of_the_folder(model: nn.Module, variant: str, tmp_path: Path) -> None:
    """dtype="auto" takes the folder's dtype, of any file variant; offsets stay float32, and the logits are those of the
    saved model. USERS row 53."""
    option = "dtype" if transformers.__version__ >= "5" else "torch_dtype"
    half = copy.deepcopy(model).to(torch.bfloat16)
    half.save_pretrained(tmp_path, variant=variant)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, variant=variant, **{option: "auto"})
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    state, expected = loaded.state_dict(), half.state_dict()
    assert state.keys() == expected.keys() and all(same_bits(state[name], t) for name, t in expected.items())
    assert {t.dtype for name, t in state.items() if "variance_offset" in name} == {torch.float32}
    loaded.model.rotary_emb = half.model.rotary_emb  # .to() rounded its frequencies, which no file has
    assert same_bits(logits(loaded), logits(half))


def test_quanto_weights(model: nn.Module) -> None:
    """8-bit weights of optimum-quanto: logits are those of a model with the matrices by which its linears multiply.
    USERS row 55."""
    quanto = needs("optimum.quanto")
    import bhyt.hf

    quantised, plain = copy.deepcopy(model), copy.deepcopy(model)
    quanto.quantize(quantised, weights=quanto.qint8)
    quanto.freeze(quantised)
    for name, linear in plain.named_modules():
        if isinstance(linear, nn.Linear):
            linear.weight = nn.Parameter(quantised.get_submodule(name).weight.dequantize(), requires_grad=False)
    bhyt.hf.refresh(plain)
    actual, expected = logits(quantised), logits(plain)
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not torch.allclose(expected, logits(model), rtol=1e-4)


def test_assisted_generation(model: nn.Module) -> None:
    """Another BHyT model proposes tokens, some of them refused: the text is that of greedy search. USERS row 56."""
    assistant, one = converted(exact_layers=2).requires_grad_(False), tokens()[:1]
    assistant.lm_head.weight.add_(0.02 * torch.randn_like(assistant.lm_head.weight))
    expected = greedy(model, one)
    assert not torch.equal(greedy(assistant, one), expected)
    assert torch.equal(greedy(model, one, assistant_model=assistant), expected)


def test_continuous_batching(model: nn.Module) -> None:
    """Prompts of several lengths in one paged cache: the tokens of each alone. USERS row 56."""
    if not hasattr(model, "generate_batch"):
        pytest.skip("transformers has no generate_batch")
    model = copy.deepcopy(model)
    prompts = [tokens()[0, :3].tolist(), tokens()[1].tolist(), tokens()[0, 2:7].tolist()]
    expected = [greedy(model, torch.tensor([prompt]))[0, len(prompt) :].tolist() for prompt in prompts]
    config = transformers.GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=-1)
    cache = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)  # else most of the memory
    made = model.generate_batch(prompts, generation_config=config, continuous_batching_config=cache)
    assert [list(output.generated_tokens) for output in made.values()] == expected


@pytest.mark.parametrize("kind", ("sdpa", "flex_attention"))
def test_attention_kinds(model: nn.Module, kind: str) -> None:
    """Both give the logits of plain attention. USERS row 57."""
    other = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    other.set_attn_implementation(kind)
    with torch.compiler.set_stance("force_eager"):  # transformers compiles flex attention: half a minute
        actual, expected = logits(other), logits(model)
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_dynamo_exporter(model: nn.Module) -> None:
    """transformers' exporter, with dynamic sizes: the program has the ops, and the model's logits at other sizes. USERS
    row 59."""
    exporters = pytest.importorskip("transformers.exporters.exporter_dynamo")
    inputs = {"input_ids": tokens(), "use_cache": False}
    sizes = {"input_ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    config = exporters.DynamoConfig(dynamic=True, dynamic_shapes=sizes)
    exported = exporters.DynamoExporter().export(model, inputs, config=config)
    program = getattr(exported, "program", exported)
    assert "bhyt." in str(program.graph)
    longer = torch.cat((tokens(), tokens()[:, :5]), 1)[[0, 1, 0]]
    actual = program.module()(input_ids=longer)
    assert same_bits(getattr(actual, "logits", actual[0]), model(longer).logits)
