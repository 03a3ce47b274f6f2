"""Every kernel once or twice on small tensors, for compute-sanitizer: memory errors and races, not numbers.

    compute-sanitizer --tool memcheck  --error-exitcode 1 python benchmarks/gpu_small_matrix.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python benchmarks/gpu_small_matrix.py
"""

import itertools
import sys
from typing import Iterator

import torch

ops = torch.ops.bhyt
DIMS = (1, 7, 48, 127, 1000, 3584, 20000)  # within a warp, a block, a cluster; with and without whole packs
TYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.float64),
)


def tensor(rows: int, d: int, dtype: torch.dtype, offset: int) -> torch.Tensor:
    """[rows, d], `offset` elements into its memory."""
    return torch.randn(rows * d + offset, device="cuda").to(dtype)[offset:].view(rows, d)


def calls(rows: int, d: int, branch: torch.dtype, stream: torch.dtype, offset: int) -> Iterator[object]:
    x, residual = tensor(rows, d, branch, offset), tensor(rows, d, stream, offset)
    weight, lam = tensor(1, d, branch, offset)[0], torch.full((1,), 2.0, device="cuda")
    v = residual.double().square().mean(-1, keepdim=True)
    v = v if stream == torch.float64 else v.float()
    c = torch.tensor(0.1, device="cuda")
    uint8, float8 = (1 / 127, 128, torch.uint8), (1 / 448, 0, torch.float8_e4m3fn)
    yield ops.add_forward(x, residual, weight, lam)
    yield ops.add_forward_approx(x, residual, v, c, weight, lam)
    if branch == stream:
        yield ops.forward(x, None, lam)
        yield ops.forward_approx(x, v, None, weight, lam)
        yield ops.forward_quantized(x, weight, lam, *float8)
        yield ops.forward_approx_quantized(x, v, None, None, lam, *uint8)
    yield ops.add_forward_quantized(x, residual, None, lam, *uint8)
    yield ops.add_forward_approx_quantized(x, residual, v, c, weight, lam, *float8)
    yield ops.backward(x, None, residual, residual, v, weight, lam, 10.0, 1e-6, [True] * 3)
    yield ops.backward(x, v, None, residual, v, weight, lam, 10.0, 1e-6, [True] * 3)
    yield ops.backward_approx(x, residual, residual, v, c, weight, lam, 10.0, 1e-6, [True] * 4)


def main() -> None:
    import bhyt  # noqa: F401, registers the ops

    if not torch.cuda.is_available():
        sys.exit("gpu_small_matrix.py: no CUDA device")
    count = 0
    for d, (branch, stream), offset in itertools.product(DIMS, TYPES, (0, 1)):
        for _ in calls(3 if d > 500 else 19, d, branch, stream, offset):
            count += 1
    torch.cuda.synchronize()
    print(f"{count} calls")


if __name__ == "__main__":
    main()
