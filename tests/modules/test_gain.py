"""bhyt.attention_gain: c = ||W_V W_O||_F^2 / (T d), with grouped-query attention (docs/mathematics.md)."""

import pytest
import torch
from torch import Tensor

import bhyt


def naive(v_weight: Tensor, o_weight: Tensor, seq_len: int, kv_groups: int, head_dim: int) -> float:
    """Repeat each KV head's rows for its query heads and build the d x d product, in float64."""
    d = v_weight.shape[1]
    heads = v_weight.double().reshape(-1, head_dim, d)
    repeated = heads.repeat_interleave(kv_groups, dim=0).reshape(-1, d)
    return ((o_weight.double() @ repeated).square().sum() / (seq_len * d)).item()


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("kv_heads, kv_groups, head_dim", ((4, 1, 8), (1, 4, 8), (2, 3, 5), (3, 2, 1)))
def test_against_the_product(
    kv_heads: int, kv_groups: int, head_dim: int, dtype: torch.dtype, device: str
) -> None:
    """Multi-head, multi-query and grouped-query attention: 1e-14 in float64, 1e-5 otherwise."""
    d = 24
    v = torch.randn(kv_heads * head_dim, d).to(device=device, dtype=dtype)
    o = torch.randn(d, kv_heads * kv_groups * head_dim).to(device=device, dtype=dtype)
    c = bhyt.attention_gain(v, o, 128, kv_groups, head_dim=head_dim)
    assert c.shape == () and c.device == v.device and not c.requires_grad
    assert c.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    bound = 1e-14 if dtype == torch.float64 else 1e-5
    assert c.item() == pytest.approx(naive(v, o, 128, kv_groups, head_dim), rel=bound)


def test_without_groups_head_dim_does_not_matter() -> None:
    """One query head per KV head: the plain product, head_dim or not."""
    v, o = torch.randn(12, 20), torch.randn(20, 12)
    c = bhyt.attention_gain(v, o, 7)
    assert torch.equal(c, bhyt.attention_gain(v, o, 7, 1, head_dim=4))
    assert c.item() == pytest.approx(naive(v, o, 7, 1, 12), rel=1e-5)


def test_what_it_predicts() -> None:
    """The variance of attention's output with uniform attention over T positions of unit-variance values is c
    times lam1^2 / kappa^2: a statistical check of the formula's meaning, within 5 %."""
    torch.manual_seed(0)
    d, seq_len, lam, kappa = 64, 256, 0.5, 10.0
    site = bhyt.BHyT(d, lam=lam, kappa=kappa)
    v, o = torch.randn(d, d) / 8, torch.randn(d, d) / 8
    with torch.no_grad():
        y = site(torch.randn(200, seq_len, d))
        out = y.mean(1) @ v.T @ o.T
    predicted = bhyt.attention_gain(v, o, seq_len) * (lam / kappa) ** 2
    assert out.square().mean().item() == pytest.approx(predicted.item(), rel=0.05)


def test_no_gradient_and_no_modification() -> None:
    """Weights that require grad are read without a graph, and stay."""
    v = torch.nn.Parameter(torch.randn(6, 10))
    o = torch.nn.Parameter(torch.randn(10, 12))
    before = v.detach().clone()
    c = bhyt.attention_gain(v, o, 4, 2, head_dim=3)
    assert c.grad_fn is None and torch.equal(v, before)


@pytest.mark.parametrize(
    "v_shape, o_shape, options, message",
    (
        ((6,), (10, 6), {}, "matrices"),
        ((6, 10), (10, 7), {}, r"o_weight: expected \[10, 6\].*\[10, 7\]"),
        ((6, 10), (9, 6), {}, r"o_weight: expected \[10, 6\].*\[9, 6\]"),
        ((6, 10), (10, 12), {"kv_groups": 2}, "head_dim.*None"),
        ((6, 10), (10, 12), {"kv_groups": 2, "head_dim": 4}, "head_dim.*divisor of 6.*4"),
        ((6, 10), (10, 6), {"seq_len": 0}, "seq_len.*0"),
        ((6, 10), (10, 6), {"seq_len": 2.5}, "seq_len.*2.5"),
        ((6, 10), (10, 6), {"kv_groups": 0}, "kv_groups.*0"),
    ),
)
def test_errors(v_shape: tuple, o_shape: tuple, options: dict, message: str) -> None:
    """Shapes and numbers that do not fit: ValueError with what was expected and given."""
    with pytest.raises(ValueError, match=message):
        bhyt.attention_gain(torch.zeros(v_shape), torch.zeros(o_shape), **{"seq_len": 4, **options})


@pytest.mark.parametrize("heads, kv_heads", ((4, 4), (6, 2), (3, 1)))
@pytest.mark.parametrize("grouped", (True, False))
def test_values_of_a_fused_projection(heads: int, kv_heads: int, grouped: bool) -> None:
    """`value_weight` gives back the W_V that was laid out as torchtitan and Megatron-Core do, or as vLLM does."""
    d, head_dim = 10, 3
    q, k, v = (torch.randn(n * head_dim, d) for n in (heads, kv_heads, kv_heads))
    if grouped:
        by_kv_head = [t.reshape(kv_heads, -1, d) for t in (q, k, v)]
        fused = torch.cat(by_kv_head, dim=1).reshape(-1, d)
    else:
        fused = torch.cat((q, k, v))
    assert torch.equal(bhyt.value_weight(fused, heads, kv_heads, grouped=grouped), v)


@pytest.mark.parametrize(
    "shape, heads, kv_heads, message",
    (
        ((7, 4), 2, 1, r"qkv_weight: expected \[4 \* head_dim, d\] for 2 query and 1 KV heads, got \[7, 4\]"),
        ((8,), 2, 1, r"qkv_weight: expected .*got \[8\]"),
        ((0, 4), 2, 1, r"qkv_weight: expected .*got \[0, 4\]"),
        ((12, 4), 3, 2, "heads: expected a multiple of kv_heads, both integers >= 1, got 3 and 2"),
        ((12, 4), 2, 0, "heads: expected .*got 2 and 0"),
    ),
)
def test_what_is_no_fused_projection(shape: tuple, heads: int, kv_heads: int, message: str) -> None:
    """Rows that do not divide into so many heads are refused."""
    with pytest.raises(ValueError, match=message):
        bhyt.value_weight(torch.zeros(shape), heads, kv_heads, grouped=True)
