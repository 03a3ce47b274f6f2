"""BHyT models in vLLM: a plugin, which vLLM finds by the entry point `vllm.general_plugins` once bhyt is installed.

Every folder that `save_pretrained` writes for a model of `bhyt.hf` is served, without trust_remote_code; see
docs/serving.md. This module imports neither vLLM nor `bhyt.hf`, because vLLM loads it in each of its processes, for
every model.
"""

from typing import Any, Dict

# base's model type -> what the names of its classes begin with
FAMILIES = {
    "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "mixtral": "Mixtral",
    "qwen3_moe": "Qwen3Moe", "olmoe": "Olmoe", "granite": "Granite", "helium": "Helium", "glm": "Glm", "phi3": "Phi3",
    "diffllama": "DiffLlama",
}  # fmt: skip
MIXTURES = ("mixtral", "qwen3_moe", "olmoe")
NATIVE = ("llama", "mistral", "qwen2", "qwen3")


def register() -> None:
    """Make vLLM know the models, their configs and the lengths of their contexts.

    vLLM calls it. Further calls change nothing.
    """
    from vllm import ModelRegistry

    for base, name in FAMILIES.items():
        own, kind = f"native:{name}ForCausalLM", "MixtureForCausalLM" if base in MIXTURES else "ForCausalLM"
        path = own if base in NATIVE else f"model:{kind}"
        ModelRegistry.register_model(f"BHyT{name}ForCausalLM", f"bhyt.vllm.{path}")
    ModelRegistry.register_model("BHyTForCausalLM", "bhyt.vllm.model:ForCausalLM")  # what native.py may ask for
    _register_configs()
    _register_lengths()


def _register_configs() -> None:
    """Configs that import `bhyt.hf`, which registers the real ones, when a folder asks for one."""
    from transformers import AutoConfig, PretrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    def from_dict(cls: Any, /, config_dict: Dict[str, Any], **kwargs: Any) -> Any:
        import bhyt.hf  # noqa: F401

        return CONFIG_MAPPING[cls.model_type].from_dict(config_dict, **kwargs)

    for base in FAMILIES:
        model_type = f"bhyt_{base}"
        if model_type not in CONFIG_MAPPING:
            body = {"model_type": model_type, "from_dict": classmethod(from_dict)}
            AutoConfig.register(model_type, type("BHyTConfig", (PretrainedConfig,), body))


def _register_lengths() -> None:
    """Keep vLLM from taking seq_len for the longest context.

    vLLM takes the smallest field that sounds like a length. seq_len is the length for which approximate sites know the
    variance, and bounds no context.
    """
    try:
        from vllm.transformers_utils import model_arch_config_convertor as convertors
    except ImportError:  # another release of vLLM: the context is at most T there, which vLLM says
        return
    table = convertors.MODEL_ARCH_CONFIG_CONVERTORS
    for base in FAMILIES:
        of_base: Any = table.get(base, convertors.ModelArchConfigConvertorBase)
        table[f"bhyt_{base}"] = type("BHyTConvertor", (_WithoutSeqLen, of_base), {})


class _WithoutSeqLen:
    """In front of vLLM's reader of configs."""

    hf_text_config: Any

    def derive_max_model_len_and_key(self) -> Any:
        config, seq_len = self.hf_text_config, self.hf_text_config.seq_len
        config.seq_len = None
        try:
            return super().derive_max_model_len_and_key()  # type: ignore[misc]
        finally:
            config.seq_len = seq_len
