"""Who owns a layer's variance offset: it follows the tensors that it was computed from, whatever changes them.

ECOSYSTEM rows F3-F5 and F9-F12 are examples; each test is of the kind.
"""

import copy
import io
import pickle
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
import torch
from torch import Tensor, nn

import bhyt
from checks import same_bits
from load_saved import outputs
from test_hf import converted, hf, ids, logits_by_hand, transformers
from test_hf_loading import save_tokenizer
from test_hf_training import adapted, close, offsets, offsets_by_hand

Change = Callable[[nn.Module], Any]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


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
    """In eval mode, whatever changes W_V, W_O or lam: the next call has the offsets of what is there, without a refresh."""
    model = converted()
    before = offsets(model)
    CHANGES[change](model)
    expected = true_offsets(model)
    model(ids())
    assert close(offsets(model), expected) and not close(offsets(model), before.double())
    after = offsets(model)
    model(ids())
    assert same_bits(offsets(model), after)


@pytest.mark.parametrize("how", (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))), ids=("deepcopy", "pickle"))
def test_copies_know_as_much(how: Callable[[nn.Module], nn.Module]) -> None:
    """A copy of a model whose weights have changed since its last call computes its offsets; so does a copy whose weights
    change before its first call; a copy of a fresh one keeps the offsets."""
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
    """Other weights for one call: that call has their offsets, the next one the model's own; under vmap and grad too."""
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

    from test_hf import stock

    with torch.device("meta"):
        model = stock()
        hf.convert(model, seq_len=32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu").train().eval()
    assert not any(layer.post_attention_layernorm.offset_is_set for layer in model.model.layers)


# Adapters


def two_adapters(**options: Any) -> Any:
    """PEFT with adapters "default" and "other" on W_V and W_O; both change c."""
    peft = pytest.importorskip("peft")
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
    """PEFT writes merged weights through `.data`, into linears that a converted model had before: their offsets are those
    of the merged weights, also where nothing ran while the adapter was there."""
    peft = pytest.importorskip("peft")
    two_adapters().save_pretrained(tmp_path)
    merged = peft.PeftModel.from_pretrained(converted(), tmp_path).merge_and_unload()
    merged(ids())
    assert close(offsets(merged), offsets_by_hand(merged.model.layers))


def test_exchanging_adapters_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once each set of adapters has run, exchanging them changes buffers, in training and in eval mode; each set has one
    address."""
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
        return model.generate(input_ids=tokens, max_new_tokens=4, eos_token_id=None, do_sample=False, pad_token_id=0, **options)

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


# Graphs


def test_a_refresh_between_forward_and_backward() -> None:
    """F9: the backward has its forward's offset: the gradients are those without the refresh, to the bit; where no graph
    holds the buffer, it stays where it is."""
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
    """Nothing is looked at inside a compiled graph: offsets stay until a refresh, which keeps their address, so that the
    graph has it without being compiled anew."""
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
    """Adapters that are exchanged in a compiled model have their offsets: the graph is left for it, or refuses to be."""
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
    peft, trl = pytest.importorskip("peft"), pytest.importorskip("trl")
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
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["v_proj", "o_proj"], lora_dropout=0.0, task_type="CAUSAL_LM")
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


# State


def test_a_state_dict_without_keys_of_a_layer(tmp_path: Path) -> None:
    """F10: an embedding alone, or another layer, leaves a layer's offset; in eight bits, where none can be computed."""
    for quantised in (False, True):
        model = converted()
        if quantised:
            bhyt.quantization.quantize(model)
        before, state = offsets(model), model.state_dict()
        for part in ("model.embed_tokens.", "model.layers.0.mlp.", "model.layers.1.self_attn.q_proj"):
            model.load_state_dict({name: t for name, t in state.items() if name.startswith(part)}, strict=False)
            model(ids())
            assert same_bits(offsets(model), before)
    whole = {name: t for name, t in state.items() if not name.endswith("variance_offset")}
    model.load_state_dict(whole)  # no old offset stays in force
    with pytest.raises(RuntimeError, match="offset has not been set"):
        model(ids())


def test_no_nan_beside_weights(tmp_path: Path) -> None:
    """F11: a model that has its weights has its offsets, however it came to them, before it has run."""
    from test_hf import SIZES, stock

    built = transformers.AutoModelForCausalLM.from_config(hf.BHyTLlamaConfig(**SIZES, seq_len=32))
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(hf.BHyTLlamaConfig(**SIZES, seq_len=32))
    if transformers.__version__ >= "5":  # before, init_weights left such a model alone
        empty.to_empty(device="cpu").init_weights()
    else:
        empty = built
    plain = stock()
    hf.convert(plain, seq_len=32)
    given = copy.deepcopy(plain)
    given.load_state_dict({n: t for n, t in plain.state_dict().items() if not n.endswith("variance_offset")})
    for model in (built, empty, plain, given):
        assert not any(tensor.isnan().any() for tensor in model.state_dict().values())
        assert close(offsets(model), offsets_by_hand(model.model.layers))
    buffer = io.BytesIO()
    torch.save(given, buffer)


def test_sharded_files_keep_offsets(tmp_path: Path) -> None:
    """F3: torch's consolidation of sharded safetensors, which drops tensors without a dimension, has the offsets."""
    from safetensors.torch import load_file
    from torch.distributed import checkpoint

    model = converted()
    writer = getattr(checkpoint, "HuggingFaceStorageWriter", None)
    if writer is None:
        pytest.skip("this torch has no HuggingFaceStorageWriter")
    checkpoint.save(
        model.state_dict(), storage_writer=writer(str(tmp_path), save_distributed=True, enable_consolidation=True)
    )
    written: Dict[str, Tensor] = {}
    for file in tmp_path.glob("*.safetensors"):
        written |= load_file(file)
    assert written.keys() == model.state_dict().keys()
    assert all(same_bits(written[name], tensor) for name, tensor in model.state_dict().items())
    assert sum(name.endswith("variance_offset") for name in written) == 3


def test_offsets_without_a_dimension_load() -> None:
    """Saved before 0.2: the same bits, copied or assigned."""
    model = converted()
    state = {n: t.reshape(()) if n.endswith("variance_offset") else t for n, t in model.state_dict().items()}
    expected = outputs(model, ids())
    for assign in (False, True):
        other = converted()
        multiply("weight")(other)
        other.load_state_dict(state, assign=assign)
        assert same_bits(outputs(other, ids()), expected) and same_bits(offsets(other), offsets(model))
        assert offsets(other).shape == (3,)


@pytest.mark.parametrize("when", ("before", "in the config", "after"))
def test_gradient_checkpointing_in_any_order(when: str) -> None:
    """F12: enabled before convert, in the config or after: converts, and gives the bits without it."""
    from test_hf import SIZES, stock

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
