"""Converted models in eight bits: their logits, saving and loading; and the blocks of docs/quantization.md."""

from pathlib import Path
from typing import Any, Dict

import pytest
import torch
from torch import Tensor

import bhyt
from bhyt.quantization import QuantizedLinear, quantize
from support.checks import same_bits
from support.hf_models import hf, transformers
from support.pages import blocks


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def llama(**options: Any) -> Any:
    """A small converted model with gains that are not 1."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, max_position_embeddings=64, **options,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    hf.convert(model, seq_len=64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    hf.refresh(model)
    return model


@pytest.mark.parametrize("tied", (False, True))
def test_converted_models(tied: bool, tmp_path: Path) -> None:
    """Logits near the float model's; saved and loaded by the Auto classes with the same bits, in another dtype too."""
    model, tokens = llama(tie_word_embeddings=tied), torch.arange(24).view(2, 12)
    float_logits = model(tokens).logits
    assert quantize(model) == 15
    logits = model(tokens).logits
    assert relative(logits, float_logits) < 0.03 and not logits.requires_grad
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "BHyTLlamaForCausalLM" and same_bits(loaded(tokens).logits, logits)
    assert isinstance(loaded.model.layers[1].self_attn.k_proj, QuantizedLinear)
    narrow = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert narrow.lm_head.weight_scale.dtype == torch.float32 and relative(narrow(tokens).logits, logits) < 0.03
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(tokens), "pad_token_id": 0}
    assert torch.equal(loaded.generate(tokens, **options), model.generate(tokens, **options))


def test_models_that_are_not_converted() -> None:
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, intermediate_size=8))  # fmt: skip
    with pytest.raises(ValueError, match="LlamaForCausalLM has no BHyT site .*bhyt.hf.convert"):
        quantize(plain)
    shared = llama()
    shared.model.layers[0].self_attn.q_proj.weight = shared.model.layers[0].self_attn.o_proj.weight
    with pytest.raises(ValueError, match="q_proj: its weight is read by something else"):
        quantize(shared)
    assert type(shared.model.layers[0].input_layernorm) is bhyt.BHyT


def test_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of docs/quantization.md, in order, in one folder."""
    monkeypatch.chdir(tmp_path)
    llama().save_pretrained("model")
    page = [code for language, _, code in blocks("docs/quantization.md") if language == "python"]
    assert len(page) == 3, "the page has lost its blocks"
    names: Dict[str, Any] = {}
    for code in page:
        exec(compile(code, "quantization.md", "exec"), names)
    assert isinstance(names["loaded"].lm_head, QuantizedLinear)
