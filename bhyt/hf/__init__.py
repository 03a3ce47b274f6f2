"""Hugging Face decoders with BHyT sites.

    import bhyt.hf                                    # the Auto classes know bhyt_llama, bhyt_qwen3, .. from here on

    bhyt.hf.convert(model, seq_len=2048)              # norms become sites, LlamaForCausalLM BHyTLlamaForCausalLM
    model.save_pretrained("folder")                   # Trainer and PEFT save it as any other model
    AutoModelForCausalLM.from_pretrained("folder")    # with trust_remote_code=True also where nothing was imported

For every family in `FAMILIES`: decoders whose layers have `input_layernorm`, `self_attn`, `post_attention_layernorm`
and `mlp`, in this order, with plain residual adds around attention and MLP. Parameter names stay; each site adds `lam`, an
approximate one `variance_offset`.
"""

from bhyt.hf import classes
from bhyt.hf.classes import FAMILIES
from bhyt.hf.conversion import convert, refresh
from bhyt.hf.loading import from_pretrained, load_authors_checkpoint
from bhyt.hf.training import refresh_callback

_CLASSES = classes.register()
globals().update({name: getattr(classes, name) for name in _CLASSES})

__all__ = [
    "FAMILIES",
    "convert",
    "from_pretrained",
    "load_authors_checkpoint",
    "refresh",
    "refresh_callback",
    *_CLASSES,
]
