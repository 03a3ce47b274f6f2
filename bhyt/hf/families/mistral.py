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
    """`transformers.MistralConfig` with the fields of `bhyt.hf.config.SiteFields`."""

    model_type = "bhyt_mistral"


class MistralDecoderLayer(ConvertedLayer, modeling_mistral.MistralDecoderLayer):
    """The decoder layer of `transformers`, with BHyT sites."""


class BHyTMistralModel(BHyTModelMixin, MistralModel):
    """`transformers.MistralModel` with BHyT sites."""

    config_class = BHyTMistralConfig


class BHyTMistralForCausalLM(BHyTModelMixin, MistralForCausalLM):
    """`transformers.MistralForCausalLM` with BHyT sites."""

    config_class = BHyTMistralConfig


class BHyTMistralForSequenceClassification(BHyTModelMixin, MistralForSequenceClassification):
    """`transformers.MistralForSequenceClassification` with BHyT sites."""

    config_class = BHyTMistralConfig


class BHyTMistralForTokenClassification(BHyTModelMixin, MistralForTokenClassification):
    """`transformers.MistralForTokenClassification` with BHyT sites."""

    config_class = BHyTMistralConfig


class BHyTMistralForQuestionAnswering(BHyTModelMixin, MistralForQuestionAnswering):
    """`transformers.MistralForQuestionAnswering` with BHyT sites."""

    config_class = BHyTMistralConfig
