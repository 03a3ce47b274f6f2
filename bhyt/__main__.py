"""`python -m bhyt`: the facts for a bug report, and a check of every op against float64 on every device."""

import platform
import sys
from typing import Any, Dict, Iterator, List, Tuple

import torch
from torch import Tensor

import bhyt


def _cuda_kernels(build: Dict[str, str]) -> str:
    """The architectures of the CUDA kernels, the CUDA that compiled them, and the CUDA that the driver supports."""
    if not build["cuda_archs"]:
        return "not built"
    text = f"{build['cuda_archs']}; CUDA {build['cuda_runtime']}, driver for CUDA {build['cuda_driver']}"
    if (backward := torch.ops.bhyt.cuda_backward()) != "two_launches":
        text += f"; backward: {backward}, experimental"
    return f"{text}: {build['cuda_problem']}" if build["cuda_problem"] else text


def _gpu(i: int, built: bool) -> str:
    """The name of a device, and the architecture of the kernels that run on it."""
    properties = torch.cuda.get_device_properties(i)
    text = f"cuda:{i} {properties.name} sm_{properties.major}{properties.minor}"
    if not built:
        return text
    try:
        return f"{text} ({torch.ops.bhyt.cuda_code(i)})"
    except RuntimeError as error:
        return f"{text} ({str(error).splitlines()[0]})"


def facts() -> Dict[str, str]:
    """Versions, build and devices, ready to print.

    Returns:
        A text for each name: bhyt, torch, python, the CPU and CUDA kernels, the CUDA of torch, the GPUs.
    """
    build = torch.ops.bhyt.build_info()
    gpus = [_gpu(i, bool(build["cuda_archs"])) for i in range(torch.cuda.device_count())]
    return {
        "bhyt": f"{bhyt.__version__}, {bhyt.library_path()}",
        "torch": f"{torch.__version__}, bhyt built for {build['torch']} with {build['compiler']}",
        "python": f"{platform.python_version()}, {platform.platform()}",
        "CPU kernels": f"{build['cpu_tier']}; this CPU runs {build['cpu_tiers']}; {torch.get_num_threads()} threads",
        "CUDA kernels": _cuda_kernels(build),
        "CUDA of torch": torch.version.cuda or "none",
        "GPUs": ", ".join(gpus) or "none",
    }


def _results(ops: Any, dtype: torch.dtype, device: str) -> Dict[str, Tensor]:
    """Outputs y of the four forwards of `ops` on fixed rows, and gradients of sum(y^2), whose sums do not cancel."""
    generator = torch.Generator().manual_seed(0)
    # Rows are exact in bfloat16, so that every dtype has the same ones.
    rows = [torch.randn(33, 1000, generator=generator).bfloat16().to(device, dtype) for _ in range(2)]
    weight = torch.linspace(0.5, 1.5, 1000).to(device, dtype if dtype == torch.float64 else torch.float32)
    lam = torch.full((1,), 20.0).to(weight)
    inputs = [t.requires_grad_() for t in (*rows, weight, lam)]
    x, residual = rows
    y, variance = ops.forward(x, weight, lam)
    outputs = {
        "forward": y,
        "forward_approx": ops.forward_approx(x, variance, None, weight, lam),
        "add_forward": ops.add_forward(x, residual, weight, lam)[0],
        "add_forward_approx": ops.add_forward_approx(x, residual, variance, None, weight, lam)[0],
    }
    results = {}
    for name, output in outputs.items():
        grads = torch.autograd.grad(output.to(weight).square().sum(), inputs, retain_graph=True, allow_unused=True)
        results[name] = output.detach()
        for of, grad in zip(("x", "residual", "weight", "lam"), grads):
            if grad is not None:
                results[f"gradient of {of} in {name}"] = grad
    return results


def self_check(device: str) -> Iterator[Tuple[str, float, float]]:
    """Compare each output and gradient of the four forwards with float64, in float32 and bfloat16.

    Args:
        device: "cpu", "cuda:0" and so on.

    Yields:
        (name, relative L2 error, allowed error).
    """
    exact = _results(bhyt.reference, torch.float64, "cpu")
    for dtype, allowed in ((torch.float32, 2e-6), (torch.bfloat16, 1e-2)):
        rows = {name: t.cpu().double() for name, t in _results(bhyt.functional, dtype, device).items()}
        for name, expected in exact.items():
            error = (rows[name] - expected).norm() / expected.norm()
            yield f"{device} {str(dtype).removeprefix('torch.')} {name}", error.item(), allowed


def devices() -> List[str]:
    """The devices that the check covers: the CPU and every GPU that torch sees.

    Returns:
        Their names: "cpu", "cuda:0" and so on.
    """
    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]


def main() -> int:
    """Print the facts and the outcome of the check.

    Returns:
        The exit status: 1 when an output, a gradient or a device fails.
    """
    for name, value in facts().items():
        print(f"{name + ':':15}{value}")
    failed = 0
    for device in devices():
        try:
            checks = list(self_check(device))
        except RuntimeError as problem:
            failed += 1
            print(f"{'self-check:':15}{device} FAILED: {str(problem).splitlines()[0]}")
            continue
        wrong = [check for check in checks if not check[1] <= check[2]]
        failed += len(wrong)
        print(f"{'self-check:':15}{device} {len(checks) - len(wrong)} of {len(checks)} within bounds")
        for name, error, allowed in wrong:
            print(f"  WRONG: {name}: relative error {error:.2g}, allowed {allowed:.0e}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
