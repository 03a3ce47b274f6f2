"""Mistral with BHyT sites."""

from transformers import (
    MistralConfig,
    MistralForCausalLM,
    MistralForQuestionAnswering,
    MistralForSequenceClassification,
    MistralForTokenClassification,
    MistralModel,
)
from transformers.models.mistral import modeling_mistral

from bhyt.hf.config import BHyTConfigMixin, strict
from bhyt.hf.layer import ConvertedLayer
from bhyt.hf.model import BHyTModelMixin


@strict
class BHyTMistralConfig(BHyTConfigMixin, MistralConfig):
    model_type = "bhyt_mistral"


class MistralDecoderLayer(ConvertedLayer, modeling_mistral.MistralDecoderLayer):
    pass


class BHyTMistralModel(BHyTModelMixin, MistralModel):
    config_class = BHyTMistralConfig


class BHyTMistralForCausalLM(BHyTModelMixin, MistralForCausalLM):
    config_class = BHyTMistralConfig


class BHyTMistralForSequenceClassification(BHyTModelMixin, MistralForSequenceClassification):
    config_class = BHyTMistralConfig


class BHyTMistralForTokenClassification(BHyTModelMixin, MistralForTokenClassification):
    config_class = BHyTMistralConfig


class BHyTMistralForQuestionAnswering(BHyTModelMixin, MistralForQuestionAnswering):
    config_class = BHyTMistralConfig
