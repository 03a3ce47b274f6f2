"""transformers' own model tests on the BHyT classes, beside the plain ones (by hand; tests/README.md has the command).

    python tests/hf/hf_model_tests.py FOLDER [FAMILY ..]

FOLDER is `tests` of the sdist of the installed transformers. Prints each test that passes for the plain model and fails
or is skipped for the BHyT one; exits 1 if there is one that is not in EXCEPTIONS. Needs `parameterized`.
"""

import importlib
import io
import sys
import types
import unittest
from pathlib import Path
from typing import Any, Dict, Tuple

import torch
import transformers

import bhyt.hf as hf

FAMILIES = ("Llama", "Qwen3", "Mixtral", "Olmoe")
HEADS = ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
EXCEPTIONS = {  # test -> why it need not hold
    "test_init_weights_can_init_buffers": "offsets follow from weights, which differ in the two models compared",
    "test_model_weights_reload_no_missing_tied_weights": "loads files without weights; a BHyT model raises",
    "test_can_init_all_missing_weights": "is run for models that transformers lists by the file of their class",
    "test_moe_models_record_router_logits": "reads the source of a class's module; the outputs are the base's",
}
PACKAGE = "transformers_tests"


def load(folder: Path) -> Dict[str, Any]:
    """The mixins of the sdist, which lacks the folders that some of them import from: their classes are empty here."""
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(folder)]
    sys.modules[PACKAGE] = package
    for module, name in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
    ):
        stub = types.ModuleType(f"{PACKAGE}.{module}")
        setattr(stub, name, type(name, (), {}))
        parent = types.ModuleType(f"{PACKAGE}.{module.split('.')[0]}")
        parent.__path__ = []
        sys.modules |= {parent.__name__: parent, stub.__name__: stub}
    mixins = {}
    for module, name in (("test_modeling_common", "ModelTesterMixin"), ("test_training_mixin", "TrainingTesterMixin")):
        mixins[name] = getattr(importlib.import_module(f"{PACKAGE}.{module}"), name)
    return mixins


class Tester:
    """What the mixins ask for: a small config and a batch."""

    def __init__(self, parent: Any, config_class: Any, sites: Dict[str, Any]) -> None:
        self.parent, self.config_class, self._sites = parent, config_class, sites
        self.batch_size, self.seq_length, self.is_training = 2, 7, True
        self.num_hidden_layers, self.hidden_size, self.num_attention_heads = 2, 32, 4
        self.vocab_size, self.num_labels = 99, 3

    def get_config(self) -> Any:
        return self.config_class(
            vocab_size=self.vocab_size, hidden_size=self.hidden_size, intermediate_size=37, head_dim=8,
            num_hidden_layers=self.num_hidden_layers, num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            num_labels=self.num_labels, **self._sites, **self._experts(),
        )  # fmt: skip

    def _experts(self) -> Dict[str, Any]:
        if "Mixtral" in self.config_class.__name__:
            return dict(num_local_experts=4, num_experts_per_tok=2)
        return dict(num_experts=4, num_experts_per_tok=2) if "Olmoe" in self.config_class.__name__ else {}

    def prepare_config_and_inputs_for_common(self) -> Tuple[Any, Dict[str, Any]]:
        ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def case(mixins: Dict[str, Any], family: str, ours: bool) -> Any:
    source, prefix = (hf, "BHyT") if ours else (transformers, "")
    config = getattr(source, f"{prefix}{family}Config")
    models = tuple(m for head in HEADS if (m := getattr(source, f"{prefix}{family}{head}", None)) is not None)

    def set_up(self: Any) -> None:
        self.model_tester = Tester(self, config, {"seq_len": 7} if ours else {})

    attributes = {"all_model_classes": models, "setUp": set_up, "causal_lm_class": models[1]}
    return type(f"{prefix}{family}Test", (*mixins.values(), unittest.TestCase), attributes)


def outcomes(test_case: Any) -> Dict[str, str]:
    """Test -> "passed", or why not."""
    result = unittest.TextTestRunner(stream=io.StringIO()).run(
        unittest.defaultTestLoader.loadTestsFromTestCase(test_case)
    )
    names = unittest.defaultTestLoader.getTestCaseNames(test_case)
    found = dict.fromkeys(names, "passed")
    for kind, entries in (("skipped", result.skipped), ("failed", result.failures), ("failed", result.errors)):
        for test, text in entries:
            name = getattr(test, "_testMethodName", None) or getattr(test, "test_case")._testMethodName  # of a subtest
            found[name] = f"{kind}: {text.strip().splitlines()[-1]}"
    return found


def main(folder: str, *families: str) -> int:
    mixins, wrong = load(Path(folder).resolve()), []  # type: Dict[str, Any], List[str]
    for family in families or FAMILIES:
        plain, ours = (outcomes(case(mixins, family, which)) for which in (False, True))
        passed = [name for name, outcome in plain.items() if outcome == "passed"]
        worse = [name for name in passed if ours[name] != "passed"]
        print(
            f"{family}: {len(passed)} of {len(plain)} pass for the plain model,"
            f" {len(passed) - len(worse)} of these for BHyT"
        )
        for name in worse:
            print(f"  {name}: {EXCEPTIONS.get(name) or ours[name]}")
        wrong += [name for name in worse if name not in EXCEPTIONS]
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
