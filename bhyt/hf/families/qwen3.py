"""Qwen3 with BHyT sites."""

from transformers import (
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForQuestionAnswering,
    Qwen3ForSequenceClassification,
    Qwen3ForTokenClassification,
    Qwen3Model,
)
from transformers.models.qwen3 import modeling_qwen3

from bhyt.hf.config import BHyTConfigMixin, strict
from bhyt.hf.layer import ConvertedLayer
from bhyt.hf.model import BHyTModelMixin


@strict
class BHyTQwen3Config(BHyTConfigMixin, Qwen3Config):
    """`transformers.Qwen3Config` with the fields of `bhyt.hf.config.SiteFields`."""

    model_type = "bhyt_qwen3"


class Qwen3DecoderLayer(ConvertedLayer, modeling_qwen3.Qwen3DecoderLayer):
    """The decoder layer of `transformers`, with BHyT sites."""


class BHyTQwen3Model(BHyTModelMixin, Qwen3Model):
    """`transformers.Qwen3Model` with BHyT sites."""

    config_class = BHyTQwen3Config


class BHyTQwen3ForCausalLM(BHyTModelMixin, Qwen3ForCausalLM):
    """`transformers.Qwen3ForCausalLM` with BHyT sites."""

    config_class = BHyTQwen3Config


class BHyTQwen3ForSequenceClassification(BHyTModelMixin, Qwen3ForSequenceClassification):
    """`transformers.Qwen3ForSequenceClassification` with BHyT sites."""

    config_class = BHyTQwen3Config


class BHyTQwen3ForTokenClassification(BHyTModelMixin, Qwen3ForTokenClassification):
    """`transformers.Qwen3ForTokenClassification` with BHyT sites."""

    config_class = BHyTQwen3Config


class BHyTQwen3ForQuestionAnswering(BHyTModelMixin, Qwen3ForQuestionAnswering):
    """`transformers.Qwen3ForQuestionAnswering` with BHyT sites."""

    config_class = BHyTQwen3Config
