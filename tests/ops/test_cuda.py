"""What only a GPU can show: streams, graphs, the current device. Skipped without one."""

from dataclasses import replace
from typing import List

import pytest
import torch
from torch import Tensor

from support.cases import FORMS, Call, make_call, run_with_gradients
from support.checks import same_bits

pytestmark = pytest.mark.gpu
SHAPE = (64, 1024)


def results(call: Call) -> List[Tensor]:
    """Outputs and gradients; the upstream gradients are ones, made on the device."""
    upstream = [torch.ones_like(t) if t is not None else None for t in call.run()]
    out, grads = run_with_gradients(call, *upstream)
    return [t for t in (*out, *grads.values()) if t is not None]


@pytest.mark.parametrize("form", FORMS)
def test_graph_replay_sees_new_inputs(form: str) -> None:
    """Captured forward and backward, replayed on inputs written since: the bits of eager calls. USERS row 21."""
    call, other = (make_call(form, SHAPE, torch.bfloat16, "cuda") for _ in range(2))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        results(call)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(call)
    expected = results(other)
    for name, tensor in call.differentiable().items():
        tensor.copy_(other.differentiable()[name])
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(same_bits, captured, expected))


@pytest.mark.parametrize("form", FORMS)
def test_current_stream(form: str) -> None:
    """Work is queued on the current stream: behind a slow write of its input, not beside it. USERS row 21."""
    call, other = (make_call(form, SHAPE, torch.float32, "cuda") for _ in range(2))
    expected = results(replace(call, x=other.x))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)  # tens of milliseconds
        call.x.copy_(other.x)
        actual = results(call)
    torch.cuda.synchronize()
    assert all(map(same_bits, actual, expected))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.parametrize("form", FORMS)
def test_device_of_the_tensors(form: str) -> None:
    """Tensors on cuda:1 while cuda:0 is current: outputs there, the bits of cuda:0. USERS row 20."""
    call = make_call(form, SHAPE, torch.float32, "cuda:0")
    names = ("x", "lam", "weight", "residual", "variance", "offset")
    moved = {name: t.to("cuda:1") for name in names if (t := getattr(call, name)) is not None}
    with torch.cuda.device(0):
        there = results(replace(call, **moved))
    assert all(t.device == torch.device("cuda:1") for t in there)
    assert all(same_bits(t.to("cuda:0"), here) for t, here in zip(there, results(call)))
