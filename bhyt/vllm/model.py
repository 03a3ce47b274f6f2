"""The other families: vLLM's transformers backend, in which the layers of `bhyt.hf` run as they do under transformers.

vLLM puts linears and an attention of its own in the places of a model's. It leaves the sites as they are, whole on
every rank.
"""

from typing import Any

from vllm.model_executor.models.transformers import TransformersForCausalLM, TransformersMoEForCausalLM

from bhyt.hf.layer import ConvertedLayer
from bhyt.hf.model import SERVED
from bhyt.vllm.same import check_window
from bhyt.vllm.weights import LoadsOffsets, check_config, keep_loaded


class Backend(LoadsOffsets):
    """In front of a class of vLLM's transformers backend."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        check_config(vllm_config)
        setattr(config, SERVED, True)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        keep_loaded(self.model)
        for layer in self.model.modules():
            if isinstance(layer, ConvertedLayer):
                check_window(layer.self_attn, layer.self_attn, config)
        scaling = getattr(config, "logits_scaling", None)  # Granite's, in a forward that vLLM does without
        if scaling and hasattr(self, "logits_processor"):
            self.logits_processor.scale = 1 / scaling


class ForCausalLM(Backend, TransformersForCausalLM):  # type: ignore[misc]
    """Families that vLLM has no decoder for, or another one."""


class MixtureForCausalLM(Backend, TransformersMoEForCausalLM):  # type: ignore[misc]
    """Mixtures of experts."""
