"""PEFT on converted models: modules saved beside adapters, norms as adapters, the active adapter."""

import contextlib
import copy
from pathlib import Path

import torch
from torch import nn

from support.checks import same_bits
from load_saved import outputs
from support.hf_models import (
    close, hf, ids, offsets, offsets_by_hand, transformers,
)
from support.packages import needs
from test_hf_tools import computes_the_same, folder, model  # noqa: F401 (fixtures)


def test_modules_to_save(model: nn.Module, tmp_path: Path) -> None:
    """Norms trained and saved beside an adapter, loaded by AutoPeftModelForCausalLM; a refresh takes the active copy's
    lam, and without the adapter the original's."""
    peft = needs("peft")
    model.save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], task_type="CAUSAL_LM",
        modules_to_save=["input_layernorm", "post_attention_layernorm"],
    )
    wrapped = peft.get_peft_model(base, config).train()
    assert not [name for name, p in wrapped.named_parameters() if "original_module" in name and p.requires_grad]
    wrapped(ids()).logits.square().mean().backward()
    trained = {name: p for name, p in wrapped.named_parameters() if ".lam" in name and p.requires_grad}
    assert len(trained) == 6 and all(p.grad is not None and p.grad.any() for p in trained.values())
    with torch.no_grad():
        for p in trained.values():
            p.mul_(1.25)
    before = offsets(model)
    assert hf.refresh(wrapped) == 3
    sites = [layer.post_attention_layernorm for layer in wrapped.base_model.model.model.layers]
    active = torch.cat([site.modules_to_save["default"].variance_offset for site in sites])
    assert torch.allclose(active, before * 1.25**2, rtol=1e-5)
    wrapped.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert type(loaded.base_model.model) is hf.BHyTLlamaForCausalLM
    assert computes_the_same(loaded, wrapped)
    with loaded.disable_adapter():
        hf.refresh(loaded)
        assert computes_the_same(loaded, model)


def test_layer_norm_tuning(model: nn.Module, tmp_path: Path) -> None:
    """LNTuning trains the sites alone, lam included; what it saves gives the same bits; merged too."""
    peft = needs("peft")
    config = peft.LNTuningConfig(
        target_modules=["input_layernorm", "post_attention_layernorm"], task_type="CAUSAL_LM"
    )
    wrapped = peft.get_peft_model(copy.deepcopy(model), config).train()
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=1.0)
    wrapped(ids()).logits.square().mean().backward()
    changed = [name for name, p in wrapped.named_parameters() if p.grad is not None and p.grad.any()]
    assert len(changed) == 12 and sum(".lam" in name for name in changed) == 6
    optimizer.step()
    hf.refresh(wrapped)
    assert not computes_the_same(wrapped, model)
    wrapped.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    assert computes_the_same(loaded, wrapped)
    expected = outputs(wrapped.eval(), ids())
    assert same_bits(outputs(loaded.merge_and_unload().eval(), ids()), expected)


def test_adapter_from_its_folder(folder: Path, model: nn.Module, tmp_path: Path) -> None:
    """AutoPeftModelForCausalLM finds the BHyT base of an adapter, whose offsets follow the adapter's W_V and W_O."""
    peft = needs("peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    wrapped = peft.get_peft_model(
        base, peft.LoraConfig(r=4, target_modules=["v_proj", "o_proj"], task_type="CAUSAL_LM")
    )
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    hf.refresh(wrapped)
    wrapped.save_pretrained(tmp_path)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert computes_the_same(loaded, wrapped)
    assert not same_bits(offsets(wrapped), offsets(model)) and close(offsets(loaded), offsets(wrapped).double())


def test_offsets_follow_the_active_adapter(model: nn.Module, tmp_path: Path) -> None:
    """Adapters on W_V and W_O that are disabled, exchanged, merged or unloaded: the logits of that model, without a
    refresh by hand; and what is saved of a merged one has its offsets."""
    peft = needs("peft")
    config = peft.LoraConfig(r=4, target_modules=["v_proj", "o_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    wrapped.add_adapter("other", config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)

    def true_offsets() -> torch.Tensor:
        """After a refresh; the model is left as it was found."""
        twin = copy.deepcopy(wrapped)
        hf.refresh(twin)
        return offsets(twin)

    seen = []
    for adapter in ("default", "other", None, "default"):
        with wrapped.disable_adapter() if adapter is None else contextlib.nullcontext():
            if adapter is not None:
                wrapped.set_adapter(adapter)
            logits = outputs(wrapped.eval(), ids())
            assert close(offsets(wrapped), true_offsets().double()), adapter
            seen.append(logits)
            if adapter is None:
                assert same_bits(logits, outputs(model.eval(), ids()))
    assert same_bits(seen[0], seen[3]) and not torch.allclose(seen[0], seen[1])
    wrapped.save_pretrained(tmp_path / "adapter", selected_adapters=["default"])
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter")
    merged = loaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert close(offsets(again), offsets_by_hand(again.model.layers))
    assert computes_the_same(again, merged)
    assert computes_the_same(wrapped.unload(), model)
