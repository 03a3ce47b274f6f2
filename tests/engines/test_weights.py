"""Weights that pass by on their way into an engine's model, and what the plugin refuses; no engine is needed."""

from types import SimpleNamespace
from typing import Any, Callable, Dict, Iterator, List, Set, Tuple

import pytest
import torch
from torch import Tensor, nn

from support.checks import same_bits
from support.hf_models import SIZES, converted, hf, ids
from support.packages import needs
from test_serving import built_empty, fill

transformers = needs("transformers")
SOURCES = ("v_proj.weight", "o_proj.weight", "input_layernorm.lam")


class Puts:
    """An engine's loader."""

    def load_weights(self, weights: Any) -> Set[str]:
        found = dict(weights)
        fill(self, found)
        return set(found)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


def engine_of(model: nn.Module) -> Any:
    """A model without weights, in an engine."""
    from bhyt.vllm.weights import LoadsOffsets, keep_loaded

    engine = built_empty(model)
    keep_loaded(engine)
    engine.__class__ = type("Engine", (LoadsOffsets, Puts, type(engine)), {})
    return engine


def send(engine: Any, weights: Dict[str, Tensor]) -> None:
    engine.load_weights(weights.items())


def passed(model: nn.Module, weights: Dict[str, Tensor]) -> Any:
    engine = engine_of(model)
    send(engine, weights)
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
    """No offset and not all of what it is computed from, or no lam in a buffer: an error that names it."""
    model = converted(learnable_lam=False)
    weights = dict(model.state_dict())
    for name in list(weights) if fault != "frozen lam" else ():
        if name.endswith("variance_offset"):
            del weights[name]
    dropped = "model.layers.1.self_attn.v_proj.weight"
    if fault == "quantised":
        weights[dropped] = weights[dropped].to(torch.int8)
    elif fault == "absent":
        del weights[dropped]
    else:
        del weights["model.layers.1.input_layernorm.lam"]
    missed = "layers.1.input_layernorm.lam is not" if fault == "frozen lam" else "layers.1.*variance_offset is not"
    with pytest.raises(ValueError, match=missed):
        passed(model, weights)


def test_weights_of_a_running_model() -> None:
    """New weights of all layers bring new offsets, with and without offsets among them; what is none of an offset's
    sources leaves it; any order of the weights will do."""
    model = converted()
    engine = passed(model, model.state_dict())
    other = {name: tensor * 1.5 for name, tensor in model.state_dict().items()}
    without = {name: tensor for name, tensor in other.items() if not name.endswith("variance_offset")}
    rest = {name: tensor for name, tensor in without.items() if ".mlp." in name}
    for weights, factor in ((without, 1.5**6), (rest, 1.5**6), (other, 1.5), (reordered(without), 1.5**6)):
        send(engine, weights)
        # c of both matrices, each squared, and lam squared
        torch.testing.assert_close(offsets(engine), [o * factor for o in offsets(model)], rtol=1e-5, atol=0)
    with pytest.raises(RuntimeError, match="served"):
        hf.refresh(engine)


@pytest.mark.parametrize("part", ("self_attn.v_proj.weight", "self_attn.o_proj.weight", "input_layernorm.lam"))
def test_a_part_of_the_weights(part: str) -> None:
    """RL's weights, sent one by one: one that an offset is computed of is refused, and the model does not run until it
    has offsets again."""
    model = converted()
    engine = passed(model, model.state_dict()).eval()
    expected = engine(ids()).logits
    name = f"model.layers.1.{part}"
    with pytest.raises(ValueError, match="layers.1.*variance_offset"):
        send(engine, {name: model.state_dict()[name]})
    with pytest.raises(RuntimeError, match="some of its new weights only"):
        engine(ids())
    with pytest.raises(ValueError, match="layers.0.*variance_offset"):
        send(engine, {"model.norm.weight": model.state_dict()["model.norm.weight"]})
    send(engine, model.state_dict())
    assert same_bits(engine(ids()).logits, expected)


def test_weights_that_end_early() -> None:
    """Whoever loads fails half-way: the model does not run."""
    model = converted()
    engine = passed(model, model.state_dict()).eval()

    def half() -> Iterator[Tuple[str, Tensor]]:
        yield from list(model.state_dict().items())[:9]
        raise OSError("lost")

    with pytest.raises(OSError):
        engine.load_weights(half())
    for call in (engine, engine.compute_logits):
        with pytest.raises(RuntimeError, match="some of its new weights only"):
            call(ids())


def test_weights_of_the_inner_model() -> None:
    """An engine's decoder has a loader of its own: called by the one around it, or alone, it brings offsets once."""
    model = converted()
    engine = passed(model, model.state_dict())
    calls: List[Set[str]] = []

    def inner(weights: Any) -> Set[str]:
        found = dict(weights)
        fill(engine.model, found)
        calls.append(set(found))
        return set(found)

    def outer(weights: Any) -> Set[str]:
        within = ((name.removeprefix("model."), tensor) for name, tensor in weights if name.startswith("model."))
        return {f"model.{name}" for name in engine.load_by(inner, within, prefix="")}

    other = {name: t * 1.5 for name, t in model.state_dict().items() if not name.endswith("variance_offset")}
    for load, prefix in ((outer, "model."), (inner, "")):
        send(engine, model.state_dict())
        names = other if load is outer else [name for name in other if name.startswith("model.")]
        engine.load_by(load, ((n if prefix else n.removeprefix("model."), other[n]) for n in names), prefix=prefix)
        torch.testing.assert_close(offsets(engine), [o * 1.5**6 for o in offsets(model)], rtol=1e-5, atol=0)
    assert calls[0] == calls[1]


WRITES: Dict[str, Callable[[Any, str, Tensor], Any]] = {
    "copied": lambda module, name, tensor: getattr(module, name).copy_(tensor),
    "replaced": lambda module, name, tensor: setattr(module, name, nn.Parameter(tensor)),
}


@pytest.mark.parametrize("way", WRITES)
@pytest.mark.parametrize("part", ("self_attn.v_proj.weight", "self_attn.o_proj.weight", "input_layernorm.lam"))
def test_weights_written_past_the_offsets(part: str, way: str) -> None:
    """A weight of which an offset is computed, written where it lies: the next answer is an error, also where a graph
    ran in place of the model, until all weights have been loaded. Other weights may be written."""
    model = converted()
    engine = passed(model, model.state_dict()).eval()
    with torch.inference_mode():
        expected = engine(ids()).logits
        engine.compute_logits(ids())
        module, _, name = f"model.layers.1.{part}".rpartition(".")
        engine.get_submodule("model.layers.1.mlp.up_proj").weight.copy_(model.model.layers[1].mlp.up_proj.weight)
        assert same_bits(engine(ids()).logits, expected) and engine.compute_logits(ids()) is not None
        place = engine.get_submodule(module)
    with torch.no_grad():
        WRITES[way](place, name, getattr(place, name).clone())
    for call in (engine.compute_logits, engine):
        with pytest.raises(RuntimeError, match="as they lie in the engine"):
            call(ids())
    send(engine, {n: t for n, t in model.state_dict().items() if ".mlp." in n})
    with pytest.raises(RuntimeError, match="as they lie in the engine"):
        engine(ids())
    send(engine, model.state_dict())
    with torch.no_grad():
        assert same_bits(engine(ids()).logits, expected)


@pytest.mark.parametrize("offset", (False, True))
def test_sparse_patches(offset: bool) -> None:
    """NaN in a weight, which is how vLLM's sparse patches say that nothing changes, gives no offset: an error, unless
    the offset comes along."""
    model = converted()
    engine = passed(model, model.state_dict()).eval()
    patch = {n: t for n, t in model.state_dict().items() if "layers.1." in n and n.endswith(SOURCES)}
    patch["model.layers.1.self_attn.v_proj.weight"] = torch.full((32, 64), float("nan"))
    if offset:
        patch["model.layers.1.post_attention_layernorm.variance_offset"] = torch.tensor([0.5])
        send(engine, patch)
        assert offsets(engine)[1] == 0.5
    else:
        with pytest.raises(ValueError, match="NaN in v_proj, o_proj or lam of layer 1"):
            send(engine, patch)


@pytest.mark.parametrize("norm_type", ("bhyt", "bhytstar"))
def test_half_a_site(norm_type: str) -> None:
    """vLLM loads a module anew as a whole, into memory that holds nothing: a site of which it is given a part is an
    error when the model runs, unless the rest follows."""
    model = converted(norm_type=norm_type, learnable_lam=False)
    engine = passed(model, model.state_dict()).eval()
    site, name = engine.model.layers[1].input_layernorm, "layers.1.input_layernorm"
    lam = site.lam
    for sent in ("weight", "lam"):
        site._buffers["lam"] = lam.to("meta")  # as the engine has it while it loads
        engine.changes.sent({f"{name}.{sent}"}, prefix="")
        site._buffers["lam"] = lam
        if sent == "weight":
            with pytest.raises(RuntimeError, match=f"{name}.lam was not sent with the rest of {name}"):
                engine(ids())
    with torch.no_grad():
        assert same_bits(engine(ids()).logits, model(ids()).logits)


def test_memory_used_again() -> None:
    """A loader may put the next tensor where the last one was."""
    model = converted()
    memory: Dict[Any, Tensor] = {}

    def stream() -> Iterator[Tuple[str, Tensor]]:
        for name, tensor in model.state_dict().items():
            if not name.endswith("variance_offset"):
                yield name, memory.setdefault(tensor.shape, torch.empty_like(tensor)).copy_(tensor)

    from bhyt.vllm.weights import Loading

    engine = engine_of(model)
    watched = Loading(engine.model, engine.changes).watch(stream())
    found = {name: tensor.clone() for name, tensor in watched}
    torch.testing.assert_close([t for n, t in found.items() if n.endswith("variance_offset")], offsets(model))


@pytest.mark.parametrize("asked", ("enable_lora", "quantization", "load_format", "weight_transfer_config"))
def test_what_is_refused(asked: str) -> None:
    """What moves or makes up offsets is refused by name where a layer has one, and only there."""
    from bhyt.vllm.weights import check_config

    def make(asked: str = "", **options: Any) -> Any:
        """As much of vLLM's config as is looked at."""
        return SimpleNamespace(
            model_config=SimpleNamespace(hf_config=hf.BHyTLlamaConfig(**SIZES, seq_len=32, **options)),
            lora_config=object() if asked == "enable_lora" else None,
            quant_config=object() if asked == "quantization" else None,
            load_config=SimpleNamespace(load_format="dummy" if asked == "load_format" else "auto"),
            weight_transfer_config=SimpleNamespace(backend="nccl_m2n" if asked == "weight_transfer_config" else "nccl"),
        )

    with pytest.raises(ValueError, match=f"^{asked}: "):
        check_config(make(asked))
    check_config(make())
    for options in ({"norm_type": "bhytstar"}, {"var_approx_exact_layers": 3}):
        check_config(make(asked, **options))
    with pytest.raises(ValueError, match="8-bit"):
        check_config(make(bhyt_quantization={"dtype": "int8"}))
