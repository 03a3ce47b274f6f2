"""Llama with BHyT sites."""

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)
from transformers.models.llama import modeling_llama

from bhyt.hf.config import BHyTConfigMixin, strict
from bhyt.hf.layer import ConvertedLayer
from bhyt.hf.model import BHyTModelMixin


@strict
class BHyTLlamaConfig(BHyTConfigMixin, LlamaConfig):
    """`transformers.LlamaConfig` with the fields of `bhyt.hf.config.SiteFields`."""

    model_type = "bhyt_llama"


class LlamaDecoderLayer(ConvertedLayer, modeling_llama.LlamaDecoderLayer):
    """The decoder layer of `transformers`, with BHyT sites."""


class BHyTLlamaModel(BHyTModelMixin, LlamaModel):
    """`transformers.LlamaModel` with BHyT sites."""

    config_class = BHyTLlamaConfig


class BHyTLlamaForCausalLM(BHyTModelMixin, LlamaForCausalLM):
    """`transformers.LlamaForCausalLM` with BHyT sites."""

    config_class = BHyTLlamaConfig


class BHyTLlamaForSequenceClassification(BHyTModelMixin, LlamaForSequenceClassification):
    """`transformers.LlamaForSequenceClassification` with BHyT sites."""

    config_class = BHyTLlamaConfig


class BHyTLlamaForTokenClassification(BHyTModelMixin, LlamaForTokenClassification):
    """`transformers.LlamaForTokenClassification` with BHyT sites."""

    config_class = BHyTLlamaConfig


class BHyTLlamaForQuestionAnswering(BHyTModelMixin, LlamaForQuestionAnswering):
    """`transformers.LlamaForQuestionAnswering` with BHyT sites."""

    config_class = BHyTLlamaConfig
