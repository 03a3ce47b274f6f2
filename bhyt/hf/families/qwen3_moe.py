"""Qwen3-MoE with BHyT sites."""

from transformers import (
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3MoeForQuestionAnswering,
    Qwen3MoeForSequenceClassification,
    Qwen3MoeForTokenClassification,
    Qwen3MoeModel,
)
from transformers.models.qwen3_moe import modeling_qwen3_moe

from bhyt.hf.config import BHyTConfigMixin, strict
from bhyt.hf.layer import ConvertedLayer
from bhyt.hf.model import BHyTModelMixin


@strict
class BHyTQwen3MoeConfig(BHyTConfigMixin, Qwen3MoeConfig):
    """`transformers.Qwen3MoeConfig` with the fields of `bhyt.hf.config.SiteFields`."""

    model_type = "bhyt_qwen3_moe"


class Qwen3MoeDecoderLayer(ConvertedLayer, modeling_qwen3_moe.Qwen3MoeDecoderLayer):
    """The decoder layer of `transformers`, with BHyT sites."""


class BHyTQwen3MoeModel(BHyTModelMixin, Qwen3MoeModel):
    """`transformers.Qwen3MoeModel` with BHyT sites."""

    config_class = BHyTQwen3MoeConfig


class BHyTQwen3MoeForCausalLM(BHyTModelMixin, Qwen3MoeForCausalLM):
    """`transformers.Qwen3MoeForCausalLM` with BHyT sites."""

    config_class = BHyTQwen3MoeConfig


class BHyTQwen3MoeForSequenceClassification(BHyTModelMixin, Qwen3MoeForSequenceClassification):
    """`transformers.Qwen3MoeForSequenceClassification` with BHyT sites."""

    config_class = BHyTQwen3MoeConfig


class BHyTQwen3MoeForTokenClassification(BHyTModelMixin, Qwen3MoeForTokenClassification):
    """`transformers.Qwen3MoeForTokenClassification` with BHyT sites."""

    config_class = BHyTQwen3MoeConfig


class BHyTQwen3MoeForQuestionAnswering(BHyTModelMixin, Qwen3MoeForQuestionAnswering):
    """`transformers.Qwen3MoeForQuestionAnswering` with BHyT sites."""

    config_class = BHyTQwen3MoeConfig
