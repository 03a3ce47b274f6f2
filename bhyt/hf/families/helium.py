"""Helium with BHyT sites."""

from transformers import (
    HeliumConfig,
    HeliumForCausalLM,
    HeliumForSequenceClassification,
    HeliumForTokenClassification,
    HeliumModel,
)
from transformers.models.helium import modeling_helium

from bhyt.hf.config import BHyTConfigMixin, strict
from bhyt.hf.layer import ConvertedLayer
from bhyt.hf.model import BHyTModelMixin


@strict
class BHyTHeliumConfig(BHyTConfigMixin, HeliumConfig):
    model_type = "bhyt_helium"


class HeliumDecoderLayer(ConvertedLayer, modeling_helium.HeliumDecoderLayer):
    pass


class BHyTHeliumModel(BHyTModelMixin, HeliumModel):
    config_class = BHyTHeliumConfig


class BHyTHeliumForCausalLM(BHyTModelMixin, HeliumForCausalLM):
    config_class = BHyTHeliumConfig


class BHyTHeliumForSequenceClassification(BHyTModelMixin, HeliumForSequenceClassification):
    config_class = BHyTHeliumConfig


class BHyTHeliumForTokenClassification(BHyTModelMixin, HeliumForTokenClassification):
    config_class = BHyTHeliumConfig
