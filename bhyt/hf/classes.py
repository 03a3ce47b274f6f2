"""Model types of their own: a config and the model classes of each, registered with the Auto classes.

`bhyt_llama` is to `llama` what `BHyTLlamaForCausalLM` is to `LlamaForCausalLM`: the same class, whose norms become
sites when it is built. All loading is done by `transformers`.
"""

import functools
import math
from dataclasses import fields
from pathlib import Path
from typing import Any, Dict, List

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel, modeling_utils
from transformers.models.auto import configuration_auto, modeling_auto, tokenization_auto

from bhyt.hf.layer import ConvertedLayer
from bhyt.hf.projections import active_site
from bhyt.hf.sites import Plan, SiteFields
from bhyt.modules import BHyT, BHyTApprox
from bhyt.quantization import quantized_as

# Model types of transformers whose layers are those of layer.py; older releases lack some.
FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "olmoe", "granite", "helium", "glm", "phi3",
    "diffllama",
)
AUTO_CLASSES = {
    "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}
_CODE_FILE = "modeling_bhyt.py"
_OFFSET, _WEIGHT_SCALE = r"variance_offset", r"weight_scale"


class BHyTConfigMixin:
    """Marks a config whose model has BHyT sites."""


class BHyTModelMixin(nn.Module):
    """Marks a model with BHyT sites, and puts them in when it is built from its config."""

    config_class: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(config, BHyTConfigMixin):
            raise TypeError(
                f"config: expected a {self.config_class.__name__}, got {type(config).__name__};"
                " bhyt.hf.convert turns a model of that config into one with BHyT sites"
            )
        super().__init__(config, *args, **kwargs)
        if not any(isinstance(module, ConvertedLayer) for module in self.modules()):  # a head's body has them already
            plan = Plan(self, SiteFields(**{field.name: getattr(config, field.name) for field in fields(SiteFields)}))
            plan.install(config)
            adopt(self, config)
            quantized = getattr(config, "bhyt_quantization", None)  # what bhyt.quantization.quantize noted
            if quantized:
                quantized_as(self, **quantized)
            else:
                settle(self)

    def _init_weights(self, module: Any) -> None:
        """For what a checkpoint lacks; transformers sees to it that what it has is left alone."""
        if isinstance(module, (BHyT, BHyTApprox)):
            module.reset_parameters()
        else:
            super()._init_weights(module)  # type: ignore[misc]

    def init_weights(self) -> None:
        super().init_weights()  # type: ignore[misc]
        settle(self)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        settle(self)
        super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        loaded = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        settle(model)
        if getattr(model.config, "bhyt_quantization", None):
            model.requires_grad_(False)  # loading made new Parameters
        return loaded

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing: it would copy this package's source beside the weights; the config writes what is needed."""


def settle(model: nn.Module) -> None:
    """Offsets that came with the weights stay; those that did not follow from the weights, if these are here."""
    for layer in model.modules():
        if isinstance(layer, ConvertedLayer) and layer.approximate:
            site = active_site(layer.post_attention_layernorm)
            if site.variance_offset.is_meta and not site.lam.is_meta:  # transformers 4 leaves there what may be missing
                site.variance_offset = torch.full_like(site.variance_offset, math.nan, device=site.lam.device)
            layer.settle()


def adopt(model: nn.Module, config: Any) -> None:
    """Make every transformers model of this config in `model` an instance of its BHyT class."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config is config and not isinstance(module, BHyTModelMixin):
            base: Any = type(module)
            module.__class__ = model_class(base, config.__class__)


def config_class(model_type: str) -> Any:
    """The config class of bhyt_{model_type}.

    Raises:
        ValueError: a model type that has none.
    """
    if model_type not in FAMILIES:
        raise ValueError(
            f"model: {model_type!r} has no BHyT model type, so that it could not be saved and loaded as what it is;"
            f" those are {', '.join(FAMILIES)}"
        )
    return _config_class(model_type)


@functools.cache
def _config_class(model_type: str) -> Any:
    base: Any = configuration_auto.CONFIG_MAPPING[model_type]

    class Config(BHyTConfigMixin, base):  # type: ignore[misc]
        def __init__(self, **kwargs: Any) -> None:
            sites = {field.name: kwargs.pop(field.name, field.default) for field in fields(SiteFields)}
            super().__init__(**kwargs)
            for name, value in sites.items():
                setattr(self, name, value)

        @classmethod
        def from_dict(cls, config_dict: Dict[str, Any], **kwargs: Any) -> Any:
            if config_dict.get("model_type", cls.model_type) != cls.model_type:
                raise ValueError(
                    f"config: expected model_type {cls.model_type}, got {config_dict['model_type']}; load that model"
                    " and bhyt.hf.convert it, or bhyt.hf.from_pretrained for a folder of the authors"
                )
            return super().from_dict(config_dict, **kwargs)

        def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
            """Beside config.json, the lines by which trust_remote_code finds these classes where bhyt is installed."""
            self.auto_map = {
                auto: f"{_CODE_FILE.removesuffix('.py')}.{name}" for auto, name in _class_names(model_type).items()
            }
            super().save_pretrained(save_directory, *args, **kwargs)
            names = ", ".join(sorted(set(_class_names(model_type).values())))
            code = '"""A BHyT model (arXiv 2601.09719): needs bhyt, whose classes it names."""'
            (Path(save_directory) / _CODE_FILE).write_text(f"{code}\n\nfrom bhyt.hf import {names}\n")

        @classmethod
        def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
            """Nothing: see `BHyTModelMixin.register_for_auto_class`."""

    return _named(Config, base, {"model_type": f"bhyt_{model_type}"})


def _class_names(model_type: str) -> Dict[str, str]:
    """Auto class -> the name of this family's class for it."""
    names = {"AutoConfig": configuration_auto.CONFIG_MAPPING_NAMES[model_type]}
    names |= {auto: models[model_type] for auto, models in AUTO_CLASSES.items() if model_type in models}
    return {auto: f"BHyT{name}" for auto, name in names.items()}


@functools.cache
def model_class(base: Any, config: Any) -> Any:
    """`base` with sites."""
    attributes: Dict[str, Any] = {
        "config_class": config,
        "_keys_to_ignore_on_load_missing": [*(base._keys_to_ignore_on_load_missing or []), _OFFSET],
    }
    if transformers.__version__ >= "5":  # before, loading kept the dtype of a buffer, and this list was for parameters
        attributes["_keep_in_fp32_modules_strict"] = [
            *(base._keep_in_fp32_modules_strict or []), _OFFSET, _WEIGHT_SCALE,
        ]  # fmt: skip
    # Answered by a look at the source of the class.
    for question in ("_can_set_attn_implementation", "_can_set_experts_implementation"):
        if hasattr(base, question):
            attributes[question] = classmethod(lambda cls, ask=getattr(base, question): ask())
    made = _named(type("Model", (BHyTModelMixin, base), attributes), base, {})
    # What output_attentions and the like record is looked up by the class; models that `adopt` makes never register it.
    if hasattr(modeling_utils, "_CAN_RECORD_REGISTRY"):
        dict.__setitem__(modeling_utils._CAN_RECORD_REGISTRY, str(made), base._can_record_outputs)
    return made


def _named(made: Any, base: Any, attributes: Dict[str, Any]) -> Any:
    """Under the name and in the module where pickle looks for it."""
    attributes |= {"__name__": f"BHyT{base.__name__}", "__qualname__": f"BHyT{base.__name__}", "__module__": __name__}
    for name, value in attributes.items():
        setattr(made, name, value)
    globals()[made.__name__] = made
    return made


def register() -> List[str]:
    """Make the Auto classes know every family that this release of transformers has; the names of their classes."""
    names: List[str] = []
    for model_type in FAMILIES:
        if model_type not in configuration_auto.CONFIG_MAPPING_NAMES:
            continue
        config = config_class(model_type)
        AutoConfig.register(config.model_type, config, exist_ok=True)
        tokenizers, base = tokenization_auto.TOKENIZER_MAPPING, configuration_auto.CONFIG_MAPPING[model_type]
        if base in tokenizers:
            tokenizers.register(config, tokenizers[base], exist_ok=True)
        for auto, models in AUTO_CLASSES.items():
            if model_type in models:
                made = model_class(getattr(transformers, models[model_type]), config)
                getattr(transformers, auto).register(config, made, exist_ok=True)
        names += _class_names(model_type).values()
    return sorted(set(names))
