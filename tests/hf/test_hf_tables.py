"""Who a model says it is: whatever transformers, PEFT, TRL and accelerate look up by model type or class name has
BHyT's names where it has the base's. ECOSYSTEM rows F1, F2, F11 and F13 are examples; each test is of the kind."""

import ast
import copy
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any, Iterator

import pytest
from torch import nn

from support.hf_models import SIZES, converted, ids, stock, transformers
from support.packages import needs

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
    """Each place that names a base is a module whose tables are extended, or is known to be none; and no entry of a
    base is missing for BHyT's name in these modules."""
    needs(package)
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
    """Each Auto class that has the base's config gives BHyT's class for BHyT's, by class and by name; TP, PP and EP
    plans and the tokenizer are the base's."""
    from transformers.models.auto import configuration_auto, tokenization_auto

    ours, theirs = CONFIGS[base], configuration_auto.CONFIG_MAPPING[base]
    autos = [auto for auto in tables._auto_classes() if theirs in auto._model_mapping and not tables._is_left_out(auto)]
    assert len(autos) >= 2
    for auto in autos:
        model = auto._model_mapping[ours]
        assert model is CLASSES[f"BHyT{auto._model_mapping[theirs].__name__}"] and model.config_class is ours
        assert auto._model_mapping._model_mapping[ours.model_type] == model.__name__
    assert (
        tables.class_names(ours).items()
        >= {auto.__name__: auto._model_mapping[ours].__name__ for auto in autos}.items()
    )
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
    """Default target modules of LoRA, IA3 and others are the base's, whether PEFT is imported before the model is made
    or after it."""
    needs("peft")
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
