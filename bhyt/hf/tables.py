"""Tables that transformers and PEFT look up by a model's type or class name: a BHyT family has its base's entries.

The rule: every table (dictionary, list or set) of the modules below that has an entry for the base's model type gets
the same entry for BHyT's model type; names and classes of models become BHyT's. tests/hf/test_hf_tables.py walks the
installed versions.
"""

import sys
from typing import Any, Dict, List

from transformers import AutoConfig
from transformers.models import auto
from transformers.models.auto import configuration_auto, modeling_auto, tokenization_auto

try:  # transformers 5
    from transformers import conversion_mapping
    from transformers.core_model_loading import ConversionOps, WeightConverter
except ImportError:
    conversion_mapping, ConversionOps, WeightConverter = None, object, None

# Modules whose tables are keyed by model type. Those that are not imported yet are extended when they are needed.
MODULES = (
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.cli.serving.utils",
    "peft.utils.constants",
    "peft.utils.transformers_weight_conversion",
    "peft.tuners.adaption_prompt.config",
    "accelerate.utils.dataclasses",
)
# Tables in them that BHyT is left out of, and why.
LEFT_OUT = {
    "CONFIG_MAPPING_NAMES": "names modules of transformers; AutoConfig.register has an entry of its own",
    "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS": "is about the base's repositories on the hub; a BHyT folder names"
    " its own",
    "MODEL_FOR_DECISION_MAPPING_NAMES": "another model's head, of which BHyT has no class",
}
_families: Dict[str, Any] = {}  # base's model type -> the BHyT config
_extended: List[str] = []


def base_type(config: Any) -> str:
    """The model type of a BHyT config's base.

    Args:
        config: a BHyT config class.

    Returns:
        Such as "llama".
    """
    name: str = config.model_type
    return name.removeprefix("bhyt_")


def class_names(config: Any) -> Dict[str, str]:
    """The names of a family's classes.

    Args:
        config: the family's config class.

    Returns:
        For the name of each Auto class the name of the family's class.
    """
    names = {"AutoConfig": config.__name__}
    for auto_class in _auto_classes():
        found = auto_class._model_mapping._model_mapping.get(base_type(config))
        if isinstance(found, str) and not _is_left_out(auto_class):
            names[auto_class.__name__] = f"BHyT{found}"
    return names


def _auto_classes() -> List[Any]:
    classes = [value for name, value in vars(modeling_auto).items() if name.startswith("AutoModel")]
    return [made for made in classes if getattr(made, "_model_mapping", None) is not None]


def _is_left_out(auto_class: Any) -> bool:
    names = auto_class._model_mapping._model_mapping
    return any(value is names for name, value in vars(modeling_auto).items() if name in LEFT_OUT)


def register(config: Any, classes: Dict[str, Any]) -> None:
    """Make a family known to transformers.

    Args:
        config: its config class.
        classes: its classes by name.
    """
    base = base_type(config)
    base_config = configuration_auto.CONFIG_MAPPING[base]
    _families[base] = config
    AutoConfig.register(config.model_type, config, exist_ok=True)
    tokenizers = tokenization_auto.TOKENIZER_MAPPING
    if base_config in tokenizers:
        tokenizers.register(config, tokenizers[base_config], exist_ok=True)
    for name, class_name in class_names(config).items():
        if name != "AutoConfig":
            getattr(auto, name).register(config, classes[class_name], exist_ok=True)
    if conversion_mapping is not None:
        conversions = conversion_mapping.get_checkpoint_conversion_mapping(base) or []
        conversion_mapping.register_checkpoint_conversion_mapping(
            config.model_type, [*conversions, *_numbers()], overwrite=True
        )


def extend_imported() -> None:
    """Extend the tables of modules that have been imported since the last look."""
    for name in MODULES:
        module = sys.modules.get(name)
        if module is None or name in _extended:
            continue
        _extended.append(name)
        if hasattr(module, "MODEL_CONFIGS_TO_MEGATRON_PARSERS"):
            _refuse_megatron(module.MODEL_CONFIGS_TO_MEGATRON_PARSERS)
        for table_name, table in vars(module).items():
            if table_name not in LEFT_OUT:
                for base, config in _families.items():
                    _extend(table, base, config.model_type)


def _refuse_megatron(parsers: Dict[str, Any]) -> None:
    """accelerate takes the first of these names that a model type contains, and would build Megatron's own Llama."""

    def refuse(plugin: Any, model: Any, batch: Any) -> None:
        raise NotImplementedError(f"model: Megatron-LM has no {model.config.model_type}, and would train another model")

    others = dict(parsers)
    parsers.clear()
    parsers.update({"bhyt_": refuse} | others)


def _extend(table: Any, base: str, ours: str) -> None:
    if isinstance(table, dict):
        for key in [key for key in table if key == base or isinstance(key, tuple) and base in key]:
            table.setdefault(ours if key == base else (ours,), _renamed(table[key], base))
    elif isinstance(table, set) and base in table:
        table.add(ours)
    elif isinstance(table, list) and base in table and ours not in table:
        table.append(ours)


def _renamed(entry: Any, base: str) -> Any:
    """The name of a BHyT class for that of a class of the base's family; everything else as it is."""
    config = _families[base]
    ours = set(class_names(config).values())
    return f"BHyT{entry}" if isinstance(entry, str) and f"BHyT{entry}" in ours else entry


class _OneDimension(ConversionOps):  # type: ignore[misc]
    """A number that was saved without a dimension: offsets before 0.2, the authors' frozen lam."""

    def convert(self, input_dict: Dict[str, Any], *args: Any, **kwargs: Any) -> Dict[str, Any]:
        tensors = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        return {name: tensor if tensor.dim() else tensor.reshape(1) for name, tensor in tensors.items()}

    @property
    def reverse_op(self) -> "_OneDimension":
        return self


def _numbers() -> List[Any]:
    return [WeightConverter(name, name, operations=[_OneDimension()]) for name in ("variance_offset", "norm.lam")]
