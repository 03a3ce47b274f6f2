"""DiffLlama with BHyT sites."""

from transformers import (
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    DiffLlamaForQuestionAnswering,
    DiffLlamaForSequenceClassification,
    DiffLlamaForTokenClassification,
    DiffLlamaModel,
)
from transformers.models.diffllama import modeling_diffllama

from bhyt.hf.config import BHyTConfigMixin, strict
from bhyt.hf.layer import ConvertedLayer
from bhyt.hf.model import BHyTModelMixin


@strict
class BHyTDiffLlamaConfig(BHyTConfigMixin, DiffLlamaConfig):
    model_type = "bhyt_diffllama"


class DiffLlamaDecoderLayer(ConvertedLayer, modeling_diffllama.DiffLlamaDecoderLayer):
    pass


class BHyTDiffLlamaModel(BHyTModelMixin, DiffLlamaModel):
    config_class = BHyTDiffLlamaConfig


class BHyTDiffLlamaForCausalLM(BHyTModelMixin, DiffLlamaForCausalLM):
    config_class = BHyTDiffLlamaConfig


class BHyTDiffLlamaForSequenceClassification(BHyTModelMixin, DiffLlamaForSequenceClassification):
    config_class = BHyTDiffLlamaConfig


class BHyTDiffLlamaForTokenClassification(BHyTModelMixin, DiffLlamaForTokenClassification):
    config_class = BHyTDiffLlamaConfig


class BHyTDiffLlamaForQuestionAnswering(BHyTModelMixin, DiffLlamaForQuestionAnswering):
    config_class = BHyTDiffLlamaConfig
