"""BHyT models: their bases with sites in the places of norms, put in when a model is built from its config.

`bhyt_llama` is to `llama` what `BHyTLlamaForCausalLM` is to `LlamaForCausalLM`: the same class, whose norms become
sites. All loading is done by `transformers`. The families are in `bhyt.hf.families`.
"""

import math
from typing import Any, Dict

import torch
from torch import nn
from transformers import PreTrainedModel, modeling_utils

from bhyt.hf.config import BHyTConfigMixin
from bhyt.hf.layer import ConvertedLayer
from bhyt.hf.projections import active_site
from bhyt.hf.sites import Plan
from bhyt.modules import BHyT, BHyTApprox
from bhyt.quantization import quantized_as

_OFFSET, _WEIGHT_SCALE = "variance_offset", "weight_scale"
SERVED = "_bhyt_served"  # a config's attribute, by which bhyt.vllm says that it is at work
_MODELS: Dict[Any, Any] = {}  # a class of transformers -> the BHyT class in front of it


class BHyTModelMixin(nn.Module):
    """Marks a model with BHyT sites; in front of a model class of its family.

    Args:
        config: a BHyT config of the family.
        *args: as the base takes them.
        **kwargs: as the base takes them.

    Raises:
        TypeError: the config of a plain model.
        RuntimeError: vLLM builds the model without bhyt's plugin, or SGLang builds it.
    """

    config_class: Any
    _base: Any  # the model class behind
    _keys_to_ignore_on_load_missing: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if BHyTModelMixin in cls.__bases__:  # not what FSDP2 derives
            cls._base = cls.__bases__[-1]
            _MODELS[cls._base] = cls
            cls._keys_to_ignore_on_load_missing = [*(cls._base._keys_to_ignore_on_load_missing or []), _OFFSET]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(config, BHyTConfigMixin):
            raise TypeError(
                f"config: expected a {self.config_class.__name__}, got {type(config).__name__};"
                " bhyt.hf.convert turns a model of that config into one with BHyT sites"
            )
        engine = getattr(config, "_attn_implementation", None)
        if engine == "sglang":
            raise RuntimeError("config: SGLang is not supported: whether it loads a BHyT model's offsets is not known")
        if engine == "vllm" and not getattr(config, SERVED, False):
            raise RuntimeError(
                "config: vLLM serves a BHyT model by bhyt's plugin (vllm.general_plugins), which is not at work:"
                " install bhyt beside vLLM, leave VLLM_PLUGINS unset or name bhyt there, and leave model_impl unset"
            )
        super().__init__(config, *args, **kwargs)
        if any(isinstance(module, ConvertedLayer) for module in self.modules()):
            return  # this model has a head, and its body has the sites already
        Plan(self, config.site_fields()).install(config)
        adopt(self, config)
        quantized = getattr(config, "bhyt_quantization", None)  # what bhyt.quantization.quantize noted
        if quantized:
            quantized_as(self, **quantized)
        else:
            settle(self)
        self._keep_in_float32()

    def _keep_in_float32(self) -> None:
        """Keep offsets and scales in float32 when the model loads as another dtype. transformers 4 does so anyway."""
        kept = getattr(self, "_keep_in_fp32_modules_strict", None)
        if isinstance(kept, set):
            buffers = [name for name, _ in self.named_buffers()]
            kept |= {name for name in (_OFFSET, _WEIGHT_SCALE) if any(b.endswith(name) for b in buffers)}

    def _init_weights(self, module: Any) -> None:
        """Initialise a module that a checkpoint lacks. transformers protects the tensors that were loaded."""
        if isinstance(module, (BHyT, BHyTApprox)):
            module.reset_parameters()
        else:
            super()._init_weights(module)  # type: ignore[misc]

    def init_weights(self) -> None:
        """As the base's, offsets included."""
        super().init_weights()  # type: ignore[misc]
        settle(self)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Compute offsets that are not set from the weights, then save as the base does.

        Args:
            *args: as the base takes them.
            **kwargs: as the base takes them.
        """
        settle(self)
        super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any = None, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """Load as the base does. Offsets that the files lack are computed from the weights.

        Args:
            pretrained_model_name_or_path: a folder, or the name of a repository on a hub.
            *args: as the base takes them.
            output_loading_info: also return the base's report.
            **kwargs: as the base takes them.

        Returns:
            The model, or (model, report).

        Raises:
            RuntimeError: the files lack parameters of the layers, which would be new ones.
        """
        path = pretrained_model_name_or_path
        load: Any = super().from_pretrained  # type: ignore[misc]
        model, report = load(path, *args, output_loading_info=True, **kwargs)
        layers = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, ConvertedLayer))
        missing = sorted(key for key in report["missing_keys"] if key.startswith(layers))
        if missing and path is not None:
            more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
            raise RuntimeError(f"{path}: its weights lack {', '.join(missing[:4])}{more} of {cls.__name__}")
        settle(model)
        if getattr(model.config, "bhyt_quantization", None):
            model.requires_grad_(False)  # loading made new Parameters
        return (model, report) if output_loading_info else model

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Do nothing: the base would copy this package's source beside the weights. The config writes all it needs.

        Args:
            auto_class: as the base takes it.
        """

    # transformers looks at the source of the class, so the base is asked.
    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return bool(cls._base._can_set_attn_implementation())

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return bool(cls._base._can_set_experts_implementation())


def settle(model: nn.Module) -> None:
    """Compute the offsets that did not come with the weights, if the weights are here.

    Args:
        model: any model with converted layers.
    """
    for layer in model.modules():
        if isinstance(layer, ConvertedLayer) and layer.approximate:
            site = active_site(layer.post_attention_layernorm)
            if site.variance_offset.is_meta and not site.lam.is_meta:  # transformers 4 leaves there what may be missing
                site.variance_offset = torch.full_like(site.variance_offset, math.nan, device=site.lam.device)
            layer.settle()


def adopt(model: nn.Module, config: Any) -> None:
    """Make every transformers model of this config in `model` an instance of its BHyT class.

    Args:
        model: the model that holds them, which may be one of them.
        config: the BHyT config.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config is config and not isinstance(module, BHyTModelMixin):
            module.__class__ = _class_in_front_of(type(module), type(config))
            vars(module).pop("_weight_conversions", None)  # from the plain model's load; saving would use them
            _note_outputs(module)


def _class_in_front_of(base: Any, config: Any) -> Any:
    """The family's class, or a class made now for a model class of another package."""
    made = _MODELS.get(base)
    return made or type(f"BHyT{base.__name__}", (BHyTModelMixin, base), {"config_class": config})


def _note_outputs(model: Any) -> None:
    """Tell transformers which outputs the class records (output_attentions, ..): an __init__ does so otherwise."""
    registry: Any = getattr(modeling_utils, "_CAN_RECORD_REGISTRY", None)
    if registry is not None:
        registry[str(type(model)) if type(registry) is dict else model] = model._can_record_outputs
