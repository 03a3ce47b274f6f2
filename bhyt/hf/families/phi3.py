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
    model_type = "bhyt_phi3"


class Phi3DecoderLayer(ConvertedLayer, modeling_phi3.Phi3DecoderLayer):
    pass


class BHyTPhi3Model(BHyTModelMixin, Phi3Model):
    config_class = BHyTPhi3Config


class BHyTPhi3ForCausalLM(BHyTModelMixin, Phi3ForCausalLM):
    config_class = BHyTPhi3Config


class BHyTPhi3ForSequenceClassification(BHyTModelMixin, Phi3ForSequenceClassification):
    config_class = BHyTPhi3Config


class BHyTPhi3ForTokenClassification(BHyTModelMixin, Phi3ForTokenClassification):
    config_class = BHyTPhi3Config
