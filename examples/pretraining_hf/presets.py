"""Sizes of model with the settings they were published with.

71m, 130m    the LLaMA family of GaLore (arXiv 2403.03507), which Mix-LN (2412.13795) and LayerNorm-Scaling (2502.05795)
             compare norms with; shapes from their configs, settings from Mix-LN's scripts: sequences of 256 tokens, 512
             a step, Adam without decay or clipping, a cosine to a tenth.
374m, 1b     BHyT (2601.09719): the authors' own 374M shape with Llama 3's vocabulary, and Llama-3.2-1B. Of their
             script: sequences of 1024, 16 a device and step, 20,000 steps of the 1B model, AdamW (0.9, 0.95), decay and
             the middle one of the learning rates that they search. They do not give the number of devices: 128
             sequences are the batch of eight. Nor do they give the steps of the 374M model: it takes the 1B one's.
tiny         nobody's, for minutes on a CPU, to see that all parts work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_LLAMA_3_2 = dict(vocab_size=128256, rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
                  rms_norm_eps=1e-5, tie_word_embeddings=True)  # fmt: skip
_GALORE = dict(vocab_size=32000, rms_norm_eps=1e-6, tie_word_embeddings=False)


def _shape(d: int, layers: int, heads: int, kv_heads: int, ffn: int, **rest: Any) -> dict[str, Any]:
    return dict(hidden_size=d, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
                intermediate_size=ffn, **rest)  # fmt: skip


@dataclass(frozen=True)
class Preset:
    shape: dict[str, Any]  # as LlamaConfig takes it
    seq_len: int
    batch: int  # sequences per optimiser step, of all processes together
    micro_batch: int  # at most so many per device at once
    steps: int
    warmup: int
    lr: float  # the peak; a cosine goes down to a tenth
    weight_decay: float
    clip: float  # 0: none
    beta2: float
    held_out: float = 0.01  # share of the documents
    eval_sequences: int = 512


PRESETS = {
    "tiny": Preset(
        _shape(128, 4, 4, 2, 352, vocab_size=4096, rms_norm_eps=1e-6, tie_word_embeddings=True),
        seq_len=128, batch=16, micro_batch=16, steps=300, warmup=30, lr=3e-3, weight_decay=0.1, clip=1.0, beta2=0.95,
        held_out=0.05, eval_sequences=64,
    ),
    "71m": Preset(
        _shape(512, 12, 8, 8, 1368, **_GALORE),
        seq_len=256, batch=512, micro_batch=64, steps=10_000, warmup=1_000, lr=1e-3,
        weight_decay=0.0, clip=0.0, beta2=0.999,
    ),
    "130m": Preset(
        _shape(768, 12, 12, 12, 2048, **_GALORE),
        seq_len=256, batch=512, micro_batch=64, steps=20_000, warmup=2_000, lr=1e-3,
        weight_decay=0.0, clip=0.0, beta2=0.999,
    ),
    "374m": Preset(
        _shape(1024, 16, 16, 4, 4096, **_LLAMA_3_2),
        seq_len=1024, batch=128, micro_batch=16, steps=20_000, warmup=1_000, lr=3e-4,
        weight_decay=0.1, clip=1.0, beta2=0.95,
    ),
    "1b": Preset(
        _shape(2048, 16, 32, 8, 8192, **_LLAMA_3_2),
        seq_len=1024, batch=128, micro_batch=16, steps=20_000, warmup=1_000, lr=3e-4,
        weight_decay=0.1, clip=1.0, beta2=0.95,
    ),
}  # fmt: skip
