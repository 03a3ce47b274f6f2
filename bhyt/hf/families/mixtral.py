"""Mixtral with BHyT sites."""

from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    MixtralForQuestionAnswering,
    MixtralForSequenceClassification,
    MixtralForTokenClassification,
    MixtralModel,
)
from transformers.models.mixtral import modeling_mixtral

from bhyt.hf.config import BHyTConfigMixin, strict
from bhyt.hf.layer import ConvertedLayer
from bhyt.hf.model import BHyTModelMixin


@strict
class BHyTMixtralConfig(BHyTConfigMixin, MixtralConfig):
    model_type = "bhyt_mixtral"


class MixtralDecoderLayer(ConvertedLayer, modeling_mixtral.MixtralDecoderLayer):
    pass


class BHyTMixtralModel(BHyTModelMixin, MixtralModel):
    config_class = BHyTMixtralConfig


class BHyTMixtralForCausalLM(BHyTModelMixin, MixtralForCausalLM):
    config_class = BHyTMixtralConfig


class BHyTMixtralForSequenceClassification(BHyTModelMixin, MixtralForSequenceClassification):
    config_class = BHyTMixtralConfig


class BHyTMixtralForTokenClassification(BHyTModelMixin, MixtralForTokenClassification):
    config_class = BHyTMixtralConfig


class BHyTMixtralForQuestionAnswering(BHyTModelMixin, MixtralForQuestionAnswering):
    config_class = BHyTMixtralConfig
