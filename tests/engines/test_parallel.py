"""Several processes train what one process trains: DDP, FSDP2, tensor and sequence parallelism, on converted models.

The truth is a copy of the whole model on the whole batch, in each rank; in float64 where nothing else is said. Sums are
ordered differently, and that is all: 1e-12 of a tensor's norm is 5000 roundings.
"""

import copy
from collections import OrderedDict
from dataclasses import replace
from typing import Optional

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, parallelize_module

import bhyt
import bhyt.parallel
from support.processes import assert_same, assert_same_gradients, processes, whole
from support.packages import needs

TOKENS, WIDTH, VOCAB = 8, 32, 16


def llama(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Two converted layers and an exact site at the end; gains and lambdas away from their initial values."""
    transformers = needs("transformers")
    import bhyt.hf

    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=TOKENS, tie_word_embeddings=False, use_cache=False,
        initializer_range=0.2,
    )
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(config).to(dtype)
    bhyt.hf.convert(model, seq_len=TOKENS, last_layer_lam=1.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.empty_like(parameter).uniform_(0.8, 1.2))
    bhyt.hf.refresh(model)
    return model


def batch() -> Tensor:
    return torch.randint(0, VOCAB, (4, TOKENS + 1), generator=torch.Generator().manual_seed(2))


def my_part(tokens: Tensor, mesh: Optional[DeviceMesh] = None) -> Tensor:
    """This rank's sequences."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if mesh is None else (mesh.size(), mesh.get_local_rank())
    return tokens.chunk(ranks)[rank]


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def mean_over_ranks(loss: Tensor) -> Tensor:
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def assert_same_step(model: nn.Module, reference: nn.Module) -> None:
    """One step of AdamW; eps large, since it divides noise by noise where a gradient is zero."""
    for trained in (reference, model):
        torch.optim.AdamW(trained.parameters(), lr=1e-2, eps=1e-3).step()
    for (name, parameter), other in zip(model.named_parameters(), reference.parameters()):
        assert_same(parameter, other, name)


def shard_layers(model: nn.Module, **options) -> nn.Module:
    for layer in model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Projections and MLP tensor parallel, sites and stream sequence parallel."""
    in_sequence = dict(output_layouts=Shard(1), use_local_output=False)
    gathered = dict(desired_input_kwarg_layouts={"hidden_states": Replicate()})
    layer_plan = {
        "input_layernorm": bhyt.parallel.SequenceParallelSite(),
        "self_attn": PrepareModuleInput(input_kwarg_layouts={"hidden_states": Shard(1)}, **gathered),
        **{f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
        "self_attn.o_proj": RowwiseParallel(**in_sequence),
        "post_attention_layernorm": bhyt.parallel.SequenceParallelSite(),
        "mlp": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(**in_sequence),
    }
    for layer in model.model.layers:
        parallelize_module(layer, mesh, layer_plan)
    plan = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), **in_sequence),
        "model.norm": bhyt.parallel.SequenceParallelSite(),
        "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    return parallelize_module(model, mesh, plan)


@processes(2)
def test_ddp() -> None:
    """DDP: loss, every gradient and a step are those of one process on the whole batch. USERS row 26."""
    reference = llama()
    model = nn.parallel.DistributedDataParallel(copy.deepcopy(reference))
    expected = loss_of(reference, batch())
    expected.backward()
    loss = loss_of(model, my_part(batch()))
    loss.backward()
    assert_same(mean_over_ranks(loss), expected, "loss")
    assert_same_gradients(model, reference)
    assert_same_step(model, reference)


@processes(2)
def test_fsdp2() -> None:
    """FSDP2 of each layer and the rest: loss, every gradient and a step, of lam too, which one rank holds alone. USERS
    row 26."""
    reference = llama()
    model = shard_layers(copy.deepcopy(reference))
    expected = loss_of(reference, batch())
    expected.backward()
    loss = loss_of(model, my_part(batch()))
    loss.backward()
    assert_same(mean_over_ranks(loss), expected, "loss")
    assert_same_gradients(model, reference)
    assert_same_step(model, reference)


def shard_sites(model: nn.Module, **options) -> None:
    """Each layer's sites on their own."""
    for layer in model.model.layers:
        fully_shard(layer.input_layernorm, **options)
        fully_shard(layer.post_attention_layernorm, **options)


@processes(2)
def test_fsdp2_of_sites() -> None:
    """Sites sharded on their own, inside layers that are: loss and every gradient. USERS row 26."""
    reference = llama()
    model = copy.deepcopy(reference)
    shard_sites(model)
    shard_layers(model)
    loss_of(reference, batch()).backward()
    loss_of(model, my_part(batch())).backward()
    assert_same_gradients(model, reference)


@processes(2)
def test_fsdp2_mixed_precision() -> None:
    """bfloat16 parameters, float32 reduction: bit for bit the mean of what each half of the batch gives to a model with
    rounded parameters (halving is exact, and a sum of two has one order). Sites sharded on their own need their inputs
    uncast, since variances stay float32. USERS row 26."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    reference = llama(torch.float32)
    losses, halves = [], []
    for tokens in batch().chunk(2):
        rounded = copy.deepcopy(reference)
        for parameter in rounded.parameters():
            parameter.data = parameter.data.bfloat16()
        losses.append(loss_of(rounded, tokens))
        losses[-1].backward()
        halves.append([parameter.grad.float() for parameter in rounded.parameters()])
    for own_sites in (False, True):
        model = copy.deepcopy(reference)
        if own_sites:
            shard_sites(model, mp_policy=replace(policy, cast_forward_inputs=False))
        shard_layers(model, mp_policy=policy)
        loss = loss_of(model, my_part(batch()))
        loss.backward()
        assert torch.equal(loss, losses[dist.get_rank()])
        for (name, parameter), first, second in zip(model.named_parameters(), *halves):
            assert first.norm() > 0
            assert torch.equal(whole(parameter.grad), (first + second) / 2), name


@processes(2)
def test_refresh_of_sharded_weights() -> None:
    """`bhyt.hf.refresh` on weights that FSDP2 or tensor parallelism has sharded: the offset of the whole weights, on
    each rank. USERS row 26."""
    mesh = init_device_mesh("cpu", (2,))
    for parallel in (shard_layers, lambda model: tensor_parallel(model, mesh)):
        model = llama()
        expected = [layer.post_attention_layernorm.variance_offset.clone() for layer in model.model.layers]
        parallel(model)
        for layer in model.model.layers:
            layer.post_attention_layernorm.set_variance_offset(0.0)
        assert bhyt.hf.refresh(model) == 2
        for layer, offset in zip(model.model.layers, expected):
            actual = layer.post_attention_layernorm.variance_offset
            assert (whole(actual) - offset).abs() <= torch.finfo(torch.float32).eps * offset


@processes(2)
def test_offset_from_sharded_weights() -> None:
    """`attention_gain` and `update_variance_offset` on weights and sites that FSDP2 or tensor parallelism has sharded:
    the offset of the whole ones, on each rank. USERS row 26."""
    mesh = init_device_mesh("cpu", (2,))
    style = bhyt.parallel.SequenceParallelSite()
    plan = {"v": ColwiseParallel(), "o": RowwiseParallel(), "first": style, "second": style}
    for parallel in (fully_shard, lambda module: parallelize_module(module, mesh, plan)):
        torch.manual_seed(3)
        v, o = nn.Linear(WIDTH, 16, bias=False).double(), nn.Linear(32, WIDTH, bias=False).double()
        first, second = bhyt.BHyT(WIDTH, lam=1.75), bhyt.BHyTApprox(WIDTH)
        values = v.weight.view(2, 8, WIDTH).repeat_interleave(2, 0).reshape(32, WIDTH)
        expected = (o.weight @ values).square().sum() / (TOKENS * WIDTH) * (1.75 / 10) ** 2
        parallel(nn.Sequential(OrderedDict(v=v, o=o, first=first, second=second)))
        second.update_variance_offset(bhyt.attention_gain(v.weight, o.weight, TOKENS, 2, head_dim=8), first)
        actual = whole(second.variance_offset)
        assert (actual - expected).abs() <= torch.finfo(torch.float32).eps * expected


@processes(2)
def test_tensor_and_sequence_parallel() -> None:
    """A converted model, tensor and sequence parallel: loss, every gradient, their norm and a step of one process.
    USERS row 25."""
    reference = llama()
    model = tensor_parallel(copy.deepcopy(reference), init_device_mesh("cpu", (2,)))
    expected, loss = (loss_of(m, batch()) for m in (reference, model))
    expected.backward()
    loss.backward()
    assert_same(loss, expected, "loss")
    assert_same_gradients(model, reference)
    norm, expected_norm = (nn.utils.clip_grad_norm_(m.parameters(), 1e-2) for m in (model, reference))
    assert_same(norm, expected_norm, "norm of all gradients")
    assert_same_step(model, reference)


@processes(4)
def test_fsdp2_with_tensor_and_sequence_parallel() -> None:
    """2 x 2 processes: FSDP2 over tensor and sequence parallel. USERS rows 25 and 26."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    reference = llama()
    model = shard_layers(tensor_parallel(copy.deepcopy(reference), mesh["tensor"]), mesh=mesh["data"])
    expected = loss_of(reference, batch())
    expected.backward()
    loss = loss_of(model, my_part(batch(), mesh["data"]))
    loss.backward()
    assert_same(mean_over_ranks(loss), expected, "loss")
    assert_same_gradients(model, reference)
    assert_same_step(model, reference)
