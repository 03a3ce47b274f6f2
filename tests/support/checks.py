"""What several test files assert of a call."""

from typing import Callable, Dict, List, Optional, Tuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from support import truth
from support.cases import Call, Outputs, make_upstream, run_with_gradients
from support.tolerances import assert_grads, assert_variance, assert_y


def check_against_truth(call: Call, upstream: Optional[Outputs] = None) -> Tuple[Outputs, Dict[str, Tensor]]:
    """Every output and every gradient of `call` within SPEC.md's numbers; returns them.

    Each gradient has the dtype and shape of its tensor.
    """
    upstream = upstream or make_upstream(call)
    out, grads = run_with_gradients(call, *upstream)
    true = truth.outputs(call)
    assert out.y.dtype == call.x.dtype
    assert_y(out.y, true.y)
    if call.adds:
        assert same_bits(out.sum, true.sum), "sum is not x + residual rounded once"
    if call.exact:
        assert_variance(out.variance, true.variance)
    assert set(grads) == set(call.differentiable())
    for name, tensor in call.differentiable().items():
        assert (grads[name].dtype, grads[name].shape) == (tensor.dtype, tensor.shape), name
    assert_grads(grads, truth.gradients(call, *upstream), call.x.dtype, call.accumulate)
    return out, grads


def same_bits(a: Optional[Tensor], b: Optional[Tensor]) -> bool:
    """Equal dtype, shape and bits: NaN equals the same NaN, 0 does not equal -0."""
    if a is None or b is None:
        return a is b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


class OpsCalled(TorchDispatchMode):
    """Records the names of the ops below autograd, such as "bhyt.forward.default"."""

    def __init__(self) -> None:
        super().__init__()
        self.names: List[str] = []

    def __torch_dispatch__(self, func: Callable, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))
