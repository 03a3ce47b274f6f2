"""examples/megatron_layer.py in Megatron-Core's GPTModel, with two patches for CPUs: float64, gloo."""

import contextlib
import sys
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn

pytest.importorskip("megatron.core")
pytestmark = pytest.mark.release
EXAMPLES = Path(__file__).parents[2] / "examples"
LENGTH, VOCABULARY = 16, 64


def run(processes: int, job: Any, folder: Path, *arguments: Any) -> None:
    given = processes, job, folder, arguments
    torch.multiprocessing.start_processes(_rank, given, nprocs=processes, start_method="spawn")


def _rank(rank: int, processes: int, job: Any, folder: Path, arguments: Tuple[Any, ...]) -> None:
    from megatron.core import parallel_state, tensor_parallel

    sys.path.insert(0, str(EXAMPLES))
    torch.set_num_threads(1)
    torch.cuda.current_device = lambda: "cpu"  # rotary embeddings
    random = tensor_parallel.random
    random.CudaRNGStatesTracker.fork = lambda *_, **__: contextlib.nullcontext()
    random._get_cuda_rng_state, random._set_cuda_rng_state = lambda **_: None, lambda *_, **__: None
    store = folder / f"store{processes}{job.__name__}"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=processes)
    job(folder, rank, processes, *arguments)
    dist.destroy_process_group()


def config(processes: int = 1, **options: Any) -> Any:
    from megatron.core.transformer import TransformerConfig

    sharded = {"tensor_model_parallel_size": processes, "sequence_parallel": processes > 1}
    return TransformerConfig(**{**dict(
        num_layers=3, hidden_size=32, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=48, kv_channels=8,
        normalization="RMSNorm", add_bias_linear=False, gated_linear_unit=True, activation_func=nn.functional.silu,
        hidden_dropout=0.0, attention_dropout=0.0, params_dtype=torch.float64, use_cpu_initialization=True,
        bias_dropout_fusion=False, bias_activation_fusion=False, apply_rope_fusion=False, masked_softmax_fusion=False,
        gradient_accumulation_fusion=False, attention_softmax_in_fp32=False, pipeline_dtype=torch.float64,
    ), **sharded, **options})  # fmt: skip


class FinalNorm(nn.RMSNorm):
    """Megatron-Core has none for CPUs that takes a sharded sequence."""

    def __init__(self, config: Any, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel


def built(settings: Any) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron_layer import bhyt_layer_spec

    layer = bhyt_layer_spec(get_gpt_layer_local_spec(normalization="RMSNorm"), seq_len=LENGTH)
    spec = TransformerBlockSubmodules(layer_specs=[layer] * settings.num_layers, layer_norm=FinalNorm)
    options = {"position_embedding_type": "rope", "share_embeddings_and_output_weights": False}
    return GPTModel(settings, spec, VOCABULARY, LENGTH, **options).double()


def step(folder: Path, rank: int, processes: int, options: Dict[str, Any]) -> None:
    """Loss, offsets and gradients of one step, whole, from the weights in folder; who comes first writes them."""
    from megatron.core import parallel_state
    from megatron_layer import refresh

    torch.Tensor.float = torch.Tensor.double  # logits and softmax
    model = built(config(processes, **options))
    weights = folder / "weights.pt"
    if not weights.exists():
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
                else:
                    parameter.normal_(std=0.3)
        torch.save(dict(model.named_parameters()), weights)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in torch.load(weights).items():
            parameters[name].copy_(_part(name, value, rank, processes))
    assert refresh(model) == 3
    tokens = torch.randint(VOCABULARY, (2, LENGTH + 1), generator=torch.Generator().manual_seed(2))
    positions = torch.arange(LENGTH).expand(2, -1)
    mask = torch.ones(LENGTH, LENGTH).tril()[None, None] < 0.5
    loss = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:]).mean()
    loss.backward()
    for parameter in model.parameters():  # as Megatron does before an optimizer's step
        if getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(parameter.grad, group=parallel_state.get_tensor_model_parallel_group())
    seen = {name: _whole(name, p.grad, processes) for name, p in parameters.items()}
    for i, layer in enumerate(model.decoder.layers):
        seen[f"offset {i}"] = layer.pre_mlp_layernorm.variance_offset
    torch.save({**seen, "loss": loss.detach()}, folder / f"{processes}{sorted(options)}{rank}.pt")


def _shared(name: str) -> Optional[int]:
    """The dimension in which a weight is shared out."""
    if any(part in name for part in ("linear_qkv", "linear_fc1", "word_embeddings", "output_layer")):
        return 0
    return 1 if "linear_proj" in name or "linear_fc2" in name else None


def _part(name: str, value: Tensor, rank: int, processes: int) -> Tensor:
    dim = _shared(name)
    if dim is None:
        return value
    if "linear_fc1" in name:  # the gate's rows and the other half, each shared out
        return torch.cat([half.chunk(processes)[rank] for half in value.chunk(2)])
    return value.chunk(processes, dim)[rank]


def _whole(name: str, value: Tensor, processes: int) -> Tensor:
    dim = _shared(name)
    if dim is None:
        return value
    parts = [torch.empty_like(value) for _ in range(processes)]
    dist.all_gather(parts, value.contiguous())
    if "linear_fc1" in name:
        return torch.cat([torch.cat(halves) for halves in zip(*(part.chunk(2) for part in parts))])
    return torch.cat(parts, dim)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("megatron")
    run(1, step, path, {})
    return path


@pytest.mark.parametrize(
    "processes, options",
    ((2, {}), (1, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1})),
    ids=("tp with sp", "full recomputation"),
)
def test_step(processes: int, options: Dict[str, Any], folder: Path) -> None:
    """Loss, offsets and all gradients are those of one process: to 1e-12."""
    run(processes, step, folder, options)
    expected = torch.load(folder / f"1{[]}0.pt")
    for rank in range(processes):
        seen = torch.load(folder / f"{processes}{sorted(options)}{rank}.pt")
        assert seen.keys() == expected.keys() and sum(name.endswith("lam") for name in seen) == 6
        for name, value in seen.items():
            assert expected[name].norm() > 0, f"{name} is zero: nothing is tested"
            assert (value - expected[name]).norm() <= 1e-12 * expected[name].norm(), name


def refusals(folder: Path, rank: int, processes: int) -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron_layer import bhyt_layer_spec

    for options, message in (
        ({"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}, "config: recompute_modules"),
        ({"hidden_dropout": 0.1}, "config: hidden_dropout: not"),
        ({"apply_residual_connection_post_layernorm": True}, "config: apply_residual_connection_post_layernorm: not"),
        ({"layernorm_zero_centered_gamma": True}, "config: layernorm_zero_centered_gamma: not"),
        ({"fine_grained_activation_offloading": True, "offload_modules": ["attn_norm"]}, "config: fine_grained_"),
    ):
        with pytest.raises(ValueError, match=message):
            built(config(**options))
    fused = get_gpt_layer_local_spec(normalization="RMSNorm")
    fused.submodules.pre_mlp_layernorm = IdentityOp
    with pytest.raises(ValueError, match="spec: expected a TransformerLayer with two norms"):
        bhyt_layer_spec(fused, seq_len=LENGTH)


def test_refusals(tmp_path: Path) -> None:
    """Where recomputation or a fused norm would lose the variance or its gradient, and where c is not known."""
    run(1, refusals, tmp_path)
