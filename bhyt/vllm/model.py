"""The models: vLLM's transformers backend, in which the layers of `bhyt.hf` run as they do under transformers.

vLLM puts linears and an attention of its own in the places of a model's. Sites stay as they are, whole on every rank.
"""

from typing import Any, Set

from vllm.model_executor.models.transformers import TransformersForCausalLM, TransformersMoEForCausalLM

from bhyt.hf.model import SERVED
from bhyt.vllm.weights import Loading, Weights, check_config, keep_loaded


class BHyTMixin:
    """In front of a class of vLLM's transformers backend."""

    model: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        check_config(
            config,
            enable_lora=vllm_config.lora_config is not None,
            quantization=vllm_config.quant_config is not None,
            load_format=vllm_config.load_config.load_format == "dummy",
        )
        setattr(config, SERVED, True)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        keep_loaded(self.model)
        scaling = getattr(config, "logits_scaling", None)  # Granite's, in a forward that vLLM does without
        if scaling and hasattr(self, "logits_processor"):
            self.logits_processor.scale = 1 / scaling

    def load_weights(self, weights: Weights) -> Set[str]:
        """As vLLM's. Offsets that do not come with the weights are computed from them; see `Loading.watch`."""
        loading = Loading(self.model)
        loaded: Set[str] = super().load_weights(loading.watch(weights))  # type: ignore[misc]
        loading.finish(loaded, prefix="model.")
        return loaded


class ForCausalLM(BHyTMixin, TransformersForCausalLM):  # type: ignore[misc]
    """Every family but mixtures of experts."""


class MixtureForCausalLM(BHyTMixin, TransformersMoEForCausalLM):  # type: ignore[misc]
    """Mixtures of experts."""
