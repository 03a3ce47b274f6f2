"""The fields of sites that a BHyT model's config adds to its base's, and how this config is saved."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Dict, Optional, Union

import transformers
from transformers import PretrainedConfig

from bhyt.hf import tables

_validated: Any = None
try:
    from huggingface_hub.dataclasses import strict as _validated
except ImportError:  # an older one
    pass

_CODE_FILE = "modeling_bhyt.py"
_DATACLASSES = hasattr(PretrainedConfig, "__dataclass_fields__")  # since transformers 5


def strict(cls: Any) -> Any:
    """A class decorator: values of a wrong type are an error, as for the fields of the base's config.

    Args:
        cls: a config class.

    Returns:
        The class, checked where the installed huggingface_hub can check it.
    """
    return _validated(cls) if _validated is not None and hasattr(cls, "__dataclass_fields__") else cls


@dataclass(repr=False, eq=False, kw_only=True)
class SiteFields:
    """The fields that a BHyT model's config adds to its base's. Names are the authors'; `bhyt.hf.convert` sets them.

    Attributes:
        norm_type: "bhyt" or "bhytline": exact first and approximate second sites. "bhytstar": both exact.
        input_layer_lam: initial lam of a layer's first site.
        post_layer_lam: initial lam of a layer's second site.
        last_layer_lam: above 0, and not with "bhytstar", the final norm is an exact site with this lam.
        learnable_lam: False makes lam a buffer.
        bhyt_kappa: kappa of every site.
        bhyt_eps: eps of every site; None takes the eps of the norms.
        seq_len: T, the sequence length that the model is built for.
        use_gamma_var: multiply the variance that attention adds by the mean square of the first site's gain.
        var_approx_exact_layers: the number of layers, from the first on, whose second sites are exact too.
    """

    norm_type: str = "bhyt"
    input_layer_lam: Union[int, float] = 2.0
    post_layer_lam: Union[int, float] = 1.0
    last_layer_lam: Union[int, float] = 0.0
    learnable_lam: bool = True
    bhyt_kappa: Union[int, float] = 10.0
    bhyt_eps: Union[int, float, None] = None
    seq_len: Optional[int] = None
    use_gamma_var: bool = False
    var_approx_exact_layers: int = 0


SITE_FIELDS = tuple(field.name for field in fields(SiteFields))
_CheckedFields = strict(dataclass(kw_only=True)(type("_CheckedFields", (SiteFields,), {})))


def check_types(sites: SiteFields) -> None:
    """Check the type of every field.

    Args:
        sites: the fields.

    Raises:
        ValueError: a field of a wrong type.
    """
    try:
        _CheckedFields(**vars(sites))
    except Exception as error:  # huggingface_hub's own
        raise ValueError(" ".join(str(error).split())) from None


class BHyTConfigMixin(SiteFields):
    """Marks a config whose model has BHyT sites; in front of the config of its family."""

    model_type: str

    if not _DATACLASSES:

        def __init__(self, **kwargs: Any) -> None:
            sites = SiteFields(**{name: kwargs.pop(name) for name in SITE_FIELDS if name in kwargs})
            check_types(sites)
            super(SiteFields, self).__init__(**kwargs)
            vars(self).update(vars(sites))

    def site_fields(self) -> SiteFields:
        """The fields of the sites alone.

        Returns:
            A new `SiteFields`.
        """
        return SiteFields(**{name: getattr(self, name) for name in SITE_FIELDS})

    @classmethod
    def from_dict(cls, config_dict: Dict[str, Any], **kwargs: Any) -> Any:
        """Make a config as the base's `from_dict` does.

        Args:
            config_dict: the fields by name.
            **kwargs: as the base takes them.

        Returns:
            The config.

        Raises:
            ValueError: the dictionary is the config of another model type.
        """
        if config_dict.get("model_type", cls.model_type) != cls.model_type:
            raise ValueError(
                f"config: expected model_type {cls.model_type}, got {config_dict['model_type']}; load that model"
                " and bhyt.hf.convert it, or bhyt.hf.from_pretrained for a folder of the authors"
            )
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]

    def to_dict(self) -> Dict[str, Any]:
        """The fields by name, as the base's `to_dict` gives them."""
        tables.extend_imported()  # PEFT calls to_dict before it looks the model type up
        result: Dict[str, Any] = super().to_dict()  # type: ignore[misc]
        return result

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as the base does, with the lines by which trust_remote_code finds these classes where bhyt is installed.

        Args:
            save_directory: the folder.
            *args: as the base takes them.
            **kwargs: as the base takes them.
        """
        module = _CODE_FILE.removesuffix(".py")
        self.auto_map = {auto: f"{module}.{name}" for auto, name in tables.class_names(type(self)).items()}
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    def to_json_file(self, json_file_path: Any, *args: Any, **kwargs: Any) -> None:
        """Write the file that names the classes, then config.json: a push to a hub begins once config.json is there.

        Args:
            json_file_path: the file to write.
            *args: as the base takes them.
            **kwargs: as the base takes them.
        """
        if Path(json_file_path).name == transformers.CONFIG_NAME:
            names = ", ".join(sorted(set(tables.class_names(type(self)).values())))
            code = '"""A BHyT model (arXiv 2601.09719): needs bhyt, whose classes it names."""'
            Path(json_file_path).with_name(_CODE_FILE).write_text(f"{code}\n\nfrom bhyt.hf import {names}\n")
        super().to_json_file(json_file_path, *args, **kwargs)  # type: ignore[misc]

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: see `BHyTModelMixin.register_for_auto_class`.

        Args:
            auto_class: as the base takes it.
        """
