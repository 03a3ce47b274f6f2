"""The offsets of adapters: whatever changes one, batches of several."""

import copy
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
import torch
from torch import Tensor, nn

from support.checks import same_bits
from load_saved import outputs
from support.hf_models import (
    close, converted, ids, offsets, offsets_by_hand,
)
from support.packages import needs
from test_hf_offsets import attention, multiply, true_offsets


def two_adapters(**options: Any) -> Any:
    """PEFT with adapters "default" and "other" on W_V and W_O; both change c."""
    peft = needs("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["v_proj", "o_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(converted(**options), config)
    model.add_adapter("other", config)
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def hotswap(model: Any, folder: Path, **options: Any) -> None:
    """Another adapter's tensors and scaling under the name "default"."""
    import peft
    from peft.utils.hotswap import hotswap_adapter

    other = peft.get_peft_model(converted(), peft.LoraConfig(**dict(
        r=4, lora_alpha=8, target_modules=["v_proj", "o_proj"], task_type="CAUSAL_LM") | options))  # fmt: skip
    for name, parameter in other.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.6)
    other.save_pretrained(folder)
    hotswap_adapter(model, str(folder), adapter_name="default")


def scale(model: Any) -> None:
    for name in ("v_proj", "o_proj"):
        getattr(attention(model), name).set_scale("default", 3.0)


def replace_adapter(model: Any) -> None:
    model.delete_adapter("default")
    model.add_adapter("default", model.peft_config["other"])
    model.set_adapter("default")
    multiply("lora_A.default.weight")(model)
    for name, parameter in model.named_parameters():
        if "lora_B.default" in name:
            nn.init.normal_(parameter, std=0.5)


ADAPTER_CHANGES: Dict[str, Callable[[Any, Path], Any]] = {
    "hotswap": hotswap, "hotswap, another alpha": lambda model, folder: hotswap(model, folder, lora_alpha=32),
    "in place": lambda model, _: multiply("lora_B.default.weight")(model), "scale": lambda model, _: scale(model),
    "replaced": lambda model, _: replace_adapter(model), "merged": lambda model, _: model.merge_adapter(),
    "two at once": lambda model, _: model.base_model.set_adapter(["default", "other"]),
}  # fmt: skip


@pytest.mark.parametrize("change", ADAPTER_CHANGES)
def test_adapters_that_change(change: str, tmp_path: Path) -> None:
    """F5: under the same name, too, a changed adapter has its own offset."""
    model = two_adapters()
    model(ids())
    ADAPTER_CHANGES[change](model, tmp_path)
    expected = true_offsets(model)
    model(ids())
    assert close(offsets(model), expected)


def test_merged_and_unloaded_unseen(tmp_path: Path) -> None:
    """PEFT writes merged weights through `.data`, into linears that a converted model had before: their offsets are
    those of the merged weights, also where nothing ran while the adapter was there."""
    peft = needs("peft")
    two_adapters().save_pretrained(tmp_path)
    merged = peft.PeftModel.from_pretrained(converted(), tmp_path).merge_and_unload()
    merged(ids())
    assert close(offsets(merged), offsets_by_hand(merged.model.layers))


def test_exchanging_adapters_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once each set of adapters has run, exchanging them changes buffers, in training and in eval mode; each set has
    one address."""
    model = two_adapters()

    def run(adapter: str, training: bool) -> List[int]:
        model.set_adapter(adapter)
        model.train(training)(ids())
        sites = [layer.post_attention_layernorm for layer in model.base_model.model.model.layers]
        return [site.variance_offset.data_ptr() for site in sites]

    addresses = {name: run(name, False) for name in ("default", "other")}
    assert not set(addresses["default"]) & set(addresses["other"])
    expected = {name: outputs(model, ids()) for name in addresses if run(name, False)}
    monkeypatch.setattr("bhyt.hf.offsets.attention_gain", lambda *_, **__: pytest.fail("computed anew"))
    for training in (False, True):
        for name in ("default", "other", "default"):
            assert run(name, training) == addresses[name]
    for name in ("other", "default"):
        assert run(name, False) and same_bits(outputs(model, ids()), expected[name])


@pytest.mark.parametrize("exact", (False, True))
def test_a_batch_of_several_adapters(exact: bool) -> None:
    """F4: each row has the logits of its adapter alone, in a forward and in generate; nothing is left behind, and the
    offset that a state dict has stays that of the active adapter."""
    model = two_adapters(**{"norm_type": "bhytstar"} if exact else {})
    names = ["default", "other", "__base__", "other"]
    tokens = ids(batch=4)

    def alone(row: int, run: Callable[[Tensor], Tensor]) -> Tensor:
        if names[row] == "__base__":
            with model.disable_adapter():
                return run(tokens[row : row + 1])
        model.set_adapter(names[row])
        return run(tokens[row : row + 1])

    def logits(tokens: Tensor, **options: Any) -> Tensor:
        with torch.no_grad():
            return model(tokens, **options).logits

    def generated(tokens: Tensor, **options: Any) -> Tensor:
        return model.generate(
            input_ids=tokens, max_new_tokens=4, eos_token_id=None, do_sample=False, pad_token_id=0, **options
        )

    expected = {run: torch.cat([alone(row, run) for row in range(4)]) for run in (logits, generated)}
    model.set_adapter("default")
    assert not torch.allclose(expected[logits][1], logits(tokens)[1], rtol=1e-2)
    state = copy.deepcopy(model.state_dict())
    for _ in range(2):
        torch.testing.assert_close(logits(tokens, adapter_names=names), expected[logits], rtol=1e-4, atol=1e-4)
    assert torch.equal(generated(tokens, adapter_names=names), expected[generated])
    assert all(same_bits(tensor, state[name]) for name, tensor in model.state_dict().items())
    multiply("lora_B.other.weight")(model)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(logits(tokens, adapter_names=names), expected[logits], rtol=1e-4, atol=1e-4)
    changed = torch.cat([alone(row, logits) for row in range(4)])
    torch.testing.assert_close(logits(tokens, adapter_names=names), changed, rtol=1e-4, atol=1e-4)
