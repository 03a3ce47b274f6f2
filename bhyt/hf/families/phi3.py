"""Phi-3 with BHyT sites."""

from transformers import (
    Phi3Config,
    Phi3ForCausalLM,
    Phi3ForSequenceClassification,
    Phi3ForTokenClassification,
    Phi3Model,
)
from transformers.models.phi3 import modeling_phi3

from bhyt.hf.config import BHyTConfigMixin, strict
from bhyt.hf.layer import ConvertedLayer
from bhyt.hf.model import BHyTModelMixin


@strict
class BHyTPhi3Config(BHyTConfigMixin, Phi3Config):
    """`transformers.Phi3Config` with the fields of `bhyt.hf.config.SiteFields`."""

    model_type = "bhyt_phi3"


class Phi3DecoderLayer(ConvertedLayer, modeling_phi3.Phi3DecoderLayer):
    """The decoder layer of `transformers`, with BHyT sites."""


class BHyTPhi3Model(BHyTModelMixin, Phi3Model):
    """`transformers.Phi3Model` with BHyT sites."""

    config_class = BHyTPhi3Config


class BHyTPhi3ForCausalLM(BHyTModelMixin, Phi3ForCausalLM):
    """`transformers.Phi3ForCausalLM` with BHyT sites."""

    config_class = BHyTPhi3Config


class BHyTPhi3ForSequenceClassification(BHyTModelMixin, Phi3ForSequenceClassification):
    """`transformers.Phi3ForSequenceClassification` with BHyT sites."""

    config_class = BHyTPhi3Config


class BHyTPhi3ForTokenClassification(BHyTModelMixin, Phi3ForTokenClassification):
    """`transformers.Phi3ForTokenClassification` with BHyT sites."""

    config_class = BHyTPhi3Config
