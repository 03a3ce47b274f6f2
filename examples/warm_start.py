r"""Trains a small Llama with RMSNorm, then turns its norms into BHyT sites in several ways and trains each on.

    pip install ".[example,hf]"
    python examples/warm_start.py                        a few minutes on 2 CPU cores
    python examples/warm_start.py --text corpus.txt --steps 2000 --more 500

Prints the held-out loss at once and after --more steps, of the original and of each conversion. A warm start
(`bhyt.hf.convert(..., warm_start=True)`) keeps what the model has learnt, with exact sites nearly all of it.
"""

import argparse
import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import bhyt.hf
from pretraining.data import VOCAB, Corpus, load_corpus

SEQ_LEN, BATCH, REFRESH = 128, 8, 10

CONVERSIONS = {
    "cold": {},
    "cold, exact": dict(norm_type="bhytstar"),
    "warm, without the gain": dict(warm_start=True, use_gamma_var=False),
    "warm": dict(warm_start=True),
    "warm, exact": dict(warm_start=True, norm_type="bhytstar"),
}


def loss_of(model: nn.Module, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Nats per token; tokens, targets: [batch, SEQ_LEN]."""
    return F.cross_entropy(model(tokens, use_cache=False).logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def held_out(model: nn.Module, corpus: Corpus) -> float:
    return loss_of(model, *corpus.validation(64, SEQ_LEN)).item()


def train(model: nn.Module, corpus: Corpus, first: int, steps: int, lr: float) -> nn.Module:
    """Steps first, first + 1, .. of the data, with a linear warmup over 20 and a linear decay to a tenth of lr."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    converted = getattr(model.config, "norm_type", None) is not None
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / 20, 1 - 0.9 * step / steps)
        loss_of(model, *corpus.batch(first + step, BATCH, SEQ_LEN, seed=0)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if converted and step % REFRESH == REFRESH - 1:
            bhyt.hf.refresh(model)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", type=Path, default=[], help="default: Python's own sources")
    parser.add_argument("--steps", type=int, default=600, help="of the original (default: %(default)s)")
    parser.add_argument("--more", type=int, default=200, help="after the conversion (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=3e-3, help="of the original; a third of it afterwards")
    arguments = parser.parse_args()
    corpus = load_corpus(arguments.text, SEQ_LEN)
    torch.manual_seed(0)
    original = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCAB, hidden_size=96, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=SEQ_LEN, tie_word_embeddings=True,
    ))
    train(original, corpus, 0, arguments.steps, arguments.lr)
    print(f"{'':24} at once   after {arguments.more} steps")
    for name, options in {"RMSNorm": None, **CONVERSIONS}.items():
        model = copy.deepcopy(original)
        if options is not None:
            bhyt.hf.convert(model, seq_len=SEQ_LEN, **options)
        before = held_out(model, corpus)
        after = held_out(train(model, corpus, arguments.steps, arguments.more, arguments.lr / 3), corpus)
        print(f"{name:24} {before:7.4f}   {after:7.4f}", flush=True)


if __name__ == "__main__":
    main()
