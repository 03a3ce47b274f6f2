"""Small models of Hugging Face, plain and converted, and what the formulas in float64 say of them."""

from pathlib import Path
from typing import Any, Dict, Optional

import torch
from torch import Tensor, nn

import bhyt
from support.packages import needs

transformers = needs("transformers")
hf = needs("bhyt.hf")

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
SIZES = dict(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=128, tie_word_embeddings=False,
)
LORA = dict(r=4, lora_alpha=8, target_modules=["v_proj", "o_proj", "gate_proj"], lora_dropout=0.5)


def stock(family: str = "Llama", head: str = "ForCausalLM", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | options)
    return getattr(transformers, f"{family}{head}")(config).eval()


def converted(
    family: str = "Llama", sliding_window: Optional[int] = None, head: str = "ForCausalLM",
    tie_word_embeddings: bool = False, sizes: Optional[Dict[str, Any]] = None, **options: Any,
) -> nn.Module:
    """A converted model whose gains and lambdas are not what they were initialised to, whose branches are as large
    as the stream: what the second sites do is seen in the logits."""
    sizes = {"tie_word_embeddings": tie_word_embeddings} | (sizes or {})
    model = stock(family, head, **sizes | ({"sliding_window": sliding_window} if sliding_window else {}))
    hf.convert(model, **{"seq_len": 32} | options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and ".self_attn." not in name:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 1.5))
            elif "v_proj.weight" in name or "o_proj.weight" in name:
                parameter.mul_(6)
            elif ".mlp." in name:
                parameter.mul_(20)
    hf.refresh(model)
    return model


def ids(length: int = 12, batch: int = 2) -> Tensor:
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(1))


def c_by_hand(layer: nn.Module, seq_len: int = 32) -> Tensor:
    """||W_V W_O||_F^2 / (T d) in float64, from the whole d x d product."""
    v, o = (projection.weight.detach().double() for projection in (layer.self_attn.v_proj, layer.self_attn.o_proj))
    values = v.view(2, 16, 64).repeat_interleave(2, 0).reshape(64, 64)
    return (o @ values).square().sum() / (seq_len * 64)


def logits_by_hand(model: nn.Module, tokens: Tensor, eps: float = 1e-6, cache: Any = None) -> Tensor:
    """SPEC.md section 1 for a float64 model, with its own attention and MLP; tokens follow those in the cache."""
    config, body = model.config, model.model

    def site(x: Tensor, variance: Tensor, norm: nn.Module) -> Tensor:
        a = norm.lam / (config.bhyt_kappa * torch.sqrt(variance + eps))
        return norm.weight * torch.tanh(a * x)

    x = body.embed_tokens(tokens)
    past = cache.get_seq_length() if cache is not None else 0
    end = past + tokens.shape[1]
    rotary = body.rotary_emb(x, position_ids=torch.arange(past, end)[None])
    mask = torch.full((end - past, end), float("-inf"), dtype=x.dtype).triu(past + 1)[None, None]
    more = {"past_key_values": cache} if cache is not None else {}
    for index, layer in enumerate(body.layers):
        first, second, attention = layer.input_layernorm, layer.post_attention_layernorm, layer.self_attn
        v = x.square().mean(-1, keepdim=True)
        y = site(x, v, first)
        branch = attention(hidden_states=y, position_embeddings=rotary, attention_mask=mask, **more)[0]
        x = x + branch
        if config.norm_type == "bhytstar" or index < config.var_approx_exact_layers:
            v = x.square().mean(-1, keepdim=True)
        else:
            c = c_by_hand(layer, config.seq_len)
            if config.use_gamma_var:
                c = c * first.weight.detach().square().mean()
            v = v + c * first.lam.detach() ** 2 / config.bhyt_kappa**2
        x = x + layer.mlp(site(x, v, second))
    last = body.norm
    x = site(x, x.square().mean(-1, keepdim=True), last) if isinstance(last, bhyt.BHyT) else last(x)
    return model.lm_head(x)


def offsets(model: nn.Module) -> Tensor:
    sites = [module for name, module in model.named_modules() if name.endswith("post_attention_layernorm")]
    return torch.cat([site.variance_offset for site in sites])


def offsets_by_hand(layers: Any) -> Tensor:
    """c lam1^2 / kappa^2 in float64 of plain layers, from the weights as they are."""
    pairs = [(c_by_hand(layer), layer.input_layernorm.lam.detach().double()[0]) for layer in layers]
    return torch.stack([c * lam**2 / 100 for c, lam in pairs])


def close(actual: Tensor, expected: Tensor) -> bool:
    return torch.allclose(actual.double(), expected, rtol=1e-5, atol=0)


def adapted(model: nn.Module, **options: Any) -> nn.Module:
    """The model in LoRA (or DoRA) with adapters that are not zero; dropout that a refresh must not see."""
    peft = needs("peft")
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**LORA | options))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return wrapped


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(SIZES["vocab_size"])}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(unk_token="w0", pad_token="w0", eos_token="w0")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.save_pretrained(folder)
