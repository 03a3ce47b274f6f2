"""Llama-like models that differ in their normalisation only: variants of one base model, whose matrices they share."""

import copy
import importlib.util
import math
import sys
from dataclasses import dataclass
from typing import Any, Callable, Optional

import common
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

import bhyt.hf
from bhyt.folding import fold_gain

sys.path.insert(0, str(common.REPOSITORY / "examples"))
from pretraining.norms import DyT, ScaledEmbedding  # noqa: E402
from pretraining_hf.presets import PRESETS as PRETRAINING  # noqa: E402


@dataclass(frozen=True)
class Preset:
    """A model's shape and the work it is given; `config` as LlamaConfig takes it, embeddings tied."""

    config: dict[str, Any]
    dtypes: str  # comma list
    compiled: str  # those of them that are compiled too, which takes half a minute per model and task on two cores
    batch: int  # of a training step
    length: int  # of its sequences, and the T that approximate sites are built for
    prompt: int  # tokens in the cache before decoding, batch 1
    steps: int  # tokens decoded per call


def _shape(d: int, layers: int, heads: int, kv_heads: int, ffn: int, **rest: Any) -> dict[str, Any]:
    return dict(hidden_size=d, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
                intermediate_size=ffn, **rest)  # fmt: skip


PRESETS = {
    "smoke": Preset(_shape(32, 2, 4, 2, 96, vocab_size=64), "fp32", "fp32", batch=2, length=16, prompt=4, steps=4),
    "cpu": Preset(
        _shape(512, 2, 8, 2, 1408, vocab_size=2048), "fp32,bf16", "fp32", batch=2, length=256, prompt=64, steps=16
    ),
    # What bench_loading.py loads: 202M parameters.
    "200m": Preset(
        _shape(1024, 15, 16, 4, 2816, vocab_size=32000), "fp32", "fp32", batch=2, length=512, prompt=64, steps=16
    ),
    # The 374M model of arXiv 2601.09719, and Llama-3.2-1B.
    **{
        name: Preset(PRETRAINING[name].shape, "bf16", "bf16", batch=4, length=2048, prompt=128, steps=64)
        for name in ("374m", "1b")
    },
}


def make_base(preset: Preset, dtype: torch.dtype, device: str) -> nn.Module:
    """The model as `transformers` has it, weights at random from a fixed seed."""
    torch.manual_seed(0)
    longest = max(preset.length, preset.prompt + preset.steps)
    config = LlamaConfig(**{"tie_word_embeddings": True, **preset.config}, max_position_embeddings=longest)
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=dtype)


# ---- variants: each changes a copy of the base model, of which it keeps the matrices and the gains


def _replace_norms(model: nn.Module, make: Callable[[int, float], nn.Module]) -> None:
    """make(d, eps) in place of every norm, with its gain, device and dtype."""
    owners = [(layer, name) for layer in model.model.layers for name in ("input_layernorm", "post_attention_layernorm")]
    for owner, name in (*owners, (model.model, "norm")):
        norm = getattr(owner, name)
        site = make(norm.weight.numel(), norm.variance_epsilon).to(norm.weight)
        site.weight = norm.weight
        setattr(owner, name, site)


def _as_is(model: nn.Module, seq_len: int) -> None:
    pass


def _torch_rms_norm(model: nn.Module, seq_len: int) -> None:
    _replace_norms(model, lambda d, eps: nn.RMSNorm(d, eps=eps))


def _liger_rms_norm(model: nn.Module, seq_len: int) -> None:
    from liger_kernel.transformers import LigerRMSNorm

    _replace_norms(model, lambda d, eps: LigerRMSNorm(d, eps=eps))


def _dyt(model: nn.Module, seq_len: int) -> None:
    _replace_norms(model, lambda d, eps: DyT(d))
    embedding = model.model.embed_tokens
    scaled = ScaledEmbedding(embedding.num_embeddings, embedding.embedding_dim).to(embedding.weight)
    scaled.weight = embedding.weight
    model.model.embed_tokens = scaled


def _peri_ln(model: nn.Module, seq_len: int) -> None:
    """A second norm behind each sub-layer (arXiv 2502.02732): behind the projection that is the last thing it does."""
    for layer in model.model.layers:
        norm = layer.input_layernorm
        behind = (LlamaRMSNorm(norm.weight.numel(), norm.variance_epsilon).to(norm.weight) for _ in range(2))
        layer.self_attn.o_proj = nn.Sequential(layer.self_attn.o_proj, next(behind))
        layer.mlp.down_proj = nn.Sequential(layer.mlp.down_proj, next(behind))


class ScaledNorm(nn.Module):
    """LayerNorm-Scaling: a norm's output divided by the root of its layer's index, from 1 (arXiv 2502.05795)."""

    def __init__(self, norm: nn.Module, index: int) -> None:
        super().__init__()
        self.norm, self.scale = norm, 1 / math.sqrt(index)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) * self.scale


def _lns(model: nn.Module, seq_len: int) -> None:
    for index, layer in enumerate(model.model.layers, 1):
        layer.input_layernorm = ScaledNorm(layer.input_layernorm, index)
        layer.post_attention_layernorm = ScaledNorm(layer.post_attention_layernorm, index)


def _bhyt_exact(model: nn.Module, seq_len: int) -> None:
    bhyt.hf.convert(model, norm_type="bhytstar")


def _bhyt(model: nn.Module, seq_len: int) -> None:
    bhyt.hf.convert(model, seq_len=seq_len)


class SwappedLayer(LlamaDecoderLayer):
    """A decoder layer whose norms became sites and that passes the variance on; every residual add stays an op."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        y, variance = self.input_layernorm.forward_with_variance(hidden_states)
        hidden_states = hidden_states + self.self_attn(hidden_states=y, **kwargs)[0]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states, variance))


def _bhyt_swapped(model: nn.Module, seq_len: int) -> None:
    _bhyt(model, seq_len)
    for layer in model.model.layers:
        layer.__class__ = SwappedLayer


def _bhyt_folded(model: nn.Module, seq_len: int) -> None:
    _bhyt(model, seq_len)
    fold_gain(model)


# ---- providers


def _sites(*names: str) -> Callable[[nn.Module], bool]:
    return lambda module: type(module).__name__ in names


@dataclass(frozen=True)
class Provider:
    build: Callable[[nn.Module, int], None]
    is_site: Callable[[nn.Module], bool]
    sites: tuple[int, int]  # per layer, and besides
    tasks: tuple[str, ...] = ("train", "decode")
    modes: tuple[str, ...] = ("eager", "compiled")
    decompose: str = "none"  # what `bhyt.decompose_when_compiling` is set to
    cuda_module: str = ""  # needs this module, and a GPU
    own_matrices: bool = False  # it changes them


BASELINE = "HF RMSNorm"
PROVIDERS = {
    BASELINE: Provider(_as_is, _sites("LlamaRMSNorm"), (2, 1)),
    "F.rms_norm": Provider(_torch_rms_norm, _sites("RMSNorm"), (2, 1)),
    "Liger RMSNorm": Provider(_liger_rms_norm, _sites("LigerRMSNorm"), (2, 1), cuda_module="liger_kernel"),
    "DyT": Provider(_dyt, _sites("DyT"), (2, 1)),
    "Peri-LN": Provider(_peri_ln, _sites("LlamaRMSNorm"), (4, 1)),
    "LNS": Provider(_lns, _sites("ScaledNorm"), (2, 0)),
    "BHyT exact": Provider(_bhyt_exact, _sites("BHyT"), (2, 0)),
    "BHyT, swapped modules": Provider(_bhyt_swapped, _sites("BHyT", "BHyTApprox"), (2, 0)),
    "BHyT": Provider(_bhyt, _sites("BHyT", "BHyTApprox"), (2, 0)),
    "BHyT, formulas": Provider(_bhyt, _sites("BHyT", "BHyTApprox"), (2, 0), modes=("compiled",), decompose="all"),
    "BHyT, gain folded": Provider(
        _bhyt_folded, _sites("BHyT", "BHyTApprox"), (2, 0), tasks=("decode",), own_matrices=True
    ),
}


def why_absent(name: str, device: str) -> Optional[str]:
    """Why a provider cannot run here, or None."""
    module = PROVIDERS[name].cuda_module
    if module and torch.device(device).type != "cuda":
        return "runs on CUDA only"
    if module and importlib.util.find_spec(module) is None:
        return f"{module} is not installed"
    return None


def build(name: str, base: nn.Module, seq_len: int) -> nn.Module:
    """A variant of `base`, which stays as it is.

    Raises:
        RuntimeError: the variant has another number of sites than it should.
    """
    provider = PROVIDERS[name]
    model = copy.deepcopy(base, {} if provider.own_matrices else {id(p): p for p in base.parameters()})
    provider.build(model, seq_len)
    per_layer, besides = provider.sites
    expected, found = per_layer * len(model.model.layers) + besides, count_sites(name, model)
    if found != expected:
        raise RuntimeError(f"{name}: expected {expected} sites, found {found}")
    return model


def count_sites(name: str, model: nn.Module) -> int:
    """Modules of a variant that are sites of its kind."""
    return sum(map(PROVIDERS[name].is_site, model.modules()))
