"""Loads folders that do not name a BHyT model type: the authors' checkpoints, and folders of bhyt 0.1."""

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from bhyt.hf.config import BHyTConfigMixin
from bhyt.hf.families import config_class
from bhyt.hf.sites import NORM_TYPES

# Fields of the authors' code that change what a model computes, and the values that this package computes.
_AUTHORS_DEFAULTS = {
    "bhyt_layer_range": None, "bhyt_kappa_schedule": None, "var_approx_method": "baseline",
    "var_approx_calibration": None, "var_approx_exact_layer_list": None,
    "lam_layer_scale": False, "lam_layer_rscale": False,
}  # fmt: skip


def from_pretrained(path: Any, **options: Any) -> Any:
    """Load a causal language model with the sites that its config describes, whatever model type it names.

    It is needed where config.json has a plain model type beside a norm_type, as the authors' checkpoints and folders of
    bhyt 0.1 have. Folders of this release need `AutoModelForCausalLM.from_pretrained` only, and load here too. Offsets
    that are not in the weights are computed from them.

    Args:
        path: a folder, or the name of a repository on a hub.
        **options: as `AutoModelForCausalLM.from_pretrained` takes them (dtype, device_map, revision, ..).

    Returns:
        The model, which saves as any converted model.

    Raises:
        ValueError: the config names no BHyT norm_type, or no seq_len for approximate sites.
        RuntimeError: parameters are missing or unknown.
    """
    config = AutoConfig.from_pretrained(path, **{name: options[name] for name in _HUB_OPTIONS if name in options})
    if not isinstance(config, BHyTConfigMixin):
        config = _translated(config)
    model, report = AutoModelForCausalLM.from_pretrained(path, config=config, output_loading_info=True, **options)
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing or unexpected:
        raise RuntimeError(f"{path}: missing {missing}, unexpected {unexpected}")
    return model


_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def _translated(config: Any) -> Any:
    if getattr(config, "norm_type", None) not in NORM_TYPES:
        raise ValueError(
            f"config.norm_type: expected one of {', '.join(NORM_TYPES)}, got {getattr(config, 'norm_type', None)!r}"
        )
    fields = {name: value for name, value in config.to_dict().items() if name != "model_type" and value is not None}
    fields.setdefault("bhyt_eps", 1e-6)  # that of the authors' code, which has no such field
    return config_class(config.model_type)(**fields)


def load_authors_checkpoint(path: Any, **options: Any) -> Any:
    """Load a model from the authors' config and weights, whose parameters have the names of a converted model's.

    The function does what `from_pretrained` does, and raises for fields of the authors that bhyt does not compute.

    Args:
        path: a folder, or the name of a repository on a hub.
        **options: as `AutoModelForCausalLM.from_pretrained` takes them.

    Returns:
        The model, which saves as any converted model.

    Raises:
        NotImplementedError: the config asks for such a field: sites in some layers only, kappa by depth, other
            approximations of the variance.
        ValueError: as from `from_pretrained`.
        RuntimeError: as from `from_pretrained`.
    """
    config = AutoConfig.from_pretrained(path, **{name: options[name] for name in _HUB_OPTIONS if name in options})
    for field, default in _AUTHORS_DEFAULTS.items():
        if getattr(config, field, default) not in (default, None):
            raise NotImplementedError(f"config.{field}: not supported, the config asks for {getattr(config, field)!r}")
    return from_pretrained(path, **options)
