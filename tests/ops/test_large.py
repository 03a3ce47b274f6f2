"""More than 2^31 elements (SPEC.md section 3, "64-bit indexing")."""

from typing import Tuple

import pytest
import torch
from torch import Tensor

import bhyt
from support.checks import same_bits

ROWS, D = 600_000, 4096
NEEDED_GIB = 13
# The beginning, around element 2^31, and the end: where a 32-bit index would turn elsewhere.
AROUND = 2**31 // D
SLICES = (slice(0, 64), slice(AROUND - 32, AROUND + 32), slice(ROWS - 64, ROWS))


def available_gib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] / 2**30
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20


@pytest.fixture
def large(device: str) -> Tuple[Tensor, Tensor, Tensor]:
    """600k x 4096 bfloat16 rows in a pattern of 997 that no power of two repeats, gain and lam."""
    try:
        available = available_gib(device)
    except OSError:
        pytest.skip("cannot tell how much memory is available")
    if available < 16:
        pytest.skip(f"needs {NEEDED_GIB} GiB and some air, {available:.0f} GiB available")
    x = torch.empty(ROWS, D, dtype=torch.bfloat16, device=device)
    pattern = torch.randn(997, D).to(x)
    for start in range(0, ROWS, 997):
        part = x[start : start + 997]
        part.copy_(pattern[: len(part)])
    return x, torch.randn(D, device=device), torch.full((1,), 2.0, device=device)


@pytest.mark.slow
def test_forward(large: Tuple[Tensor, Tensor, Tensor]) -> None:
    """600k x 4096 bf16 equals its row slices, y and variance. USERS row 9."""
    x, weight, lam = large
    y, variance = bhyt.functional.forward(x, weight, lam)
    for at in SLICES:
        some_y, some_variance = bhyt.functional.forward(x[at].clone(), weight, lam)
        assert same_bits(y[at], some_y) and same_bits(variance[at], some_variance), at


@pytest.mark.slow
def test_backward(large: Tuple[Tensor, Tensor, Tensor]) -> None:
    """grad_x of 600k x 4096 bf16 equals its row slices. USERS row 9."""
    x, weight, lam = large
    variance = torch.linspace(0.5, 1.5, ROWS, device=x.device).unsqueeze(1)
    grad_y = torch.randn(1, D, device=x.device).to(x.dtype)

    def grad_x(at: slice) -> Tensor:
        rows = x[at]
        mask = [True, False, False]
        arguments = (grad_y.expand_as(rows), None, None, rows, variance[at], weight, lam, 10.0, 1e-6, mask)
        return torch.ops.bhyt.backward(*arguments)[0]

    whole = grad_x(slice(None))
    for at in SLICES:
        assert same_bits(whole[at], grad_x(at)), at
