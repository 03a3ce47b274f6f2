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
    """`transformers.MixtralConfig` with the fields of `bhyt.hf.config.SiteFields`."""

    model_type = "bhyt_mixtral"


class MixtralDecoderLayer(ConvertedLayer, modeling_mixtral.MixtralDecoderLayer):
    """The decoder layer of `transformers`, with BHyT sites."""


class BHyTMixtralModel(BHyTModelMixin, MixtralModel):
    """`transformers.MixtralModel` with BHyT sites."""

    config_class = BHyTMixtralConfig


class BHyTMixtralForCausalLM(BHyTModelMixin, MixtralForCausalLM):
    """`transformers.MixtralForCausalLM` with BHyT sites."""

    config_class = BHyTMixtralConfig


class BHyTMixtralForSequenceClassification(BHyTModelMixin, MixtralForSequenceClassification):
    """`transformers.MixtralForSequenceClassification` with BHyT sites."""

    config_class = BHyTMixtralConfig


class BHyTMixtralForTokenClassification(BHyTModelMixin, MixtralForTokenClassification):
    """`transformers.MixtralForTokenClassification` with BHyT sites."""

    config_class = BHyTMixtralConfig


class BHyTMixtralForQuestionAnswering(BHyTModelMixin, MixtralForQuestionAnswering):
    """`transformers.MixtralForQuestionAnswering` with BHyT sites."""

    config_class = BHyTMixtralConfig
