"""Sites under tensor and sequence parallelism: sharding rules for DTensor, and a style for `parallelize_module`.

Importing this module registers the rules. `import bhyt` does not, because torch.distributed.tensor takes half as long
to load as torch itself. DDP and FSDP2 need nothing from here: they give plain parameters to the forward of the modules
that they wrap. Wrap whole layers. A site that `fully_shard` wraps alone under a mixed precision policy needs
`cast_forward_inputs=False`, since variances stay float32.

Two layouts need no communication, forward or backward: rows sharded in any leading dimension (batch, sequence), for
every op; and rows sharded in d, the weight with them, for approximate sites, which reduce nothing. Gradients of
replicated parameters are then pending sums (`Partial`), as with PyTorch's own norms. Optimizers, gradient clipping,
FSDP2 and `full_tensor` complete them. Rows in other layouts, such as an exact site's rows sharded in d, are
redistributed first.
"""

import functools
import types
from typing import Any, Callable, List, Optional, Tuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_module
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.parallel import ParallelStyle
from torch.utils._pytree import tree_map

from bhyt.modules import BHyT, BHyTApprox

__all__ = ["SequenceParallelSite"]

_OPS = ("forward", "forward_approx", "add_forward", "add_forward_approx", "backward", "backward_approx")
_ROWS = ("x", "residual", "y", "sum", "grad_y", "grad_sum", "grad_x")  # [..., d]
_PER_ROW = ("variance", "grad_variance")  # [..., 1]
_SUMS = ("grad_weight", "grad_lam")  # over all rows


def _placement(name: str, sharded: Optional[int], ndim: int, is_output: bool) -> Placement:
    """The placement of an argument or output when rows of ndim dimensions are sharded in one; None: in no dimension."""
    if sharded is None:
        return Replicate()
    if sharded < ndim - 1:
        if name in _ROWS + _PER_ROW:
            return Shard(sharded)
        return Partial() if name in _SUMS else Replicate()
    if name in _ROWS:
        return Shard(sharded)
    if name in ("weight", "grad_weight"):
        return Shard(0)
    # grad_variance and grad_lam are sums over d
    return Partial() if is_output and name.startswith("grad_") else Replicate()


def _register(op: torch._ops.OpOverload) -> None:
    schema = op._schema
    names = [argument.name for argument in schema.arguments]

    def layouts(*args: Any, **kwargs: Any) -> List[Tuple[List[Optional[Placement]], List[Optional[Placement]]]]:
        """(placements of the outputs, of the arguments) that need no communication, per mesh dimension."""
        given = {**dict(zip(names, args)), **kwargs}
        ndim = given["x"].ndim
        mask = given.get("output_mask", [True] * len(schema.returns))
        missing = {"grad_weight"} if given.get("weight") is None else set()
        missing |= {output.name for output, wanted in zip(schema.returns, mask) if not wanted}
        tensors = [name if hasattr(value, "placements") else None for name, value in given.items()]
        # An exact site reduces over d.
        shardings = [None, *range(ndim if "approx" in schema.name else ndim - 1)]
        return [
            (
                [None if r.name in missing else _placement(r.name, at, ndim, True) for r in schema.returns],
                [None if name is None else _placement(name, at, ndim, False) for name in tensors],
            )
            for at in shardings
        ]

    register_sharding(op)(layouts)
    if "output_mask" in names:
        # Results of a rule are cached per layout of the tensors; here they depend on the mask too, and
        # register_sharding has no way to say so.
        infos = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
        infos[op].static_argnum = names.index("output_mask")


for _name in _OPS:
    _register(getattr(torch.ops.bhyt, _name).default)


class SequenceParallelSite(ParallelStyle):
    """For `parallelize_module`: a site computes on its shard of the sequence, without communication.

    `torch.distributed.tensor.parallel.SequenceParallel` prepares the first argument alone; this style prepares a site's
    rows, residual and variance. DTensors are redistributed if they are not sharded in the sequence. Plain tensors are
    taken as this rank's shard. Results are DTensors if an argument was one, and plain tensors otherwise. Parameters and
    buffers become replicated, with the values of rank 0.

    Args:
        sequence_dim: the dimension of [..., d] that is sharded.

    Raises:
        TypeError: applied to a module that is neither `bhyt.BHyT` nor `bhyt.BHyTApprox`.
    """

    def __init__(self, *, sequence_dim: int = 1) -> None:
        super().__init__()
        self.sequence_dim = sequence_dim

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, (BHyT, BHyTApprox)):
            raise TypeError(f"SequenceParallelSite: expected bhyt.BHyT or bhyt.BHyTApprox, got {type(module).__name__}")
        distribute_module(module, device_mesh)
        forward = _on_shards(type(module).forward, device_mesh, Shard(self.sequence_dim))
        setattr(module, "forward", types.MethodType(forward, module))
        return module


def _on_shards(method: Callable[..., Any], mesh: DeviceMesh, shard: Shard) -> Callable[..., Any]:
    def to_shard(rows: Any) -> Any:
        if not isinstance(rows, torch.Tensor):
            return rows  # an option, or no residual
        if isinstance(rows, DTensor):
            return rows.redistribute(mesh, [shard])
        return DTensor.from_local(rows, mesh, [shard], run_check=False)

    @functools.wraps(method)
    def parallel(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        local = not any(isinstance(value, DTensor) for value in (*args, *kwargs.values()))
        results = method(self, *map(to_shard, args), **{name: to_shard(value) for name, value in kwargs.items()})
        return tree_map(DTensor.to_local, results) if local else results

    return parallel
