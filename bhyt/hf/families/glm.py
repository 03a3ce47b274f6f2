"""GLM with BHyT sites."""

from transformers import GlmConfig, GlmForCausalLM, GlmForSequenceClassification, GlmForTokenClassification, GlmModel
from transformers.models.glm import modeling_glm

from bhyt.hf.config import BHyTConfigMixin, strict
from bhyt.hf.layer import ConvertedLayer
from bhyt.hf.model import BHyTModelMixin


@strict
class BHyTGlmConfig(BHyTConfigMixin, GlmConfig):
    model_type = "bhyt_glm"


class GlmDecoderLayer(ConvertedLayer, modeling_glm.GlmDecoderLayer):
    pass


class BHyTGlmModel(BHyTModelMixin, GlmModel):
    config_class = BHyTGlmConfig


class BHyTGlmForCausalLM(BHyTModelMixin, GlmForCausalLM):
    config_class = BHyTGlmConfig


class BHyTGlmForSequenceClassification(BHyTModelMixin, GlmForSequenceClassification):
    config_class = BHyTGlmConfig


class BHyTGlmForTokenClassification(BHyTModelMixin, GlmForTokenClassification):
    config_class = BHyTGlmConfig
