"""Who a model says it is: whatever transformers, PEFT, TRL and accelerate look up by model type or class name has BHyT's
names where it has the base's. ECOSYSTEM rows F1, F2, F11 and F13 are examples; each test is of the kind."""

import ast
import copy
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Set

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from checks import same_bits
from load_saved import outputs
from test_hf import SIZES, converted, hf, ids, stock, transformers

if transformers.__version__ < "5":
    pytest.skip("transformers 4 has other tables", allow_module_level=True)

from bhyt.hf import tables  # noqa: E402
from bhyt.hf.families import CLASSES, CONFIGS  # noqa: E402

BASES = set(CONFIGS)
BASE_CLASSES = {name.removeprefix("BHyT") for name in CLASSES}

# Places that name a base's model type or class, and are no tables that a BHyT model is looked up in.
NO_TABLE = {
    "transformers/cli/chat.py": "an example text",
    "transformers/conversion_mapping.py": "read through register_checkpoint_conversion_mapping",
    "transformers/integrations/ggml.py": "GGUF files name plain architectures: they have no sites",
    "transformers/integrations/gguf/gguf_tokenizer_mapping.py": "as above",
    "transformers/modeling_gguf_pytorch_utils.py": "as above",
    "transformers/models/auto/auto_mappings.py": "names modules of transformers; AutoConfig.register has its own entry",
    "transformers/models/auto/configuration_auto.py": "as above",
    "transformers/tokenization_mistral_common.py": "a file format",
    "transformers/tokenization_utils_tokenizers.py": "tokenizers saved by transformers 4 for a plain Mistral",
    "peft/peft_model.py": "for transformers before 4.38",
    "peft/tuners/tuners_utils.py": "a local variable, set by the names of attributes",
}


def places(package: str) -> Iterator[str]:
    """The files of an installed package with a base's model type or class name in a string, models' own code aside."""
    folder = Path(importlib.import_module(package).__file__).parent
    for file in sorted(folder.rglob("*.py")):
        name = f"{package}/{file.relative_to(folder).as_posix()}"
        if "/models/" in name and "/auto/" not in name:
            continue
        text = file.read_text(errors="ignore")
        if any(f'"{base}"' in text or f"'{base}'" in text for base in BASES | BASE_CLASSES):
            constants = {node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)}
            if any(isinstance(value, str) and value in BASES | BASE_CLASSES for value in constants):
                yield name


@pytest.mark.parametrize("package", ("transformers", "peft", "trl", "accelerate"))
def test_every_table(package: str) -> None:
    """Each place that names a base is a module whose tables are extended, or is known to be none; and no entry of a base
    is missing for BHyT's name in these modules."""
    pytest.importorskip(package)
    extended = {module.replace(".", "/") + ".py": module for module in tables.MODULES}
    found = list(places(package))
    assert [name for name in found if name not in extended and name not in NO_TABLE] == []
    for name in (name for name in found if name in extended):
        module = importlib.import_module(extended[name])
        CONFIGS["llama"]().to_dict()  # as PEFT asks for it
        missing = [
            (table, base)
            for table, value in vars(module).items() for base in BASES
            if table not in tables.LEFT_OUT and names_of(value, base) and not names_of(value, f"bhyt_{base}")
        ]  # fmt: skip
        assert missing == [], name


def names_of(table: Any, model_type: str) -> bool:
    if isinstance(table, (dict, set, list)):
        return any(key == model_type or isinstance(key, tuple) and model_type in key for key in table)
    return False


def test_what_is_left_out_is_there() -> None:
    """A reason for a table that is gone would hide the next one of its name."""
    modules = [importlib.import_module(name) for name in tables.MODULES[:2]]
    modules.append(transformers.models.auto.configuration_auto)
    for table in tables.LEFT_OUT:
        assert any(hasattr(module, table) for module in modules), table
    assert not set(NO_TABLE) & {module.replace(".", "/") + ".py" for module in tables.MODULES}


@pytest.mark.parametrize("base", sorted(BASES))
def test_every_auto_class(base: str) -> None:
    """Each Auto class that has the base's config gives BHyT's class for BHyT's, by class and by name; TP, PP and EP plans
    and the tokenizer are the base's."""
    from transformers.models.auto import configuration_auto, tokenization_auto

    ours, theirs = CONFIGS[base], configuration_auto.CONFIG_MAPPING[base]
    autos = [auto for auto in tables._auto_classes() if theirs in auto._model_mapping and not tables._is_left_out(auto)]
    assert len(autos) >= 2
    for auto in autos:
        model = auto._model_mapping[ours]
        assert model is CLASSES[f"BHyT{auto._model_mapping[theirs].__name__}"] and model.config_class is ours
        assert auto._model_mapping._model_mapping[ours.model_type] == model.__name__
    assert tables.class_names(ours).items() >= {auto.__name__: auto._model_mapping[ours].__name__ for auto in autos}.items()
    for plan in ("base_model_tp_plan", "base_model_pp_plan", "base_model_ep_plan", "attribute_map"):
        assert getattr(ours, plan, None) == getattr(theirs, plan, None)
    tokenizers = tokenization_auto.TOKENIZER_MAPPING
    assert (ours in tokenizers) == (theirs in tokenizers)
    assert ours not in tokenizers or tokenizers[ours] == tokenizers[theirs]


def test_label_smoothing(tmp_path: Path) -> None:
    """F2: Trainer shifts the labels, as it does for Llama: its loss is that of the next token."""
    model = converted().train()
    arguments = transformers.TrainingArguments(
        str(tmp_path), label_smoothing_factor=0.1, report_to=[], use_cpu=True, per_device_train_batch_size=2
    )
    trainer = transformers.Trainer(model=model, args=arguments)
    tokens = ids()
    loss = trainer.compute_loss(model, {"input_ids": tokens, "labels": tokens})
    logits = model(tokens).logits[:, :-1]
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), label_smoothing=0.1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_peft_in_any_order(tmp_path: Path) -> None:
    """Default target modules of LoRA, IA3 and others are the base's, whether PEFT is imported before the model is made or
    after it."""
    pytest.importorskip("peft")
    code = (
        "import sys\n"
        "import bhyt.hf as hf\n"
        f"config = hf.BHyTMistralConfig(**{SIZES!r}, seq_len=32)\n"
        "model = hf.BHyTMistralForCausalLM(config)\n"
        "assert 'peft' not in sys.modules\n"
        "import peft\n"
        "tuned = peft.get_peft_model(model, peft.LoraConfig(r=2))\n"
        "print(*sorted({n.split('.')[-4] for n, _ in tuned.named_parameters() if 'lora_A' in n}))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split() == ["q_proj", "v_proj"]

    import peft

    for config in (peft.IA3Config(), peft.LoHaConfig(r=2), peft.VeraConfig(r=2), peft.AdaptionPromptConfig(
        adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM")):  # fmt: skip
        plain = peft.get_peft_model(stock(), copy.deepcopy(config))
        ours = peft.get_peft_model(converted(), copy.deepcopy(config))
        trained = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (plain, ours)]
        assert trained[0] and trained[0] == trained[1], config


# Mixtures of experts

EXPERTS: Dict[str, Dict[str, Any]] = {
    "Mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "Qwen3Moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1),
    "Olmoe": dict(num_experts=4, num_experts_per_tok=2, num_key_value_heads=4),
}


def test_every_mixture_is_tried() -> None:
    """The families that transformers converts when it loads them."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    mixtures = {base for base in BASES if get_checkpoint_conversion_mapping(base)}
    assert {CONFIGS[base].__name__ for base in mixtures} == {f"BHyT{family}Config" for family in EXPERTS}


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_are_kept(family: str, tmp_path: Path) -> None:
    """F1: converted, saved and loaded; converted after a load; in the layout of transformers 4 (experts apart), in that of
    5 (experts in one tensor) and in the authors' (a plain model type): the same bits, and nothing missing."""
    plain = stock(family, **EXPERTS[family])
    plain.save_pretrained(tmp_path / "plain")
    loaded_plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    fresh = stock(family, **EXPERTS[family])
    for model in (fresh, loaded_plain):
        hf.convert(model, seq_len=32)
    expected = outputs(fresh, ids())
    assert same_bits(outputs(loaded_plain, ids()), expected)

    fresh.save_pretrained(tmp_path / "fresh")
    loaded_plain.save_pretrained(tmp_path / "after a load")
    fresh.save_pretrained(tmp_path / "fused", save_original_format=False)
    transformers.Trainer(model=fresh, args=transformers.TrainingArguments(
        str(tmp_path / "run"), report_to=[], use_cpu=True)).save_model(str(tmp_path / "trainer"))  # fmt: skip
    assert loaded_plain.config.model_type == f"bhyt_{plain.config.model_type}"
    keys = {folder: set(load_file(tmp_path / folder / "model.safetensors")) for folder in ("fresh", "fused", "after a load")}
    assert keys["after a load"] == keys["fresh"]
    assert any(".experts.3." in key for key in keys["fresh"]) and not any(".experts.3." in key for key in keys["fused"])
    for folder in ("fresh", "after a load", "fused", "trainer"):
        model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"], folder
        assert same_bits(outputs(model, ids()), expected), folder

    config = json.loads((tmp_path / "fresh" / "config.json").read_text())
    del config["auto_map"]
    config["model_type"] = config["model_type"].removeprefix("bhyt_")
    (tmp_path / "fresh" / "config.json").write_text(json.dumps(config))
    assert same_bits(outputs(hf.from_pretrained(tmp_path / "fresh"), ids()), expected)


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_train_on(family: str, tmp_path: Path) -> None:
    """A Trainer's run that is resumed from a checkpoint gives the bits of one that was not stopped."""
    rows = [dict(input_ids=row, labels=row) for row in ids(batch=8)]

    def run(model: nn.Module, **options: Any) -> nn.Module:
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=4, save_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
            disable_tqdm=True, learning_rate=1e-2, seed=1,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[hf.refresh_callback(2)])
        trainer.train(**options)
        return model

    whole = stock(family, **EXPERTS[family])
    hf.convert(whole, seq_len=32)
    run(whole)
    checkpoint = tmp_path / "checkpoint-2"
    resumed = run(transformers.AutoModelForCausalLM.from_pretrained(checkpoint), resume_from_checkpoint=str(checkpoint))
    for (name, tensor), other in zip(whole.state_dict().items(), resumed.state_dict().values()):
        assert same_bits(tensor, other), name


def test_megatron_is_refused() -> None:
    """accelerate would train Megatron-LM's Llama in the place of a model whose type contains "llama"."""
    dataclasses = pytest.importorskip("accelerate.utils.dataclasses")
    config = hf.BHyTLlamaConfig(**SIZES, seq_len=32)
    config.to_dict()
    first = next(p for name, p in dataclasses.MODEL_CONFIGS_TO_MEGATRON_PARSERS.items() if name in config.model_type)
    with pytest.raises(NotImplementedError, match="Megatron-LM has no bhyt_llama"):
        first(None, hf.BHyTLlamaForCausalLM(config), None)


# Folders and configs


@pytest.mark.parametrize("options", ({}, {"learnable_lam": False}), ids=str)
def test_numbers_without_a_dimension(options: Dict[str, Any], tmp_path: Path) -> None:
    """Offsets as they were saved before 0.2, a frozen lam as the authors save it: loaded by every way to the same bits."""
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
    with pytest.raises(RuntimeError, match=r"its weights lack model.layers.1.mlp.down_proj.weight, .*BHyTLlamaForCausalLM"):
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
            monkeypatch.setattr(module, name, lambda *args, name=name, **kwargs: getattr(Api(), name)(**kwargs), raising=False)
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
        assert getattr(importlib.import_module(made.__module__), made.__qualname__) is made and getattr(hf, name) is made
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


