"""Serving, as far as it needs no engine: models built as engines build them, and the plugin's entry point.

engines/test_weights.py has the weights that pass by; engines/test_vllm.py runs the engine itself.
"""

import contextlib
import copy
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import pytest
import torch
from torch import Tensor, nn

from support.checks import same_bits
from support.hf_models import SIZES, converted, hf, ids
from support.paths import ROOT



@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Models are built with their parameters on meta and their buffers in memory, as vLLM and accelerate build them."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: Any) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def built_empty(model: nn.Module) -> nn.Module:
    """Another model of its config, without weights, whose persistent buffers are in memory."""
    with parameters_on_meta():
        empty = type(model)(copy.deepcopy(model.config))
    assert all(parameter.is_meta for parameter in empty.parameters())
    return empty


def fill(empty: nn.Module, weights: Dict[str, Tensor]) -> None:
    """As engines load: memory for the parameters, then copies into parameters and buffers."""
    for module in empty.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                module._parameters[name] = nn.Parameter(torch.full_like(parameter, 7.0, device="cpu"))
    places = dict(empty.named_parameters()) | dict(empty.named_buffers())
    for name, tensor in weights.items():
        places[name].data.copy_(tensor)


@pytest.mark.parametrize("options", ({}, {"learnable_lam": False, "last_layer_lam": 1.5}), ids=str)
def test_nothing_vanishes_into_meta(options: dict) -> None:
    """F19: buffers of sites are in memory where those of other modules are; what is copied into them is in force."""
    model = converted(**options)
    empty = built_empty(model)
    buffers = dict(empty.named_buffers())
    assert sum(name.endswith(("lam", "offset")) for name in buffers) == (10 if options else 3)
    assert not any(buffer.is_meta for buffer in buffers.values())
    fill(empty, model.state_dict())
    with torch.no_grad():
        assert same_bits(empty.eval()(ids()).logits, model(ids()).logits)


def test_memory_is_no_value() -> None:
    """An offset is not set by memory that a site's parameters get, wherever its buffer was before."""
    model = converted()
    with parameters_on_meta():
        empty = type(model)(copy.deepcopy(model.config))
    offset = empty.model.layers[1].post_attention_layernorm
    offset.variance_offset.fill_(3.0)
    assert offset.has_variance_offset()
    empty.to_empty(device="cpu")
    assert not offset.has_variance_offset()


class Merged(nn.Module):
    """An engine's attention: q, k and v in one linear."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.o_proj, self.head_dim = attention.o_proj, attention.head_dim
        self.qkv_proj = nn.Linear(64, 128)
        self.inner = [attention]  # out of sight

    def forward(self, **kwargs: Any) -> Any:
        return self.inner[0](**kwargs)


def merge(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:
        layer.self_attn = Merged(layer.self_attn)
    return model


@pytest.mark.parametrize("compiled", (False, True))
def test_merged_attention(compiled: bool) -> None:
    """F19: where q, k and v are merged, the offset that was loaded is in force, compiled too; asked for another one,
    the model says why there is none; without one it does not run."""
    model = converted()
    with torch.no_grad():
        expected = model(ids()).logits
    engine = merge(built_empty(model))
    for layer, merged in zip(model.model.layers, engine.model.layers):
        merged.self_attn.inner = [layer.self_attn]
    fill(engine, {name: tensor for name, tensor in model.state_dict().items() if ".self_attn." not in name})
    engine.eval()
    for layer in engine.model.layers:
        assert layer.post_attention_layernorm.has_variance_offset()
    run = torch.compile(engine, backend="aot_eager") if compiled else engine
    with torch.no_grad():
        assert (run(ids()).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    with pytest.raises(RuntimeError, match="no v_proj and o_proj"):
        hf.refresh(engine)
    engine.model.layers[1].post_attention_layernorm._unset_offset()
    with pytest.raises(RuntimeError, match="offset has not been set"):
        engine(ids())


def test_shards() -> None:
    """c is not computed of some of the value heads, as an engine's tensor parallelism leaves them in a process."""
    model = converted()
    attention = model.model.layers[1].self_attn
    attention.v_proj.weight = nn.Parameter(attention.v_proj.weight[:16])
    attention.o_proj.weight = nn.Parameter(attention.o_proj.weight[:, :32])
    with pytest.raises(RuntimeError, match="16 of its 32 rows"):
        hf.refresh(model)


@pytest.mark.parametrize("engine, reason", [("vllm", r"vllm\.general_plugins"), ("sglang", "SGLang is not supported")])
def test_refused_without_plugin(engine: str, reason: str) -> None:
    """F19: engines' own transformers backends, which name themselves in the config, are refused."""
    config = hf.BHyTLlamaConfig(**SIZES, seq_len=32)
    config._attn_implementation = engine
    with pytest.raises(RuntimeError, match=reason):
        hf.BHyTLlamaForCausalLM(config)


# The plugin


def test_entry_point() -> None:
    """The entry point is there, names every family and its classes."""
    from bhyt import vllm

    text = (ROOT / "pyproject.toml").read_text()
    assert '[project.entry-points."vllm.general_plugins"]\nbhyt = "bhyt.vllm:register"\n' in text
    assert callable(vllm.register) and tuple(sorted(vllm.FAMILIES)) == tuple(sorted(hf.FAMILIES))
    for base, name in vllm.FAMILIES.items():
        made = getattr(hf, f"BHyT{name}ForCausalLM")
        assert made.config_class.model_type == f"bhyt_{base}"
        mixture = "num_experts_per_tok" in vars(made.config_class())
        assert (base in vllm.MIXTURES) == mixture


def test_nothing_imports_vllm(tmp_path: Path) -> None:
    """bhyt, its plugin's module and the models work where an import of vLLM fails."""
    code = "import sys; sys.modules['vllm'] = None; import bhyt, bhyt.vllm, bhyt.hf, bhyt.vllm.weights"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr


STAND_IN = """
import sys, time, types
import torch, transformers
from transformers import AutoConfig, AutoTokenizer
registered = {}
class Reader:
    def __init__(self, config): self.hf_text_config = config
    def derive_max_model_len_and_key(self):
        lengths = {key: getattr(self.hf_text_config, key, None) for key in ("max_position_embeddings", "seq_len")}
        return min((length, key) for key, length in lengths.items() if length)
table = {}
def module(name, **contents):
    sys.modules[name] = made = types.ModuleType(name)
    vars(made).update(contents)
    return made
convertors = module("convertors", MODEL_ARCH_CONFIG_CONVERTORS=table, ModelArchConfigConvertorBase=Reader)
registry = types.SimpleNamespace(register_model=registered.__setitem__)
module("vllm", ModelRegistry=registry)
module("vllm.transformers_utils", model_arch_config_convertor=convertors)
start = time.process_time()
import bhyt.vllm
bhyt.vllm.register()
bhyt.vllm.register()
print("SECONDS", time.process_time() - start)
assert "bhyt.hf" not in sys.modules
config = AutoConfig.from_pretrained(sys.argv[1])
assert type(config).__module__ == "bhyt.hf.families.llama" and config.seq_len == 32
assert registered[config.architectures[0]] == "bhyt.vllm.native:LlamaForCausalLM"
assert table[config.model_type](config).derive_max_model_len_and_key() == (128, "max_position_embeddings")
assert config.seq_len == 32
bhyt.vllm.register()
assert AutoConfig.for_model("bhyt_llama").__class__ is type(config)
"""


def test_registration(tmp_path: Path) -> None:
    """With a stand-in for vLLM: register imports neither vLLM nor bhyt.hf, takes less than 0.1 s, more calls change
    nothing; a folder's config is found without trust_remote_code, and T does not bound the context."""
    converted().save_pretrained(tmp_path)
    seconds = []
    for _ in range(3):
        command = [sys.executable, "-c", STAND_IN, str(tmp_path)]
        run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert run.returncode == 0, run.stderr
        seconds.append(float(run.stdout.split("SECONDS")[1].split()[0]))
        if seconds[-1] < 0.1:
            break
    assert min(seconds) < 0.1
