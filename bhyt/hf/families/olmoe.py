"""OLMoE with BHyT sites."""

from transformers import OlmoeConfig, OlmoeForCausalLM, OlmoeModel
from transformers.models.olmoe import modeling_olmoe

from bhyt.hf.config import BHyTConfigMixin, strict
from bhyt.hf.layer import ConvertedLayer
from bhyt.hf.model import BHyTModelMixin


@strict
class BHyTOlmoeConfig(BHyTConfigMixin, OlmoeConfig):
    """`transformers.OlmoeConfig` with the fields of `bhyt.hf.config.SiteFields`."""

    model_type = "bhyt_olmoe"


class OlmoeDecoderLayer(ConvertedLayer, modeling_olmoe.OlmoeDecoderLayer):
    """The decoder layer of `transformers`, with BHyT sites."""


class BHyTOlmoeModel(BHyTModelMixin, OlmoeModel):
    """`transformers.OlmoeModel` with BHyT sites."""

    config_class = BHyTOlmoeConfig


class BHyTOlmoeForCausalLM(BHyTModelMixin, OlmoeForCausalLM):
    """`transformers.OlmoeForCausalLM` with BHyT sites."""

    config_class = BHyTOlmoeConfig
