"""Granite with BHyT sites."""

from transformers import GraniteConfig, GraniteForCausalLM, GraniteModel
from transformers.models.granite import modeling_granite

from bhyt.hf.config import BHyTConfigMixin, strict
from bhyt.hf.layer import ConvertedLayer
from bhyt.hf.model import BHyTModelMixin


@strict
class BHyTGraniteConfig(BHyTConfigMixin, GraniteConfig):
    """`transformers.GraniteConfig` with the fields of `bhyt.hf.config.SiteFields`."""

    model_type = "bhyt_granite"


class GraniteDecoderLayer(ConvertedLayer, modeling_granite.GraniteDecoderLayer):
    """The decoder layer of `transformers`, with BHyT sites."""


class BHyTGraniteModel(BHyTModelMixin, GraniteModel):
    """`transformers.GraniteModel` with BHyT sites."""

    config_class = BHyTGraniteConfig


class BHyTGraniteForCausalLM(BHyTModelMixin, GraniteForCausalLM):
    """`transformers.GraniteForCausalLM` with BHyT sites."""

    config_class = BHyTGraniteConfig
