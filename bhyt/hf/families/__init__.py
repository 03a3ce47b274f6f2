"""A file for each family: its config, its layer and its models, each in front of the class of `transformers`.

A family has decoder layers of `input_layernorm`, `self_attn`, `post_attention_layernorm` and `mlp`, in this order, with
plain residual adds around attention and MLP.
"""

from typing import Any, Dict

from bhyt.hf import tables
from bhyt.hf.config import BHyTConfigMixin
from bhyt.hf.families import (
    diffllama, glm, granite, helium, llama, mistral, mixtral, olmoe, phi3, qwen2, qwen3, qwen3_moe,
)  # fmt: skip

_MODULES = (llama, mistral, qwen2, qwen3, mixtral, qwen3_moe, olmoe, granite, helium, glm, phi3, diffllama)
CONFIGS: Dict[str, Any] = {}  # base's model type -> BHyT config
CLASSES: Dict[str, Any] = {}  # by name
for _module in _MODULES:
    _classes = {name: value for name, value in vars(_module).items() if name.startswith("BHyT") and "Mixin" not in name}
    (_config,) = [value for value in _classes.values() if issubclass(value, BHyTConfigMixin)]
    CONFIGS[tables.base_type(_config)] = _config
    CLASSES |= _classes
    tables.register(_config, _classes)
tables.extend_imported()
FAMILIES = tuple(CONFIGS)


def config_class(model_type: str) -> Any:
    """The config class of bhyt_{model_type}.

    Args:
        model_type: of the base, such as "llama".

    Returns:
        The class.

    Raises:
        ValueError: the model type has none.
    """
    if model_type not in CONFIGS:
        raise ValueError(
            f"model: {model_type!r} has no BHyT model type, so that it could not be saved and loaded as what it is;"
            f" those are {', '.join(FAMILIES)}"
        )
    return CONFIGS[model_type]
