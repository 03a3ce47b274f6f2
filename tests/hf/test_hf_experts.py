"""Mixtures of experts: their weights are kept, and train."""

import json
from pathlib import Path
from typing import Any, Dict

import pytest
from safetensors.torch import load_file
from torch import nn

from support.checks import same_bits
from load_saved import outputs
from support.hf_models import SIZES, hf, ids, stock, transformers
from support.packages import needs
from test_hf_tables import BASES

if transformers.__version__ < "5":
    pytest.skip("transformers 4 has other tables", allow_module_level=True)

from bhyt.hf.families import CONFIGS  # noqa: E402


# Mixtures of experts

EXPERTS: Dict[str, Dict[str, Any]] = {
    "Mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "Qwen3Moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1),
    "Olmoe": dict(num_experts=4, num_experts_per_tok=2, num_key_value_heads=4),
}


def test_every_mixture_is_tried() -> None:
    """The families that transformers converts when it loads them."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    mixtures = {base for base in BASES if get_checkpoint_conversion_mapping(base)}
    assert {CONFIGS[base].__name__ for base in mixtures} == {f"BHyT{family}Config" for family in EXPERTS}


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_are_kept(family: str, tmp_path: Path) -> None:
    """F1: converted, saved and loaded; converted after a load; in the layout of transformers 4 (experts apart), in that
    of
    5 (experts in one tensor) and in the authors' (a plain model type): the same bits, and nothing missing."""
    plain = stock(family, **EXPERTS[family])
    plain.save_pretrained(tmp_path / "plain")
    loaded_plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    fresh = stock(family, **EXPERTS[family])
    for model in (fresh, loaded_plain):
        hf.convert(model, seq_len=32)
    expected = outputs(fresh, ids())
    assert same_bits(outputs(loaded_plain, ids()), expected)

    fresh.save_pretrained(tmp_path / "fresh")
    loaded_plain.save_pretrained(tmp_path / "after a load")
    fresh.save_pretrained(tmp_path / "fused", save_original_format=False)
    transformers.Trainer(model=fresh, args=transformers.TrainingArguments(
        str(tmp_path / "run"), report_to=[], use_cpu=True)).save_model(str(tmp_path / "trainer"))  # fmt: skip
    assert loaded_plain.config.model_type == f"bhyt_{plain.config.model_type}"
    keys = {
        folder: set(load_file(tmp_path / folder / "model.safetensors")) for folder in ("fresh", "fused", "after a load")
    }
    assert keys["after a load"] == keys["fresh"]
    assert any(".experts.3." in key for key in keys["fresh"]) and not any(".experts.3." in key for key in keys["fused"])
    for folder in ("fresh", "after a load", "fused", "trainer"):
        model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"], folder
        assert same_bits(outputs(model, ids()), expected), folder

    config = json.loads((tmp_path / "fresh" / "config.json").read_text())
    del config["auto_map"]
    config["model_type"] = config["model_type"].removeprefix("bhyt_")
    (tmp_path / "fresh" / "config.json").write_text(json.dumps(config))
    assert same_bits(outputs(hf.from_pretrained(tmp_path / "fresh"), ids()), expected)


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_train_on(family: str, tmp_path: Path) -> None:
    """A Trainer's run that is resumed from a checkpoint gives the bits of one that was not stopped."""
    rows = [dict(input_ids=row, labels=row) for row in ids(batch=8)]

    def run(model: nn.Module, **options: Any) -> nn.Module:
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=4, save_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
            disable_tqdm=True, learning_rate=1e-2, seed=1,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[hf.refresh_callback(2)])
        trainer.train(**options)
        return model

    whole = stock(family, **EXPERTS[family])
    hf.convert(whole, seq_len=32)
    run(whole)
    checkpoint = tmp_path / "checkpoint-2"
    resumed = run(transformers.AutoModelForCausalLM.from_pretrained(checkpoint), resume_from_checkpoint=str(checkpoint))
    for (name, tensor), other in zip(whole.state_dict().items(), resumed.state_dict().values()):
        assert same_bits(tensor, other), name


def test_megatron_is_refused() -> None:
    """accelerate would train Megatron-LM's Llama in the place of a model whose type contains "llama"."""
    dataclasses = needs("accelerate.utils.dataclasses")
    config = hf.BHyTLlamaConfig(**SIZES, seq_len=32)
    config.to_dict()
    first = next(p for name, p in dataclasses.MODEL_CONFIGS_TO_MEGATRON_PARSERS.items() if name in config.model_type)
    with pytest.raises(NotImplementedError, match="Megatron-LM has no bhyt_llama"):
        first(None, hf.BHyTLlamaForCausalLM(config), None)
