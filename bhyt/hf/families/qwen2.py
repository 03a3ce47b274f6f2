"""Qwen2 with BHyT sites."""

from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForQuestionAnswering,
    Qwen2ForSequenceClassification,
    Qwen2ForTokenClassification,
    Qwen2Model,
)
from transformers.models.qwen2 import modeling_qwen2

from bhyt.hf.config import BHyTConfigMixin, strict
from bhyt.hf.layer import ConvertedLayer
from bhyt.hf.model import BHyTModelMixin


@strict
class BHyTQwen2Config(BHyTConfigMixin, Qwen2Config):
    """`transformers.Qwen2Config` with the fields of `bhyt.hf.config.SiteFields`."""

    model_type = "bhyt_qwen2"


class Qwen2DecoderLayer(ConvertedLayer, modeling_qwen2.Qwen2DecoderLayer):
    """The decoder layer of `transformers`, with BHyT sites."""


class BHyTQwen2Model(BHyTModelMixin, Qwen2Model):
    """`transformers.Qwen2Model` with BHyT sites."""

    config_class = BHyTQwen2Config


class BHyTQwen2ForCausalLM(BHyTModelMixin, Qwen2ForCausalLM):
    """`transformers.Qwen2ForCausalLM` with BHyT sites."""

    config_class = BHyTQwen2Config


class BHyTQwen2ForSequenceClassification(BHyTModelMixin, Qwen2ForSequenceClassification):
    """`transformers.Qwen2ForSequenceClassification` with BHyT sites."""

    config_class = BHyTQwen2Config


class BHyTQwen2ForTokenClassification(BHyTModelMixin, Qwen2ForTokenClassification):
    """`transformers.Qwen2ForTokenClassification` with BHyT sites."""

    config_class = BHyTQwen2Config


class BHyTQwen2ForQuestionAnswering(BHyTModelMixin, Qwen2ForQuestionAnswering):
    """`transformers.Qwen2ForQuestionAnswering` with BHyT sites."""

    config_class = BHyTQwen2Config
