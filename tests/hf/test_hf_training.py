"""bhyt.hf in training: adapters, the trainer's callback, wrapped and partitioned weights, the warm start."""

import copy
import sys
import types
from pathlib import Path
from typing import Any, Iterator, List

import pytest
import torch
from torch import Tensor, nn

from support.checks import same_bits
from support.hf_models import adapted, close, converted, hf, ids, offsets, offsets_by_hand, stock
from support.packages import needs

@pytest.mark.parametrize("options", ({}, {"use_dora": True}), ids=str)
def test_adapters(options: dict) -> None:
    """c is that of the merged weights, whether PEFT comes before or after; merging keeps the logits. USERS row 28."""
    after, before = adapted(converted(), **options).train(), adapted(stock(), **options).train()
    hf.convert(before, seq_len=32)
    before.load_state_dict(after.state_dict())  # the names of the parameters are the same
    assert hf.refresh(after) == hf.refresh(before) == 3
    assert after.training and after.base_model.model.model.layers[0].self_attn.v_proj.training
    assert same_bits(offsets(after), offsets(before))

    layers = after.base_model.model.model.layers
    merged = copy.deepcopy(after).merge_and_unload()
    if not options:  # by hand: W + (alpha/r) B A
        for layer, plain in zip(layers, merged.model.layers):
            for name in ("v_proj", "o_proj"):
                lora, linear = getattr(layer.self_attn, name), getattr(plain.self_attn, name)
                delta = 2 * lora.lora_B["default"].weight @ lora.lora_A["default"].weight
                linear.weight.data = (lora.base_layer.weight + delta).detach()
    assert close(offsets(after), offsets_by_hand(merged.model.layers))
    with torch.no_grad():
        expected = after.eval()(ids()).logits
        assert same_bits(before.eval()(ids()).logits, expected)
        hf.refresh(merged)
        assert (merged.eval()(ids()).logits - expected).norm() <= 1e-5 * expected.norm()
        with after.disable_adapter():
            hf.refresh(after)
        assert close(offsets(after), offsets_by_hand(layer for layer in converted().model.layers))


def test_adapters_train_alone(tmp_path: Path) -> None:
    """Gradients reach the adapters and nothing else; a saved adapter on a converted base gives the same bits."""
    peft = needs("peft")
    model = adapted(converted())
    model.train()(ids()).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == ("lora_" in name), name
    hf.refresh(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(converted(), tmp_path)
    hf.refresh(loaded)
    with torch.no_grad():
        assert same_bits(loaded.eval()(ids()).logits, model.eval()(ids()).logits)


def test_trainer_callback(tmp_path: Path) -> None:
    """A run of 5 steps, refreshed every 2: at each step's end c is that of the weights at the last even step, and at
    the end of the run that of the weights as they are; the model runs compiled."""
    needs("accelerate")
    import transformers

    model, seen, true = converted(), [], []
    with torch.no_grad():  # stale, so that the refresh at the beginning is seen
        for layer in model.model.layers:
            layer.post_attention_layernorm.variance_offset.fill_(7.0)

    class Spy(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            seen.append(offsets(model))
            true.append(offsets_by_hand(model.model.layers))

    rows = [dict(input_ids=row, labels=row) for row in ids(batch=10)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=5, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
        use_cpu=True, save_strategy="no", logging_strategy="no", disable_tqdm=True, torch_compile=True,
        torch_compile_backend="eager",
    )
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=rows, callbacks=[hf.refresh_callback(every=2), Spy()]
    )
    trainer.train()
    assert [close(seen[step], true[step // 2 * 2]) for step in range(5)] == [True] * 5
    assert [close(seen[step], true[step]) for step in range(5)] == [True, False, True, False, True]
    assert not close(seen[4], offsets_by_hand(model.model.layers))
    assert close(offsets(model), offsets_by_hand(model.model.layers))
    with pytest.raises(ValueError, match="every"):
        hf.refresh_callback(every=0)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_wrapped_models(process_group: None) -> None:
    """refresh finds sites and T through torch.compile and DDP."""
    model = converted()
    for wrapped in (torch.compile(model), nn.parallel.DistributedDataParallel(model)):
        with torch.no_grad():
            model.model.layers[1].self_attn.o_proj.weight.mul_(1.5)
        assert hf.refresh(wrapped) == 3
        assert close(offsets(model), offsets_by_hand(model.model.layers))


def test_zero_partitioned_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are empty but inside `deepspeed.zero.GatheredParameters`, a stand-in for it: c of the whole ones."""
    model = converted(use_gamma_var=True)
    expected = offsets(model).clone()
    stored, most = {}, []

    class GatheredParameters:
        def __init__(self, parameters: List[nn.Parameter]) -> None:
            self.parameters = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]

        def __enter__(self) -> None:
            most.append(len(self.parameters))
            for parameter in self.parameters:
                parameter.data = stored[parameter.ds_id]

        def __exit__(self, *error: Any) -> None:
            for parameter in self.parameters:
                parameter.data = torch.empty(0)

    zero = types.SimpleNamespace(GatheredParameters=GatheredParameters)
    monkeypatch.setitem(sys.modules, "deepspeed", types.SimpleNamespace(zero=zero))
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id, stored[number], parameter.data = number, parameter.data, torch.empty(0)
    for layer in model.model.layers:
        layer.post_attention_layernorm.variance_offset.zero_()
    assert hf.refresh(model) == 3
    assert same_bits(offsets(model), expected)
    assert not any(parameter.numel() for parameter in model.parameters())
    assert max(most) <= 4  # one layer at a time: W_V, W_O, gain, lam


def loss_of(model: nn.Module, step: int) -> Tensor:
    """Nats per token on sequences of a random phrase of 8 tokens, four times: attention has to look 8 places back."""
    phrase = torch.randint(0, 64, (16, 8), generator=torch.Generator().manual_seed(step))
    tokens = phrase.repeat(1, 4)
    logits = model(tokens, use_cache=False).logits[:, 8:-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 9:].flatten())


def trained(model: nn.Module, first: int, steps: int, lr: float) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    for step in range(first, first + steps):
        loss_of(model, step).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if hasattr(model.config, "norm_type") and step % 10 == 9:
            hf.refresh(model)
    return model


@pytest.mark.slow
def test_warm_start_of_a_trained_model() -> None:
    """A task learnt with RMSNorm: lost in a cold conversion, kept in a warm one with exact sites, partly kept with
    approximate ones (attention that looks at one place adds more variance than one that averages), more with
    the gain counted; and regained in 40 steps, unlike cold."""
    original = trained(stock(), 0, 250, 3e-3)
    with torch.no_grad():
        best = loss_of(original, 10**6)
    assert best < 0.1  # guessing is log 64 = 4.2
    warm = dict(unit_gains=True)
    conversions = {
        "exact": warm | {"norm_type": "bhytstar"}, "warm": warm,
        "without gain": warm | {"use_gamma_var": False}, "cold": {},
    }
    models = {name: copy.deepcopy(original) for name in conversions}
    for name, options in conversions.items():
        hf.convert(models[name], seq_len=32, **options)
    with torch.no_grad():
        losses = {name: loss_of(model, 10**6) for name, model in models.items()}
    assert losses["exact"] < best + 0.05
    assert losses["exact"] < losses["warm"] < losses["without gain"] < 2 and losses["cold"] > 4
    for name in ("exact", "warm", "cold"):
        trained(models[name], 250, 40, 1e-3)
    with torch.no_grad():
        losses = {name: loss_of(model, 10**6) for name, model in models.items()}
    assert max(losses["exact"], losses["warm"]) < best + 0.02 and losses["cold"] > best + 0.2
