"""Hugging Face decoders with BHyT sites.

    import bhyt.hf                                    # the Auto classes know bhyt_llama, bhyt_qwen3, .. from here on

    bhyt.hf.convert(model, seq_len=2048)              # norms become sites, LlamaForCausalLM BHyTLlamaForCausalLM
    model.save_pretrained("folder")                   # Trainer and PEFT save it as any other model
    AutoModelForCausalLM.from_pretrained("folder")    # with trust_remote_code=True also where nothing was imported

For every family in `FAMILIES`: decoders whose layers have `input_layernorm`, `self_attn`, `post_attention_layernorm`
and `mlp`, in this order, with plain residual adds around attention and MLP. Parameter names stay. Each site adds `lam`,
and each approximate site adds `variance_offset`.
"""

from bhyt.hf.conversion import convert, refresh
from bhyt.hf.families import FAMILIES
from bhyt.hf.families.diffllama import (
    BHyTDiffLlamaConfig,
    BHyTDiffLlamaForCausalLM,
    BHyTDiffLlamaForQuestionAnswering,
    BHyTDiffLlamaForSequenceClassification,
    BHyTDiffLlamaForTokenClassification,
    BHyTDiffLlamaModel,
)
from bhyt.hf.families.glm import (
    BHyTGlmConfig,
    BHyTGlmForCausalLM,
    BHyTGlmForSequenceClassification,
    BHyTGlmForTokenClassification,
    BHyTGlmModel,
)
from bhyt.hf.families.granite import BHyTGraniteConfig, BHyTGraniteForCausalLM, BHyTGraniteModel
from bhyt.hf.families.helium import (
    BHyTHeliumConfig,
    BHyTHeliumForCausalLM,
    BHyTHeliumForSequenceClassification,
    BHyTHeliumForTokenClassification,
    BHyTHeliumModel,
)
from bhyt.hf.families.llama import (
    BHyTLlamaConfig,
    BHyTLlamaForCausalLM,
    BHyTLlamaForQuestionAnswering,
    BHyTLlamaForSequenceClassification,
    BHyTLlamaForTokenClassification,
    BHyTLlamaModel,
)
from bhyt.hf.families.mistral import (
    BHyTMistralConfig,
    BHyTMistralForCausalLM,
    BHyTMistralForQuestionAnswering,
    BHyTMistralForSequenceClassification,
    BHyTMistralForTokenClassification,
    BHyTMistralModel,
)
from bhyt.hf.families.mixtral import (
    BHyTMixtralConfig,
    BHyTMixtralForCausalLM,
    BHyTMixtralForQuestionAnswering,
    BHyTMixtralForSequenceClassification,
    BHyTMixtralForTokenClassification,
    BHyTMixtralModel,
)
from bhyt.hf.families.olmoe import BHyTOlmoeConfig, BHyTOlmoeForCausalLM, BHyTOlmoeModel
from bhyt.hf.families.phi3 import (
    BHyTPhi3Config,
    BHyTPhi3ForCausalLM,
    BHyTPhi3ForSequenceClassification,
    BHyTPhi3ForTokenClassification,
    BHyTPhi3Model,
)
from bhyt.hf.families.qwen2 import (
    BHyTQwen2Config,
    BHyTQwen2ForCausalLM,
    BHyTQwen2ForQuestionAnswering,
    BHyTQwen2ForSequenceClassification,
    BHyTQwen2ForTokenClassification,
    BHyTQwen2Model,
)
from bhyt.hf.families.qwen3 import (
    BHyTQwen3Config,
    BHyTQwen3ForCausalLM,
    BHyTQwen3ForQuestionAnswering,
    BHyTQwen3ForSequenceClassification,
    BHyTQwen3ForTokenClassification,
    BHyTQwen3Model,
)
from bhyt.hf.families.qwen3_moe import (
    BHyTQwen3MoeConfig,
    BHyTQwen3MoeForCausalLM,
    BHyTQwen3MoeForQuestionAnswering,
    BHyTQwen3MoeForSequenceClassification,
    BHyTQwen3MoeForTokenClassification,
    BHyTQwen3MoeModel,
)
from bhyt.hf.loading import from_pretrained, load_authors_checkpoint
from bhyt.hf.training import refresh_callback

__all__ = [
    "FAMILIES",
    "convert",
    "from_pretrained",
    "load_authors_checkpoint",
    "refresh",
    "refresh_callback",
    "BHyTDiffLlamaConfig",
    "BHyTDiffLlamaForCausalLM",
    "BHyTDiffLlamaForQuestionAnswering",
    "BHyTDiffLlamaForSequenceClassification",
    "BHyTDiffLlamaForTokenClassification",
    "BHyTDiffLlamaModel",
    "BHyTGlmConfig",
    "BHyTGlmForCausalLM",
    "BHyTGlmForSequenceClassification",
    "BHyTGlmForTokenClassification",
    "BHyTGlmModel",
    "BHyTGraniteConfig",
    "BHyTGraniteForCausalLM",
    "BHyTGraniteModel",
    "BHyTHeliumConfig",
    "BHyTHeliumForCausalLM",
    "BHyTHeliumForSequenceClassification",
    "BHyTHeliumForTokenClassification",
    "BHyTHeliumModel",
    "BHyTLlamaConfig",
    "BHyTLlamaForCausalLM",
    "BHyTLlamaForQuestionAnswering",
    "BHyTLlamaForSequenceClassification",
    "BHyTLlamaForTokenClassification",
    "BHyTLlamaModel",
    "BHyTMistralConfig",
    "BHyTMistralForCausalLM",
    "BHyTMistralForQuestionAnswering",
    "BHyTMistralForSequenceClassification",
    "BHyTMistralForTokenClassification",
    "BHyTMistralModel",
    "BHyTMixtralConfig",
    "BHyTMixtralForCausalLM",
    "BHyTMixtralForQuestionAnswering",
    "BHyTMixtralForSequenceClassification",
    "BHyTMixtralForTokenClassification",
    "BHyTMixtralModel",
    "BHyTOlmoeConfig",
    "BHyTOlmoeForCausalLM",
    "BHyTOlmoeModel",
    "BHyTPhi3Config",
    "BHyTPhi3ForCausalLM",
    "BHyTPhi3ForSequenceClassification",
    "BHyTPhi3ForTokenClassification",
    "BHyTPhi3Model",
    "BHyTQwen2Config",
    "BHyTQwen2ForCausalLM",
    "BHyTQwen2ForQuestionAnswering",
    "BHyTQwen2ForSequenceClassification",
    "BHyTQwen2ForTokenClassification",
    "BHyTQwen2Model",
    "BHyTQwen3Config",
    "BHyTQwen3ForCausalLM",
    "BHyTQwen3ForQuestionAnswering",
    "BHyTQwen3ForSequenceClassification",
    "BHyTQwen3ForTokenClassification",
    "BHyTQwen3Model",
    "BHyTQwen3MoeConfig",
    "BHyTQwen3MoeForCausalLM",
    "BHyTQwen3MoeForQuestionAnswering",
    "BHyTQwen3MoeForSequenceClassification",
    "BHyTQwen3MoeForTokenClassification",
    "BHyTQwen3MoeModel",
]
