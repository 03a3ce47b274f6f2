"""Granite with BHyT sites."""

from transformers import GraniteConfig, GraniteForCausalLM, GraniteModel
from transformers.models.granite import modeling_granite

from bhyt.hf.config import BHyTConfigMixin, strict
from bhyt.hf.layer import ConvertedLayer
from bhyt.hf.model import BHyTModelMixin


@strict
class BHyTGraniteConfig(BHyTConfigMixin, GraniteConfig):
    model_type = "bhyt_granite"


class GraniteDecoderLayer(ConvertedLayer, modeling_granite.GraniteDecoderLayer):
    pass


class BHyTGraniteModel(BHyTModelMixin, GraniteModel):
    config_class = BHyTGraniteConfig


class BHyTGraniteForCausalLM(BHyTModelMixin, GraniteForCausalLM):
    config_class = BHyTGraniteConfig
