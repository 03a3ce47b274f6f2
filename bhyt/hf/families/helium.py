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
    """`transformers.HeliumConfig` with the fields of `bhyt.hf.config.SiteFields`."""

    model_type = "bhyt_helium"


class HeliumDecoderLayer(ConvertedLayer, modeling_helium.HeliumDecoderLayer):
    """The decoder layer of `transformers`, with BHyT sites."""


class BHyTHeliumModel(BHyTModelMixin, HeliumModel):
    """`transformers.HeliumModel` with BHyT sites."""

    config_class = BHyTHeliumConfig


class BHyTHeliumForCausalLM(BHyTModelMixin, HeliumForCausalLM):
    """`transformers.HeliumForCausalLM` with BHyT sites."""

    config_class = BHyTHeliumConfig


class BHyTHeliumForSequenceClassification(BHyTModelMixin, HeliumForSequenceClassification):
    """`transformers.HeliumForSequenceClassification` with BHyT sites."""

    config_class = BHyTHeliumConfig


class BHyTHeliumForTokenClassification(BHyTModelMixin, HeliumForTokenClassification):
    """`transformers.HeliumForTokenClassification` with BHyT sites."""

    config_class = BHyTHeliumConfig
