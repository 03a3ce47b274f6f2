"""A trained model as a folder that `transformers.AutoModelForCausalLM` loads, with its tokenizer.

The decoder is a Llama in all but its norms, parameter names and the layout of rotary pairs included; so are these:

    bhyt-unit-gains, bhyt, bhyt-exact   bhyt.hf's BHyTLlamaForCausalLM
    rmsnorm                             LlamaForCausalLM
    layernorm                           StableLmForCausalLM, a Llama with LayerNorm
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .data import BOS
from .model import Decoder

EXPORTABLE = ("bhyt-unit-gains", "bhyt", "bhyt-exact", "rmsnorm", "layernorm")
BOS_TEXT = "<|bos|>"


def check_exportable(norms: list[str]) -> None:
    """
    Raises:
        ValueError: a norm without a model in transformers, or no transformers.
    """
    others = [norm for norm in norms if norm not in EXPORTABLE]
    if others:
        raise ValueError(
            f"--export: transformers has no model with {', '.join(others)}; it has for {', '.join(EXPORTABLE)}"
        )
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ValueError("--export needs transformers: pip install '.[hf]' in the repository") from error


def export(model: Decoder, norm: str, folder: Path) -> None:
    """The folder computes the same logits: the variance offsets are saved as they are now."""
    from transformers import AutoModelForCausalLM

    exported = AutoModelForCausalLM.from_config(_config(model, norm))
    state = model.state_dict()
    exported.load_state_dict({name if name.startswith("lm_head.") else f"model.{name}": state[name] for name in state})
    exported.save_pretrained(folder)
    _tokenizer(model.config.seq_len).save_pretrained(folder)


def _config(model: Decoder, norm: str) -> Any:
    import transformers

    import bhyt.hf

    config = model.config
    sizes = dict(
        vocab_size=config.vocab, hidden_size=config.dim, intermediate_size=config.mlp_dim,
        num_hidden_layers=config.layers, num_attention_heads=config.heads, num_key_value_heads=config.kv_heads,
        max_position_embeddings=config.seq_len, tie_word_embeddings=True, hidden_act="silu",
        bos_token_id=BOS, eos_token_id=BOS,  # a document ends where the next one begins
    )
    if norm == "layernorm":
        return transformers.StableLmConfig(**sizes, layer_norm_eps=model.norm.eps, partial_rotary_factor=1.0)
    sizes["rms_norm_eps"] = model.norm.eps
    if norm == "rmsnorm":
        return transformers.LlamaConfig(**sizes)
    site = model.layers[0].input_layernorm
    return bhyt.hf.BHyTLlamaConfig(
        **sizes, norm_type="bhytstar" if norm == "bhyt-exact" else "bhyt", seq_len=config.seq_len,
        bhyt_kappa=site.kappa, bhyt_eps=site.eps, use_gamma_var=norm == "bhyt-unit-gains",
    )


def _tokenizer(seq_len: int) -> Any:
    """Bytes and a BOS in front. Text that reads like BOS is bytes too: split_special_tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE({**_byte_characters(), BOS_TEXT: BOS}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TEXT} $A", pair=f"{BOS_TEXT} $A {BOS_TEXT} $B", special_tokens=[(BOS_TEXT, BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS_TEXT, eos_token=BOS_TEXT, model_max_length=seq_len,
        split_special_tokens=True, clean_up_tokenization_spaces=False,
    )


def _byte_characters() -> dict[str, int]:
    """The character by which ByteLevel writes each byte: Latin-1 where that is printable, else one beyond it."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = {character: ord(character) for character in alphabet if ord(character) < 256}
    rest = [byte for byte in range(256) if byte not in printable.values()]
    return printable | dict(zip(alphabet[len(printable) :], rest, strict=True))
