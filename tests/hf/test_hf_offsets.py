"""Who owns a layer's variance offset: it follows the tensors that it was computed from, whatever changes them.

ECOSYSTEM rows F3-F5 and F9-F12 are examples; each test is of the kind.
"""

import copy
import pickle
from typing import Any, Callable, Dict

import pytest
import torch
from torch import Tensor, nn

from support.checks import same_bits
from load_saved import outputs
from support.hf_models import (
    close, converted, hf, ids, offsets, stock,
)

Change = Callable[[nn.Module], Any]


def true_offsets(model: nn.Module) -> Tensor:
    """Those of a refresh; the model is left as it was found."""
    twin = copy.deepcopy(model)
    hf.refresh(twin)
    return offsets(twin).double()


def attention(model: nn.Module, layer: int = 1) -> nn.Module:
    return [module for name, module in model.named_modules() if name.endswith(f"layers.{layer}.self_attn")][0]


@torch.no_grad()
def multiply(*names: str) -> Change:
    def change(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if any(name.endswith(part) for part in names):
                parameter.mul_(1.5)

    return torch.no_grad()(change)


def step(model: nn.Module) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(ids()).logits.square().mean().backward()
    optimizer.step()
    model.eval()


def load_one_matrix(model: nn.Module) -> None:
    name = "model.layers.1.self_attn.v_proj.weight"
    model.load_state_dict({name: 2 * model.state_dict()[name]}, strict=False)


def assign_one_matrix(model: nn.Module) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    model.load_state_dict({name: 2 * model.state_dict()[name]}, strict=False, assign=True)


def replace_parameter(model: nn.Module) -> None:
    linear = attention(model).v_proj
    linear.weight = nn.Parameter(2 * linear.weight.detach())


def replace_data(model: nn.Module) -> None:
    linear = attention(model).o_proj
    linear.weight.data = 2 * linear.weight.data


def swap(model: nn.Module) -> None:
    linear = attention(model).v_proj
    torch.utils.swap_tensors(linear.weight, nn.Parameter(2 * linear.weight.detach()))


def replace_linear(model: nn.Module) -> None:
    linear = nn.Linear(64, 32, bias=False)
    nn.init.normal_(linear.weight, std=0.2)
    attention(model).v_proj = linear


def parametrize(model: nn.Module) -> None:
    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    nn.utils.parametrize.register_parametrization(attention(model).o_proj, "weight", Double())


def cast_after_a_change(model: nn.Module) -> None:
    multiply("v_proj.weight")(model)
    model.to(torch.float64).to(torch.float32)


def average(model: nn.Module) -> None:
    """The weights of an average, the offsets of the last model averaged: what a copy with its buffers gets."""
    averaged = torch.optim.swa_utils.AveragedModel(copy.deepcopy(model))
    averaged.update_parameters(model)
    other = copy.deepcopy(model)
    multiply("v_proj.weight")(other)
    hf.refresh(other)
    averaged.update_parameters(other)
    for parameter, other_parameter in zip(model.parameters(), averaged.module.parameters()):
        parameter.data = other_parameter.data
    for layer, other_layer in zip(model.model.layers, averaged.module.model.layers):
        layer.post_attention_layernorm.variance_offset.copy_(other_layer.post_attention_layernorm.variance_offset)


CHANGES: Dict[str, Change] = {
    "in place": multiply("v_proj.weight"), "lam": multiply("input_layernorm.lam"), "a training step": step,
    "load": load_one_matrix, "assign": assign_one_matrix, "parameter": replace_parameter, "data": replace_data,
    "swap": swap, "linear": replace_linear, "parametrization": parametrize, "cast": cast_after_a_change,
    "average": average,
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_call_finds_what_has_changed(change: str) -> None:
    """In eval mode, whatever changes W_V, W_O or lam: the next call has the offsets of what is there, without a
    refresh."""
    model = converted()
    before = offsets(model)
    CHANGES[change](model)
    expected = true_offsets(model)
    model(ids())
    assert close(offsets(model), expected) and not close(offsets(model), before.double())
    after = offsets(model)
    model(ids())
    assert same_bits(offsets(model), after)


@pytest.mark.parametrize(
    "how", (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))), ids=("deepcopy", "pickle")
)
def test_copies_know_as_much(how: Callable[[nn.Module], nn.Module]) -> None:
    """A copy of a model whose weights have changed since its last call computes its offsets; so does a copy whose
    weights change before its first call; a copy of a fresh one keeps the offsets."""
    model = converted()
    assert same_bits(outputs(how(model), ids()), outputs(model, ids()))
    changed = how(model)
    multiply("v_proj.weight")(changed)
    changed(ids())
    assert close(offsets(changed), true_offsets(changed))
    multiply("o_proj.weight")(model)
    twin = how(model)
    twin(ids())
    assert close(offsets(twin), true_offsets(model))


def test_nothing_is_computed_where_nothing_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls, casts, copies, saving and loading of what is fresh compute no offset."""
    model = converted()
    monkeypatch.setattr("bhyt.hf.offsets.attention_gain", lambda *_, **__: pytest.fail("computed anew"))
    state = copy.deepcopy(model.state_dict())
    for twin in (model, copy.deepcopy(model), model.train().eval(), model.to(torch.float64).to(torch.float32)):
        twin(ids())
    model.load_state_dict(state)
    model(ids())


def test_in_training_offsets_stay() -> None:
    """Between refreshes a training step reads the offsets of the last one; evaluating computes them, once."""
    model = converted().train()
    before = offsets(model)
    multiply("v_proj.weight")(model)
    model(ids())
    assert same_bits(offsets(model), before)
    model.eval()(ids())
    assert close(offsets(model), true_offsets(model))


def test_an_offset_set_by_hand_stays() -> None:
    """Until the weights change."""
    model = converted()
    site = model.model.layers[1].post_attention_layernorm
    site.set_variance_offset(0.5)
    model(ids())
    assert site.variance_offset.item() == 0.5
    multiply("layers.1.self_attn.v_proj.weight")(model)
    model(ids())
    assert close(offsets(model), true_offsets(model))


def test_functional_call() -> None:
    """Other weights for one call: that call has their offsets, the next one the model's own; under vmap and grad
    too."""
    model = converted()
    expected = outputs(model, ids())
    other = copy.deepcopy(model)
    multiply("v_proj.weight")(other)
    parameters = dict(other.named_parameters())
    with torch.no_grad():
        logits = torch.func.functional_call(model, parameters, (ids(),)).logits
        assert same_bits(logits, other(ids()).logits)
    assert same_bits(outputs(model, ids()), expected)

    def loss(parameters: Dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, (parameters, dict(model.named_buffers())), (ids(),)).logits.sum()

    torch.func.grad(loss)(dict(model.named_parameters()))
    assert same_bits(outputs(model, ids()), expected)


def test_tensors_without_values() -> None:
    """Moving a layer looks at no number: there is none under FakeTensorMode."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.device("meta"):
        model = stock()
        hf.convert(model, seq_len=32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu").train().eval()
    assert not any(layer.post_attention_layernorm.offset_is_set for layer in model.model.layers)
