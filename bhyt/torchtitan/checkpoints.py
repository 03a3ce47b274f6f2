"""Folders of `bhyt.hf` as checkpoints: torchtitan reads and writes them by its own means, with lam and offsets."""

import functools
import json
import re
from pathlib import Path
from typing import Any, Dict

import torch
from torch import Tensor
from torchtitan.tools.logging import logger

from bhyt.gain import attention_gain, whole
from bhyt.torchtitan.sites import SecondSite

_NAMES = {
    f"model.layers.{{}}.{theirs}": f"layers.{{}}.{ours}"
    for theirs, ours in (
        ("input_layernorm.lam", "attention_norm.lam"),
        ("post_attention_layernorm.lam", "ffn_norm.lam"),
        ("post_attention_layernorm.variance_offset", "ffn_norm.variance_offset"),
    )
}


class _Adapter:
    """In front of a model's state-dict adapter."""

    model_config: Any
    from_hf_map: Dict[str, Any]
    fqn_to_index_mapping: Any

    def __init__(self, model_config: Any, hf_assets_path: Any) -> None:
        super().__init__(model_config, hf_assets_path)  # type: ignore[call-arg]
        self.from_hf_map = {**self.from_hf_map, **_NAMES}
        files = self.fqn_to_index_mapping
        for name in list(files or ()):  # an index of several files names what is written, and the base's has no sites
            found = re.fullmatch(r"(model\.layers\.\d+\.(?:input|post_attention)_layernorm)\.weight", name)
            if found:
                second = found[1].endswith("post_attention_layernorm") and self._is_approximate(name)
                for more in ("lam", "variance_offset")[: 2 if second else 1]:
                    files[f"{found[1]}.{more}"] = files[name]

    def _is_approximate(self, name: str) -> bool:
        return isinstance(self.model_config.layers[int(name.split(".")[2])].ffn_norm, SecondSite.Config)

    def to_hf(self, state_dict: Dict[str, Any]) -> Dict[str, Any]:
        """Offsets are float32 whatever weights are exported as: of rounded weights they are computed anew."""
        hf_state_dict: Dict[str, Any] = super().to_hf(state_dict)  # type: ignore[misc]
        for name, offset in list(hf_state_dict.items()):
            if name.endswith(".variance_offset") and offset.dtype != torch.float32:
                layer = name.removesuffix("post_attention_layernorm.variance_offset")
                hf_state_dict[name] = self._offset(hf_state_dict, layer).to(torch.float32).reshape(1)
        return hf_state_dict

    def _offset(self, hf_state_dict: Dict[str, Any], layer: str) -> Tensor:
        config = self.model_config.layers[int(layer.split(".")[2])]
        attention, values = config.attention, hf_state_dict[f"{layer}self_attn.v_proj.weight"]
        kv_heads = attention.n_kv_heads or attention.n_heads
        lam = whole(hf_state_dict[f"{layer}input_layernorm.lam"]).float()
        gain = attention_gain(
            values, hf_state_dict[f"{layer}self_attn.o_proj.weight"], attention.rope.max_seq_len,
            attention.n_heads // kv_heads, head_dim=len(values) // kv_heads,
        )  # fmt: skip
        if config.attention_norm.gain_counts:
            gain = gain * whole(hf_state_dict[f"{layer}input_layernorm.weight"]).to(gain).square().mean()
        offset: Tensor = gain * (lam / config.attention_norm.kappa).square()
        return offset

    def get_hf_storage_reader(self, path: str, from_quantized: bool = False) -> Any:
        if from_quantized:
            raise ValueError("checkpoint.initial_load_in_hf_quantized: a BHyT model is not loaded from 8-bit weights")
        _check_folder(Path(path), site_fields(self.model_config))
        return super().get_hf_storage_reader(path, from_quantized)  # type: ignore[misc]


@functools.cache
def adapter_class(base: Any) -> Any:
    """The state-dict adapter in front of a model's own."""
    return type(f"BHyT{base.__name__}", (_Adapter, base), {"__module__": __name__})


def site_fields(model_config: Any) -> Dict[str, Any]:
    """What a bhyt.hf config says of the sites of a model that torchtitan builds from model_config."""
    first, layers = model_config.layers[0], model_config.layers
    return {
        "norm_type": "bhyt",
        "input_layer_lam": first.attention_norm.lam,
        "post_layer_lam": first.ffn_norm.lam,
        "bhyt_kappa": first.attention_norm.kappa,
        "bhyt_eps": first.attention_norm.eps,
        "seq_len": first.attention.rope.max_seq_len,
        "var_approx_exact_layers": sum(not isinstance(layer.ffn_norm, SecondSite.Config) for layer in layers),
        "last_layer_lam": 0.0,
        "learnable_lam": True,
        "use_gamma_var": first.attention_norm.gain_counts,
    }


def _check_folder(folder: Path, fields: Dict[str, Any]) -> None:
    """
    Raises:
        ValueError: its config.json says that its sites compute something else.
    """
    try:
        saved = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        logger.warning(f"{folder} has no config.json: nothing tells whether its sites are those of this run")
        return
    defaults = {"bhyt_kappa": 10.0, "var_approx_exact_layers": 0, "last_layer_lam": 0.0, "learnable_lam": True}
    saved = {"use_gamma_var": False, **defaults, **saved}
    saved["bhyt_eps"] = saved.get("bhyt_eps") or saved.get("rms_norm_eps")
    if saved.get("norm_type") == "bhytline":
        saved["norm_type"] = "bhyt"
    initial = ("input_layer_lam", "post_layer_lam")  # the folder's lam are in its weights
    other = [
        f"{name} {saved.get(name)!r} (here {value!r})"
        for name, value in fields.items()
        if name not in initial and saved.get(name) != value
    ]
    if other:
        raise ValueError(f"{folder}: its model has {', '.join(other)}; it would compute something else here")


def hf_config(config: Any, base: Any = None) -> Any:
    """The `bhyt.hf` config of a converted model, to be saved beside the weights that torchtitan has exported.

        bhyt.torchtitan.hf_config(config).save_pretrained("outputs/checkpoint/step-1000")

    Args:
        config: the converted `Trainer.Config`, with the `training.seq_len` of the run.
        base: the plain model's transformers config, or where to load it from; None: config.hf_assets_path.

    Raises:
        ValueError: config is not converted, or base is of a family that bhyt.hf has not.
    """
    import bhyt.hf
    from bhyt.hf import tables
    from bhyt.hf.families import config_class
    from transformers import AutoConfig, PretrainedConfig

    model_config = config.model_spec.model
    if not hasattr(model_config.layers[0].attention_norm, "kappa"):
        raise ValueError("config: has not been converted; see bhyt.torchtitan.convert")
    if not isinstance(base, PretrainedConfig):
        base = AutoConfig.from_pretrained(base or config.hf_assets_path)
    made = config_class(base.model_type)
    ours = ("model_type", "architectures", "transformers_version")
    values = {name: value for name, value in base.to_dict().items() if name not in ours}
    fields = {**site_fields(model_config), "seq_len": config.training.seq_len}
    return made(**{**values, **fields, "architectures": [tables.class_names(made)["AutoModelForCausalLM"]]})
