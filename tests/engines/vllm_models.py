"""The models of test_vllm.py, and what transformers answers to its prompts."""

from pathlib import Path
from typing import Any, Dict, List, Tuple

import torch
from torch import nn

from support.hf_models import converted, hf

COUNT = 24
SHARED = torch.randint(1, 64, (40,), generator=torch.Generator().manual_seed(2)).tolist()
PROMPTS = [SHARED[:3], SHARED[7:16], SHARED, SHARED + SHARED[5:28]]  # the last two begin with the same 40
EXPERTS = dict(num_experts_per_tok=2, pad_token_id=0)
WIDE = dict(hidden_size=128, pad_token_id=0)  # families that want heads * head_dim to be the width
BACKEND = {"hf_overrides": {"architectures": ["BHyTForCausalLM"]}}

# name -> (how the model is made, options of vllm.LLM)
VARIANTS: Dict[str, Tuple[Dict[str, Any], Dict[str, Any]]] = {
    "Llama": ({}, {}),
    "Llama, prefix caching": ({}, {"enable_prefix_caching": True, "block_size": 32}),
    "Llama, exact": ({"norm_type": "bhytstar", "last_layer_lam": 1.5}, {}),
    "Llama, frozen lam": ({"learnable_lam": False}, {}),
    "Llama, last_layer_lam, exact_layers": ({"last_layer_lam": 1.5, "exact_layers": 1}, {}),
    "Llama, no offsets": ({}, {}),
    "Llama, use_gamma_var, no offsets": ({"use_gamma_var": True, "seq_len": 4}, {}),
    "Llama, tied, no offsets": ({"tie_word_embeddings": True}, {}),
    "Llama, compiled": ({}, {"enforce_eager": False}),
    "Mistral": ({"family": "Mistral", "sliding_window": 8}, {}),
    "Qwen2": ({"family": "Qwen2", "sizes": WIDE}, {}),
    "Qwen3": ({"family": "Qwen3", "tie_word_embeddings": True}, {}),
    "Qwen2, wider heads": ({"family": "Qwen2", "sizes": WIDE | {"head_dim": 64}}, BACKEND),
    "Qwen2, some layers with a window": ({"family": "Qwen2", "sizes": WIDE | dict(
        use_sliding_window=True, sliding_window=8, max_window_layers=1)}, BACKEND),
    "Qwen3, biases": ({"family": "Qwen3", "sizes": {"attention_bias": True}}, BACKEND),
    "Mixtral": ({"family": "Mixtral", "sizes": EXPERTS | {"num_local_experts": 4}}, {}),
    "Qwen3Moe": ({"family": "Qwen3Moe", "sizes": EXPERTS | {"num_experts": 4, "moe_intermediate_size": 32}}, {}),
    "Olmoe": ({"family": "Olmoe", "sizes": WIDE | EXPERTS | {"num_experts": 4}}, {}),
    "Granite": ({"family": "Granite", "sizes": WIDE | dict(
        logits_scaling=4.0, embedding_multiplier=3.0, attention_multiplier=0.3)}, {}),
    "Helium, exact with LoRA enabled": (
        {"family": "Helium", "norm_type": "bhytstar", "sizes": WIDE}, {"enable_lora": True}),
    "Helium": ({"family": "Helium", "sizes": WIDE}, {}),
    "Glm": ({"family": "Glm", "sizes": WIDE}, {}),
    "Phi3": ({"family": "Phi3", "norm_type": "bhytstar", "sizes": WIDE}, {}),
}  # fmt: skip


def make(options: Dict[str, Any]) -> nn.Module:
    options = dict(options)
    sizes = {"head_dim": 32} | options.pop("sizes", {})  # what vLLM's attention on a CPU takes
    model = converted(**{"seq_len": 4, "sizes": sizes} | options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_()
    return model


def logprobs(model: nn.Module) -> List[List[float]]:
    """Of each prompt's tokens but the first."""
    rows = []
    with torch.no_grad():
        for prompt in PROMPTS:
            scores = model(torch.tensor([prompt])).logits[0].float().log_softmax(-1)
            rows.append([scores[i, token].item() for i, token in enumerate(prompt[1:])])
    return rows


def greedy(model: nn.Module) -> List[List[int]]:
    options = dict(max_new_tokens=COUNT, min_new_tokens=COUNT, do_sample=False, eos_token_id=None, pad_token_id=0)
    return [model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist() for prompt in PROMPTS]


def difference(these: List[List[float]], those: List[List[float]]) -> float:
    return max(abs(x - y) for row, other in zip(these, those) for x, y in zip(row, other))


def drop_offsets(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.endswith("variance_offset")}
    assert len(weights) - len(kept) == 3
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def other_weights(options: Dict[str, Any]) -> nn.Module:
    """A model of the same sizes with other offsets and other logits."""
    model = make(options)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.mul_(1.5)
            layer.mlp.up_proj.weight.mul_(-1)
    hf.refresh(model)
    return model


def with_head(head: str) -> nn.Module:
    return converted(head=head, seq_len=4, sizes=dict(head_dim=32, num_labels=3, pad_token_id=0))
