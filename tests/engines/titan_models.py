"""Three small blocks of each of torchtitan's families, and the transformers config of the same model."""

from typing import Any

VOCABULARY, DIM, HEADS, KV_HEADS = 64, 32, 4, 2
_COMMON = {
    "hidden_size": DIM, "num_hidden_layers": 3, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCABULARY, "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip


class Llama3:
    """W_Q, W_K and W_V in one projection."""

    @staticmethod
    def spec() -> Any:
        from torchtitan.models.llama3 import model_registry

        return model_registry("debugmodel")

    @staticmethod
    def model() -> Any:
        from torchtitan.models import llama3
        from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm

        return llama3.Llama3Model.Config(
            dim=DIM,
            vocab_size=VOCABULARY,
            tok_embeddings=Embedding.Config(
                num_embeddings=VOCABULARY, embedding_dim=DIM, param_init=llama3._EMBEDDING_INIT
            ),
            norm=RMSNorm.Config(normalized_shape=DIM, param_init=llama3._NORM_INIT),
            lm_head=Linear.Config(in_features=DIM, out_features=VOCABULARY, param_init=llama3._output_linear_init(DIM)),
            layers=llama3._build_llama3_layers(
                n_layers=3, dim=DIM, n_heads=HEADS, n_kv_heads=KV_HEADS, hidden_dim=48, attn_backend="flex",
                rope=ComplexRoPE.Config(dim=DIM // HEADS, max_seq_len=128, theta=10000),
            ),
        )  # fmt: skip

    @staticmethod
    def hf_config() -> Any:
        from transformers import LlamaConfig

        return LlamaConfig(**_COMMON, intermediate_size=48, rms_norm_eps=1e-5, tie_word_embeddings=False)


class Qwen3:
    """Separate W_V, heads wider than DIM / HEADS, norms of queries and keys, tied embeddings."""

    head_dim, experts = 16, 0

    @classmethod
    def spec(cls) -> Any:
        from torchtitan.models.qwen3 import model_registry

        if cls.experts:
            return model_registry("debugmodel_moe", moe_comm_backend="standard")
        return model_registry("debugmodel")

    @classmethod
    def model(cls) -> Any:
        from torchtitan.models import qwen3
        from torchtitan.models.common import CosSinRoPE, Embedding, Linear

        shape = {
            "n_layers": 3, "dim": DIM, "n_heads": HEADS, "n_kv_heads": KV_HEADS, "head_dim": cls.head_dim,
            "attn_backend": "flex", "fuse_qkv": bool(cls.experts),
            "rope": CosSinRoPE.Config(dim=cls.head_dim, max_seq_len=128, theta=10000),
        }  # fmt: skip
        if cls.experts:
            experts = {"moe_hidden_dim": 24, "num_experts": cls.experts, "top_k": 2, "moe_comm_backend": "standard"}
            layers = qwen3._build_qwen3_moe_layers(**shape, **experts)
        else:
            layers = qwen3._build_qwen3_layers(**shape, hidden_dim=48)
        return qwen3.Qwen3Model.Config(
            dim=DIM,
            vocab_size=VOCABULARY,
            enable_weight_tying=True,
            tok_embeddings=Embedding.Config(
                num_embeddings=VOCABULARY, embedding_dim=DIM, param_init=qwen3._EMBEDDING_SKIP_INIT
            ),
            norm=qwen3._qwen3_norm(DIM),
            lm_head=Linear.Config(
                in_features=DIM, out_features=VOCABULARY, param_init={"weight": qwen3._EMBEDDING_INIT["weight"]}
            ),
            layers=layers,
        )

    @classmethod
    def hf_config(cls) -> Any:
        from transformers import Qwen3Config, Qwen3MoeConfig

        shape = {**_COMMON, "head_dim": cls.head_dim, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
        if not cls.experts:
            return Qwen3Config(**shape, intermediate_size=48)
        experts = {"moe_intermediate_size": 24, "num_experts": cls.experts, "num_experts_per_tok": 2}
        return Qwen3MoeConfig(**shape, **experts, norm_topk_prob=True, decoder_sparse_step=1)


class Qwen3MoE(Qwen3):
    """Experts in the MLP's place; W_Q, W_K and W_V in one projection."""

    experts = 4


FAMILIES = {"llama3": Llama3, "qwen3": Qwen3, "qwen3_moe": Qwen3MoE}
