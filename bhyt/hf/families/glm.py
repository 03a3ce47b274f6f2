"""GLM with BHyT sites."""

from transformers import GlmConfig, GlmForCausalLM, GlmForSequenceClassification, GlmForTokenClassification, GlmModel
from transformers.models.glm import modeling_glm

from bhyt.hf.config import BHyTConfigMixin, strict
from bhyt.hf.layer import ConvertedLayer
from bhyt.hf.model import BHyTModelMixin


@strict
class BHyTGlmConfig(BHyTConfigMixin, GlmConfig):
    """`transformers.GlmConfig` with the fields of `bhyt.hf.config.SiteFields`."""

    model_type = "bhyt_glm"


class GlmDecoderLayer(ConvertedLayer, modeling_glm.GlmDecoderLayer):
    """The decoder layer of `transformers`, with BHyT sites."""


class BHyTGlmModel(BHyTModelMixin, GlmModel):
    """`transformers.GlmModel` with BHyT sites."""

    config_class = BHyTGlmConfig


class BHyTGlmForCausalLM(BHyTModelMixin, GlmForCausalLM):
    """`transformers.GlmForCausalLM` with BHyT sites."""

    config_class = BHyTGlmConfig


class BHyTGlmForSequenceClassification(BHyTModelMixin, GlmForSequenceClassification):
    """`transformers.GlmForSequenceClassification` with BHyT sites."""

    config_class = BHyTGlmConfig


class BHyTGlmForTokenClassification(BHyTModelMixin, GlmForTokenClassification):
    """`transformers.GlmForTokenClassification` with BHyT sites."""

    config_class = BHyTGlmConfig
