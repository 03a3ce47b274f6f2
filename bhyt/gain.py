"""c, a number from W_V and W_O: by it an approximate site estimates the variance that its block's attention adds."""

from typing import Optional

import torch
from torch import Tensor


def whole(weight: Tensor) -> Tensor:
    """Gather a weight that FSDP2 or tensor parallelism has sharded. Every process must call.

    Args:
        weight: a tensor, or a DTensor.

    Returns:
        The whole weight; a weight that is not sharded as it is.
    """
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


@torch.no_grad()
def attention_gain(
    v_weight: Tensor, o_weight: Tensor, seq_len: int, kv_groups: int = 1, *, head_dim: Optional[int] = None
) -> Tensor:
    """c = ||W_V W_O||_F^2 / (seq_len * d), so that v' = v + c * lam1^2 / kappa^2 (arXiv 2601.09719).

    With grouped-query attention several query heads share a KV head. The column blocks of W_O that read one KV head are
    summed first. Then ||W_O W_V||_F^2 = sum of (W_V W_V^T) * (W_O^T W_O), without a d x d product.

    Sharded weights (DTensor) are gathered: every process that has a shard must call.

    Args:
        v_weight: W_V as `v_proj.weight` stores it, [kv_heads * head_dim, d], any floating dtype.
        o_weight: W_O as `o_proj.weight` stores it, [d, kv_heads * kv_groups * head_dim].
        seq_len: the sequence length T the model is built for.
        kv_groups: query heads per KV head (`num_key_value_groups`); 1 without grouped-query attention.
        head_dim: size of a head; needed when kv_groups > 1, to tell the columns of o_weight apart.

    Returns:
        c: a scalar tensor without gradient, on v_weight's device; float32 (float64 for float64 weights).

    Raises:
        ValueError: shapes that do not fit together, or numbers below 1.

    Examples:
        >>> import torch, bhyt
        >>> bhyt.attention_gain(torch.eye(4), torch.eye(4), seq_len=16)
        tensor(0.0625)
    """
    v_weight, o_weight = whole(v_weight), whole(o_weight)
    if v_weight.dim() != 2 or o_weight.dim() != 2:
        raise ValueError(
            f"expected matrices, got v_weight {list(v_weight.shape)} and o_weight {list(o_weight.shape)}"
        )
    if not all(isinstance(n, int) and n >= 1 for n in (seq_len, kv_groups)):
        raise ValueError(f"seq_len and kv_groups: expected integers >= 1, got {seq_len} and {kv_groups}")
    kv_size, d = v_weight.shape
    if o_weight.shape != (d, kv_groups * kv_size):
        raise ValueError(
            f"o_weight: expected [{d}, {kv_groups * kv_size}] for v_weight {list(v_weight.shape)} and"
            f" {kv_groups} query heads per KV head, got {list(o_weight.shape)}"
        )
    dtype = torch.promote_types(v_weight.dtype, torch.float32)
    values, output = v_weight.to(dtype), o_weight.to(dtype)
    if kv_groups > 1:
        if head_dim is None or head_dim < 1 or kv_size % head_dim:
            raise ValueError(f"head_dim: expected a divisor of {kv_size} when kv_groups > 1, got {head_dim}")
        output = output.reshape(d, kv_size // head_dim, kv_groups, head_dim).sum(2).reshape(d, kv_size)
    return ((values @ values.T) * (output.T @ output)).sum() / (seq_len * d)


def value_weight(qkv_weight: Tensor, heads: int, kv_heads: int, *, grouped: bool) -> Tensor:
    """W_V, as `attention_gain` takes it, out of the weight of a fused projection of queries, keys and values.

    Args:
        qkv_weight: [(heads + 2 * kv_heads) * head_dim, d], all of it, any dtype. Gather an engine's shards before.
            DTensors are gathered here, by every process that has a shard.
        heads: query heads.
        kv_heads: KV heads, a divisor of heads.
        grouped: True where each KV head's rows follow those of its query heads (torchtitan's wqkv, Megatron-Core's
            linear_qkv): q .. q k v, q .. q k v, ..; False where all queries come first, then all keys, then all values
            (vLLM's qkv_proj, Phi-3's).

    Returns:
        [kv_heads * head_dim, d] in the dtype of qkv_weight; no copy where the rows lie together.

    Raises:
        ValueError: the number of rows does not fit the numbers of heads, or a number is below 1.
    """
    weight = whole(qkv_weight)
    if not all(isinstance(n, int) and n >= 1 for n in (heads, kv_heads)) or heads % kv_heads:
        raise ValueError(f"heads: expected a multiple of kv_heads, both integers >= 1, got {heads} and {kv_heads}")
    parts = heads + 2 * kv_heads
    if weight.dim() != 2 or weight.shape[0] % parts or not weight.shape[0]:
        raise ValueError(
            f"qkv_weight: expected [{parts} * head_dim, d] for {heads} query and {kv_heads} KV heads,"
            f" got {list(weight.shape)}"
        )
    if not grouped:
        return weight[weight.shape[0] // parts * (heads + kv_heads) :]
    return weight.reshape(kv_heads, parts // kv_heads, -1, weight.shape[1])[:, -1].flatten(0, 1)
