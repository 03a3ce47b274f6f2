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
    model_type = "bhyt_llama"


class LlamaDecoderLayer(ConvertedLayer, modeling_llama.LlamaDecoderLayer):
    pass


class BHyTLlamaModel(BHyTModelMixin, LlamaModel):
    config_class = BHyTLlamaConfig


class BHyTLlamaForCausalLM(BHyTModelMixin, LlamaForCausalLM):
    config_class = BHyTLlamaConfig


class BHyTLlamaForSequenceClassification(BHyTModelMixin, LlamaForSequenceClassification):
    config_class = BHyTLlamaConfig


class BHyTLlamaForTokenClassification(BHyTModelMixin, LlamaForTokenClassification):
    config_class = BHyTLlamaConfig


class BHyTLlamaForQuestionAnswering(BHyTModelMixin, LlamaForQuestionAnswering):
    config_class = BHyTLlamaConfig
