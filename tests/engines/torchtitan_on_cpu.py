"""torchtitan's own launcher and Trainer on CPUs with gloo: what they ask of CUDA is answered here.

    torchrun --nproc-per-node 2 tests/engines/torchtitan_on_cpu.py --module bhyt.torchtitan --config ..

takes the arguments of `torchtitan.train`. Importing this module patches torch and torchtitan: for processes of its own
only.
"""

import contextlib
import types
from typing import Any

import torch
import torch._utils

torch._utils._get_available_device_type = lambda: "cpu"
_ANSWERS = {
    "get_device_name": lambda *_: "CPU",
    "get_device_properties": lambda *_: types.SimpleNamespace(total_memory=1 << 30),
    "memory_stats": lambda *_: {},
    "reset_peak_memory_stats": lambda *_: None,
    "empty_cache": lambda: None,
}
for _name, _answer in _ANSWERS.items():
    if not hasattr(torch.cpu, _name):
        setattr(torch.cpu, _name, _answer)

import torchtitan.config  # noqa: E402
import torchtitan.distributed.fsdp as fsdp  # noqa: E402
import torchtitan.distributed.utils as distributed_utils  # noqa: E402
import torchtitan.models.common.config_utils as config_utils  # noqa: E402
from torchtitan.models.common.attention import ScaledDotProductAttention  # noqa: E402
from torchtitan.models.common.rope import ComplexRoPE  # noqa: E402

# FlexAttention has no backward on CPUs.
config_utils.get_attention_config = lambda backend: ScaledDotProductAttention.Config()
# A timeout for each group, set behind a barrier on devices.
distributed_utils.set_pg_timeouts = lambda **_: None
_undivided = fsdp.disable_fsdp_gradient_division


def _sums(model: Any) -> None:
    """gloo has no PREMUL_SUM."""
    _undivided(model)
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.set_force_sum_reduction_for_comms(True)


fsdp.disable_fsdp_gradient_division = _sums


def in_float64() -> None:
    """From here on torchtitan computes in float64 what it computes in float32: rotary embeddings, losses, sums."""
    torchtitan.config.TORCH_DTYPE_MAP["float64"] = torch.float64
    torch.Tensor.float = torch.Tensor.double

    def rotated(query: torch.Tensor, key: torch.Tensor, rope_cache: torch.Tensor) -> Any:
        pairs = [torch.view_as_complex(t.double().reshape(*t.shape[:-1], -1, 2)) for t in (query, key)]
        return tuple(torch.view_as_real(pair * rope_cache).flatten(3) for pair in pairs)

    ComplexRoPE.apply_rotary_emb = staticmethod(rotated)


if __name__ == "__main__":
    from torchtitan.train import main

    with contextlib.suppress(KeyboardInterrupt):
        main()
