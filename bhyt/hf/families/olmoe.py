"""OLMoE with BHyT sites."""

from transformers import OlmoeConfig, OlmoeForCausalLM, OlmoeModel
from transformers.models.olmoe import modeling_olmoe

from bhyt.hf.config import BHyTConfigMixin, strict
from bhyt.hf.layer import ConvertedLayer
from bhyt.hf.model import BHyTModelMixin


@strict
class BHyTOlmoeConfig(BHyTConfigMixin, OlmoeConfig):
    model_type = "bhyt_olmoe"


class OlmoeDecoderLayer(ConvertedLayer, modeling_olmoe.OlmoeDecoderLayer):
    pass


class BHyTOlmoeModel(BHyTModelMixin, OlmoeModel):
    config_class = BHyTOlmoeConfig


class BHyTOlmoeForCausalLM(BHyTModelMixin, OlmoeForCausalLM):
    config_class = BHyTOlmoeConfig
