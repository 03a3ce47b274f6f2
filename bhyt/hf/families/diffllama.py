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
    """`transformers.DiffLlamaConfig` with the fields of `bhyt.hf.config.SiteFields`."""

    model_type = "bhyt_diffllama"


class DiffLlamaDecoderLayer(ConvertedLayer, modeling_diffllama.DiffLlamaDecoderLayer):
    """The decoder layer of `transformers`, with BHyT sites."""


class BHyTDiffLlamaModel(BHyTModelMixin, DiffLlamaModel):
    """`transformers.DiffLlamaModel` with BHyT sites."""

    config_class = BHyTDiffLlamaConfig


class BHyTDiffLlamaForCausalLM(BHyTModelMixin, DiffLlamaForCausalLM):
    """`transformers.DiffLlamaForCausalLM` with BHyT sites."""

    config_class = BHyTDiffLlamaConfig


class BHyTDiffLlamaForSequenceClassification(BHyTModelMixin, DiffLlamaForSequenceClassification):
    """`transformers.DiffLlamaForSequenceClassification` with BHyT sites."""

    config_class = BHyTDiffLlamaConfig


class BHyTDiffLlamaForTokenClassification(BHyTModelMixin, DiffLlamaForTokenClassification):
    """`transformers.DiffLlamaForTokenClassification` with BHyT sites."""

    config_class = BHyTDiffLlamaConfig


class BHyTDiffLlamaForQuestionAnswering(BHyTModelMixin, DiffLlamaForQuestionAnswering):
    """`transformers.DiffLlamaForQuestionAnswering` with BHyT sites."""

    config_class = BHyTDiffLlamaConfig
