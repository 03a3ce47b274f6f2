"""Offsets in graphs: a refresh between forward and backward, compiled models, DPO, gradient checkpointing."""

import copy
from pathlib import Path
from typing import Any, List

import pytest
import torch
from torch import Tensor, nn

from support.checks import same_bits
from load_saved import outputs
from support.hf_models import (
    SIZES, converted, hf, ids, logits_by_hand, offsets, save_tokenizer, stock,
    transformers,
)
from support.packages import needs
from test_hf_offsets import multiply
from test_hf_offsets_adapters import two_adapters


def test_a_refresh_between_forward_and_backward() -> None:
    """F9: the backward has its forward's offset: the gradients are those without the refresh, to the bit; where no
    graph holds the buffer, it stays where it is."""
    model = converted().train()
    site = model.model.layers[1].post_attention_layernorm
    expected = copy.deepcopy(model)
    expected(ids()).logits.square().mean().backward()
    for change in (lambda: hf.refresh(model), lambda: site.set_variance_offset(0.5)):
        hf.refresh(model)
        address = site.variance_offset.data_ptr()
        loss = model(ids()).logits.square().mean()
        change()
        assert site.variance_offset.data_ptr() != address
        loss.backward()
        for (name, parameter), other in zip(model.named_parameters(), expected.parameters()):
            assert same_bits(parameter.grad, other.grad), name
        model.zero_grad()
        address = site.variance_offset.data_ptr()
        hf.refresh(model)
        assert site.variance_offset.data_ptr() == address


@torch.no_grad()
def test_compiled() -> None:
    """Nothing is looked at inside a compiled graph: offsets stay until a refresh, which keeps their address, so that
    the graph has it without being compiled anew."""
    model = converted()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(ids())
    site = model.model.layers[1].post_attention_layernorm
    before, address = offsets(model), site.variance_offset.data_ptr()
    multiply("v_proj.weight")(model)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(ids())
        assert same_bits(offsets(model), before)
        hf.refresh(model)
        actual = compiled(ids()).logits
    assert site.variance_offset.data_ptr() == address
    torch.testing.assert_close(actual, model(ids()).logits, rtol=1e-5, atol=1e-5)


def test_compiled_with_adapters() -> None:
    """Adapters that are exchanged in a compiled model have their offsets: the graph is left for it, or refuses to
    be."""
    one_layer = {"sizes": {"num_hidden_layers": 1}}
    model = two_adapters(**one_layer)
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = outputs(model, ids())
    twin = two_adapters(**one_layer)
    compiled = torch.compile(twin, backend="eager")
    for name in ("default", "other", "default", "other"):
        twin.set_adapter(name)
        torch.testing.assert_close(outputs(compiled, ids()), expected[name], rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
    twin = two_adapters(**one_layer)
    whole = torch.compile(twin, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="_settle_outside"):
        outputs(whole, ids())
    hf.refresh(twin)
    torch.testing.assert_close(outputs(whole, ids()), expected["default"], rtol=1e-5, atol=1e-5)


def test_dpo(tmp_path: Path) -> None:
    """TRL's DPOTrainer with LoRA on W_V and W_O, whose reference pass disables the adapters between a forward and its
    backward: each step's loss is that of a float64 computation of the formulas by hand."""
    if transformers.__version__ < "5":
        pytest.skip("this trl needs a newer transformers")
    peft, trl = needs("peft"), needs("trl")
    from datasets import Dataset

    torch.manual_seed(0)
    model = converted()
    model.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    words = [[f"w{i % 63 + 1}" for i in row] for row in ids(12, 12).tolist()]  # w0 would be the end
    rows = [
        dict(prompt=" ".join(row[:4]), chosen=" " + " ".join(row[4:8]), rejected=" " + " ".join(row[8:]))
        for row in words
    ]
    seen: List[Any] = []

    class Spy(trl.DPOTrainer):  # type: ignore[misc]
        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            weights = {name: p.detach().clone() for name, p in self.model.named_parameters()}
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            seen.append((weights, dict(inputs), (loss[0] if isinstance(loss, tuple) else loss).item()))
            return loss

    arguments = trl.DPOConfig(
        output_dir=str(tmp_path / "run"), max_steps=4, per_device_train_batch_size=3, learning_rate=0.1,
        report_to=[], use_cpu=True, bf16=False, beta=0.3, save_strategy="no", disable_tqdm=True, warmup_steps=0,
        lr_scheduler_type="constant", max_grad_norm=0.0,
    )  # fmt: skip
    lora = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["v_proj", "o_proj"], lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    trainer = Spy(
        model=transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), args=arguments, peft_config=lora,
        train_dataset=Dataset.from_list(rows), callbacks=[hf.refresh_callback(every=1)],
        processing_class=transformers.AutoTokenizer.from_pretrained(tmp_path / "base"),
    )  # fmt: skip
    trainer.train()
    assert len(seen) == 4

    def log_probabilities(plain: nn.Module, inputs: Any) -> Tensor:
        tokens, completion = inputs["input_ids"], inputs["completion_mask"][:, 1:].double()
        log_probs = logits_by_hand(plain, tokens)[:, :-1].log_softmax(-1)
        return (log_probs.gather(-1, tokens[:, 1:, None])[..., 0] * completion).sum(1)

    reference = copy.deepcopy(model).double()
    losses = []
    with torch.no_grad():
        for weights, inputs, loss in seen:
            assert inputs["attention_mask"].all()  # every row is as long: no padding to compute by hand
            policy = copy.deepcopy(reference)
            for index, layer in enumerate(policy.model.layers):
                for name in ("v_proj", "o_proj"):
                    prefix = f"base_model.model.model.layers.{index}.self_attn.{name}.lora_"
                    a, b = (weights[f"{prefix}{part}.default.weight"].double() for part in "AB")
                    getattr(layer.self_attn, name).weight.add_(2 * b @ a)
            ratios = log_probabilities(policy, inputs) - log_probabilities(reference, inputs)
            chosen, rejected = ratios.chunk(2)
            losses.append(-nn.functional.logsigmoid(0.3 * (chosen - rejected)).mean().item())
            assert loss == pytest.approx(losses[-1], rel=1e-6), losses
    assert losses[0] == pytest.approx(0.6931, abs=1e-4) and abs(losses[-1] - losses[0]) > 1e-3  # it is another model


@pytest.mark.parametrize("when", ("before", "in the config", "after"))
def test_gradient_checkpointing_in_any_order(when: str) -> None:
    """F12: enabled before convert, in the config or after: converts, and gives the bits without it."""
    def enable(model: nn.Module) -> None:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    if when == "in the config":
        config = transformers.LlamaConfig(**SIZES)
        config.gradient_checkpointing = True
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
    else:
        model = stock()
    if when == "before":
        enable(model.train())
    hf.convert(model, seq_len=32)
    if when == "after":
        enable(model)
    plain = stock()
    hf.convert(plain, seq_len=32)
    assert model.is_gradient_checkpointing
    for twin in (model.train(), plain.train()):
        twin(ids()).logits.square().mean().backward()
    for (name, parameter), other in zip(model.named_parameters(), plain.named_parameters()):
        assert same_bits(parameter.grad, other[1].grad), name
