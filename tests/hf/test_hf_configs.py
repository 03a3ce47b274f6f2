"""Folders and configs: what a load lacks or finds, typed fields, code beside a config."""

import importlib
import inspect
from pathlib import Path
from typing import Any, Dict, List, Set

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from support.checks import same_bits
from load_saved import outputs
from support.hf_models import SIZES, converted, hf, ids, stock, transformers
from test_hf_tables import BASES

if transformers.__version__ < "5":
    pytest.skip("transformers 4 has other tables", allow_module_level=True)

from bhyt.hf.families import CLASSES, CONFIGS  # noqa: E402


@pytest.mark.parametrize("options", ({}, {"learnable_lam": False}), ids=str)
def test_numbers_without_a_dimension(options: Dict[str, Any], tmp_path: Path) -> None:
    """Offsets as they were saved before 0.2, a frozen lam as the authors save it: loaded by every way to the same
    bits."""
    model = converted(**options)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    numbers = ("variance_offset", *(() if model.config.learnable_lam else (".lam",)))
    tensors = {n: t.reshape(()) if n.endswith(numbers) else t for n, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    expected, auto = outputs(model, ids()), transformers.AutoModelForCausalLM
    layers = {f"model.layers.{i}": "disk" if i else "cpu" for i in range(3)}
    layers |= {name: "cpu" for name in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")}
    for loaded in (
        auto.from_pretrained(tmp_path), auto.from_pretrained(tmp_path, device_map="cpu"), hf.from_pretrained(tmp_path),
        auto.from_pretrained(tmp_path, device_map=layers, offload_folder=str(tmp_path / "offload")),
    ):  # fmt: skip
        assert same_bits(outputs(loaded, ids()), expected)
        assert {site.variance_offset.shape for site in sites(loaded)} == {(1,)}
    narrow = auto.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    for site, other in zip(sites(narrow), sites(model)):
        assert same_bits(site.variance_offset, other.variance_offset)


def test_a_load_that_lacks_parameters(tmp_path: Path) -> None:
    """Parameters of the layers that no file has are an error, which names them: they would be new."""
    converted().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {n: t for n, t in load_file(file).items() if ".1.mlp." not in n}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        RuntimeError, match=r"its weights lack model.layers.1.mlp.down_proj.weight, .*BHyTLlamaForCausalLM"
    ):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def sites(model: nn.Module) -> List[Any]:
    return [layer.post_attention_layernorm for layer in model.model.layers]


def test_float32_lists_name_what_is_there() -> None:
    """F11: names of buffers in a model's list of what stays float32 are names of buffers that the model has."""
    for options, expected in (({}, {"variance_offset"}), ({"norm_type": "bhytstar"}, set())):
        config = converted(**options).config
        model = transformers.AutoModelForCausalLM.from_config(config)
        listed = {"variance_offset", "weight_scale"} & set(model._keep_in_fp32_modules_strict)
        assert listed == expected


def test_code_before_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F13: what config.save_pretrained pushes to a hub has the code that config.json names."""
    pushed: List[Set[str]] = []

    class Api:
        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return type("Url", (), {"repo_id": repo_id})

        def create_commit(self, operations: Any, **_: Any) -> None:
            pushed.append({operation.path_in_repo for operation in operations})

        def create_branch(self, **_: Any) -> None:
            pass

    for module in (transformers.configuration_utils, transformers.utils.hub):
        monkeypatch.setattr(module, "hf_api", Api, raising=False)
        for name in ("create_commit", "create_branch"):
            monkeypatch.setattr(
                module, name, lambda *args, name=name, **kwargs: getattr(Api(), name)(**kwargs), raising=False
            )
    converted().config.save_pretrained(str(tmp_path), push_to_hub=True, repo_id="me/tiny")
    assert pushed and pushed[-1] >= {"config.json", "modeling_bhyt.py"}


def test_config_is_typed() -> None:
    """F13: fields of the sites are checked as the base's are, and are seen by editors."""
    for wrong in ({"seq_len": "abc"}, {"seq_len": 2.5}, {"input_layer_lam": "2"}, {"learnable_lam": "yes"}):
        with pytest.raises(Exception, match=next(iter(wrong))):
            hf.BHyTLlamaConfig(**SIZES, **wrong)
    with pytest.raises(Exception, match="hidden_size"):
        hf.BHyTLlamaConfig(hidden_size="abc")
    config = hf.BHyTLlamaConfig(**SIZES, seq_len=32, input_layer_lam=3)
    with pytest.raises(Exception, match="seq_len"):
        config.seq_len = "abc"
    mixtral = hf.BHyTMixtralConfig(seq_len=32)
    mixtral.num_experts = 5  # another name of the base's for a field of its own
    assert mixtral.num_local_experts == 5
    with pytest.raises(ValueError, match="seq_len"):
        hf.convert(stock(), seq_len=2.5)
    parameters = inspect.signature(hf.BHyTLlamaConfig).parameters
    assert {"seq_len", "input_layer_lam", "norm_type", "hidden_size"} <= parameters.keys()
    assert hf.BHyTLlamaConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize("base", sorted(BASES))
def test_other_names_of_fields(base: str) -> None:
    """A config is made, and where its base's fields have other names as well, they have here."""
    config = CONFIGS[base]()
    for alias, name in type(config).attribute_map.items():
        value = getattr(config, name)
        setattr(config, alias, value)
        assert alias not in vars(config) and getattr(config, alias) == value


def test_classes_are_plain() -> None:
    """Each class of a family is where its name says, so that it pickles and can be looked up."""
    for name, made in CLASSES.items():
        assert (
            getattr(importlib.import_module(made.__module__), made.__qualname__) is made and getattr(hf, name) is made
        )
    layer = type(converted().model.layers[0])
    assert getattr(importlib.import_module(layer.__module__), layer.__qualname__) is layer
    assert layer.__name__ == "LlamaDecoderLayer"


def test_somebody_elses_class() -> None:
    """A model class derived from one of a family converts too, with its own methods."""

    class Mine(transformers.LlamaForCausalLM):
        def answer(self) -> int:
            return 42

    model = Mine(stock().config)
    hf.convert(model, seq_len=32)
    assert isinstance(model, Mine) and model.answer() == 42 and type(model).__name__ == "BHyTMine"
    assert type(model.model) is hf.BHyTLlamaModel
