"""Serving, as far as it needs no engine: models built as engines build them, weights that pass by, the plugin's entry.

test_vllm.py runs the engine itself.
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

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("bhyt.hf")

from checks import same_bits  # noqa: E402
from test_hf import SIZES, converted, ids  # noqa: E402

ROOT = Path(__file__).parent.parent


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


def test_refused_without_plugin() -> None:
    """F19: vLLM's own backend, which names itself in the config, is refused by name of what serves instead."""
    config = hf.BHyTLlamaConfig(**SIZES, seq_len=32)
    config._attn_implementation = "vllm"
    with pytest.raises(RuntimeError, match=r"vllm\.general_plugins"):
        hf.BHyTLlamaForCausalLM(config)


# Weights that pass by


def loading(model: nn.Module) -> Tuple[nn.Module, Any]:
    from bhyt.vllm.weights import Loading, keep_loaded

    engine = built_empty(model)
    keep_loaded(engine)
    return engine, Loading(engine)


def passed(model: nn.Module, weights: Dict[str, Tensor]) -> nn.Module:
    engine, watching = loading(model)
    fill(engine, dict(watching.watch(weights.items())))
    watching.finish(set(weights), prefix="")
    return engine


def offsets(model: nn.Module) -> List[Tensor]:
    return [layer.post_attention_layernorm.variance_offset for layer in model.model.layers]


def reordered(weights: Dict[str, Tensor]) -> Dict[str, Tensor]:
    return {name: weights[name] for name in sorted(weights, reverse=True)}


@pytest.mark.parametrize("options", ({}, {"use_gamma_var": True, "seq_len": 3}), ids=str)
@pytest.mark.parametrize("offset", ("given", "missing", "NaN"))
def test_offsets_of_passing_weights(offset: str, options: dict) -> None:
    """Offsets that come with the weights are kept, those that do not are computed, in any order of the weights."""
    model = converted(**options)
    expected = [o.clone() for o in offsets(model)]
    weights = dict(model.state_dict())
    for name in [name for name in weights if name.endswith("variance_offset")]:
        if offset == "missing":
            del weights[name]
        else:
            weights[name] = weights[name] * (float("nan") if offset == "NaN" else 2)
    for order in (dict, reordered):
        engine = passed(model, order(weights))
        factor = 2 if offset == "given" else 1
        torch.testing.assert_close(offsets(engine), [o * factor for o in expected], rtol=1e-6, atol=0)
        assert all(layer.post_attention_layernorm.offset_is_set for layer in engine.model.layers)


@pytest.mark.parametrize("fault", ("quantised", "absent", "frozen lam"))
def test_offsets_that_cannot_be_had(fault: str) -> None:
    """No offset and no W_V and W_O to compute it from, or no lam in a buffer: an error that names it."""
    model = converted(learnable_lam=False)
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("variance_offset")}
    dropped = "model.layers.1.self_attn.v_proj.weight"
    if fault == "quantised":
        weights[dropped] = weights[dropped].to(torch.int8)
    elif fault == "absent":
        del weights[dropped]
    else:
        del weights["model.layers.1.input_layernorm.lam"]
    missed = "layers.1.input_layernorm.lam" if "lam" in fault else "layers.1.*variance_offset"
    with pytest.raises(ValueError, match=missed):
        passed(model, weights)


def test_weights_of_a_running_model() -> None:
    """New weights of all layers bring new offsets; one of a layer's sources alone is refused, anything else is not."""
    from bhyt.vllm.weights import Loading

    model = converted()
    engine = passed(model, model.state_dict())
    other = {n: t * 1.5 for n, t in model.state_dict().items() if not n.endswith("variance_offset")}
    for weights in (other, {n: t for n, t in other.items() if ".mlp." in n}):
        watching = Loading(engine)
        fill(engine, dict(watching.watch(weights.items())))
        watching.finish(set(weights), prefix="")
        # c of both matrices, each squared, and lam squared
        torch.testing.assert_close(offsets(engine), [o * 1.5**6 for o in offsets(model)], rtol=1e-5, atol=0)
    for part in ("self_attn.v_proj.weight", "self_attn.o_proj.weight", "input_layernorm.lam"):
        watching = Loading(engine)
        name = f"model.layers.1.{part}"
        fill(engine, dict(watching.watch([(name, other[name])])))
        with pytest.raises(ValueError, match="layers.1.*variance_offset"):
            watching.finish({name}, prefix="")
    with pytest.raises(RuntimeError, match="served"):
        hf.refresh(engine)


def test_what_is_refused() -> None:
    """LoRA on approximate sites, 8-bit folders; not LoRA where there are no offsets."""
    from bhyt.vllm.weights import check_config

    make = lambda **options: hf.BHyTLlamaConfig(**SIZES, seq_len=32, **options)  # noqa: E731
    with pytest.raises(ValueError, match="enable_lora"):
        check_config(make(), lora=True)
    with pytest.raises(ValueError, match="8-bit"):
        check_config(make(bhyt_quantization={"dtype": "int8"}), lora=False)
    for options in ({"norm_type": "bhytstar"}, {"var_approx_exact_layers": 3}):
        check_config(make(**options), lora=True)
    check_config(make(), lora=False)


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
assert registered[config.architectures[0]] == "bhyt.vllm.model:ForCausalLM"
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
