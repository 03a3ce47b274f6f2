"""What only a GPU can show of the kernels, beside what test_cuda.py asks: edges of a graph that no kernel is before, a
number that hardware alone converts, ten thousand repeats. Skipped without one."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Iterator, List

import pytest
import torch
from torch import Tensor

import bhyt  # noqa: F401, registers the ops

pytestmark = pytest.mark.gpu
ops = torch.ops.bhyt
D = 4096


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.element_size()])


def backward(x: Tensor, grad_y: Tensor, weight: Tensor, lam: Tensor) -> List[Tensor]:
    variance = x.float().square().mean(-1, keepdim=True)
    return list(ops.backward(grad_y, None, None, x, variance, weight, lam, 10.0, 1e-6, [True] * 3))


def inputs(rows: int, d: int) -> List[Tensor]:
    torch.manual_seed(0)
    x, grad_y = (torch.randn(rows, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    weight = torch.linspace(0.5, 1.5, d, device="cuda", dtype=torch.bfloat16)
    return [x, grad_y, weight, torch.full((1,), 2.0, device="cuda")]


def replayed(work, *sources: Tensor) -> List[Tensor]:
    """What `work` gives when it was captured, and replayed on what has been written to `sources` since."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    for source in sources:
        source.copy_(torch.randn_like(source))
    graph.replay()
    torch.cuda.synchronize()
    return captured


@pytest.mark.parametrize("rows", [1, 64, 8192])
def test_capture_behind_a_memcpy(rows: int) -> None:
    """The kernels are launched before the work in front of them ends, and wait for a copy as for a kernel."""
    x, grad_y, weight, lam = inputs(rows, D)
    source = x.clone()

    def work() -> List[Tensor]:
        x.copy_(source)  # of equal layout: a memcpy, no kernel
        y, variance = ops.forward(x, weight, lam)
        grad_y.copy_(source)
        return [y, variance, *ops.backward(grad_y, None, None, x, variance, weight, lam, 10.0, 1e-6, [True] * 3)]

    captured = replayed(work, source)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(captured, work()))


@pytest.mark.parametrize("rows", [1, 64, 8192])
def test_capture_behind_a_join(rows: int) -> None:
    """And for both of two streams that meet in front of them."""
    x, grad_y, weight, lam = inputs(rows, D)
    source, other = x.clone(), grad_y.clone()
    side = torch.cuda.Stream()

    def work() -> List[Tensor]:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(200_000)
            torch.mul(other, 0.5, out=grad_y)
        torch.mul(source, 2, out=x)
        torch.cuda.current_stream().wait_stream(side)
        y, variance = ops.add_forward(x, grad_y, weight, lam)[::2]
        return [y, variance, *backward(x, grad_y, weight, lam)]

    captured = replayed(work, source, other)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(captured, work()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantized", [(0, torch.int8), (7, torch.int8), (128, torch.uint8), (0, torch.float8_e4m3fn)])
def test_nan_to_eight_bits(dtype: torch.dtype, quantized: tuple) -> None:
    """Of NaN and infinities: the bits of the CPU, whose kernels select them by comparison."""
    row = torch.linspace(-3, 3, 64, dtype=dtype).repeat(5, 1)
    row[1, 3], row[2, 5], row[3, 60] = float("nan"), float("inf"), -float("inf")
    variance = torch.full((5, 1), 0.25, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    weight, lam = torch.linspace(0.5, 200, 64, dtype=dtype), torch.full((1,), 20.0)
    here, there = (
        ops.forward_approx_quantized(
            *(t.to(device) for t in (row, variance)), None, *(t.to(device) for t in (weight, lam)), 0.5, *quantized
        )
        for device in ("cpu", "cuda")
    )
    special = ~row.isfinite()
    assert special.sum() == 3 and torch.equal(bits(here)[special], bits(there.cpu())[special])


@pytest.mark.slow
@pytest.mark.parametrize("d", [65536, 131072])
def test_ten_thousand_repeats(d: int) -> None:
    """The same bits each time where blocks of a cluster exchange sums: 8 and 16 of them to a row, several rows each."""
    call = inputs(2 * torch.cuda.get_device_properties(0).multi_processor_count * 8192 // d, d)
    first = backward(*call)
    differs = torch.zeros((), dtype=torch.bool, device="cuda")
    for _ in range(10_000):
        for a, b in zip(first, backward(*call)):
            differs |= (bits(a) != bits(b)).any()
    assert not differs


def of_two_streams(calls: List[List[Tensor]]) -> Iterator[Tensor]:
    """What calls on several streams give that run at once: eager ones, and graphs that one stream captured."""
    streams, graphs, captured = [torch.cuda.Stream() for _ in calls], [], []
    torch.cuda.synchronize()
    for call in calls:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], stream=streams[0]):
            captured.append(backward(*call))
    for _ in range(30):
        eager = []
        for stream, call, graph in zip(streams, calls, reversed(graphs)):
            with torch.cuda.stream(stream):
                eager.append(backward(*call))
                graph.replay()
        torch.cuda.synchronize()
        for outputs in (*eager, *captured):
            yield from outputs


def print_digests() -> None:
    """Of gradients of this process's variant of the backward: sizes alone, then two streams at once."""
    print(torch.ops.bhyt.cuda_backward())
    for rows, d in ((1, 64), (8192, 256), (2048, 4096), (8185, 4096), (700, 16384), (333, 40000), (512, 65536)):
        call = inputs(rows, d)
        for _ in range(20):
            digest = hashlib.sha256(b"".join(bits(t).cpu().numpy().tobytes() for t in backward(*call)))
        print(rows, d, digest.hexdigest())
    digest = hashlib.sha256()
    for t in of_two_streams([inputs(3000, 1024), inputs(500, 16384)]):
        digest.update(bits(t).cpu().numpy().tobytes())
    print("two streams", digest.hexdigest())


@pytest.mark.parametrize("variant", ["one_launch", "ring"])
def test_variants_of_the_backward(variant: str) -> None:
    """The bits of the first: alone, and where eager calls and graphs of two streams run at once."""
    folder = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {folder!r}); import test_gpu_only; test_gpu_only.print_digests()"

    def printed(name: str) -> List[str]:
        environment = {**os.environ, "BHYT_CUDA_BACKWARD": name}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    first, other = printed("two_launches"), printed(variant)
    assert (first[0], other[0]) == ("two_launches", variant) and first[1:] == other[1:] and len(first) == 9
