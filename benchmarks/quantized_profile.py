"""Where an eight-bit model spends its time beside the products of matrices: an eager decoding step, a compiled prefill.

    python benchmarks/quantized_profile.py          into results/<device>/quantized-profile.json

The models of bench_quantized.py, one thread. Decoding: parts are replaced in turn by tensors made before, first the
products, then the scales per row, then whole linears. Prefill: without products, which are the same for all. All times
are CPU times of the process, which other work on the machine hardly changes.
"""

import argparse
import time
from typing import Any, Callable, Optional
from unittest import mock

import bench_model
import bench_quantized
import common
import torch
from torch import Tensor, nn
from torch._inductor.select_algorithm import extern_kernels

from bhyt.quantization import QuantizedLinear, linear

FP32, INT8, TORCHAO = "BHyT fp32", bench_quantized.OURS, f"{bench_quantized.TORCHAO} int8 dynamic"


def prepared(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function's first results for such shapes, from the second call on."""
    made: dict[Any, Any] = {}

    def free(*given: Any) -> Any:
        key = tuple(g.shape if isinstance(g, Tensor) else g for g in given)
        if key not in made:
            made[key] = function(*given)
        return made[key]

    return free


def parts() -> dict[str, tuple[str, list[Any]]]:
    """By title: the model, and what is taken away from it."""
    products = mock.patch.object(linear, "_product", prepared(linear._product))
    scales = mock.patch.object(linear, "_quantized_rows", prepared(linear._quantized_rows))
    free_linear = prepared(nn.functional.linear)
    float_products = mock.patch.object(nn.functional, "linear", lambda x, w, bias=None: free_linear(x, w).clone())
    linears = mock.patch.object(QuantizedLinear, "forward", prepared(QuantizedLinear.forward))
    return {
        "fp32, without its products": (FP32, [float_products]),
        "int8, without its products": (INT8, [products]),
        "int8, without its scales per row either": (INT8, [products, scales]),
        "int8, without its linears": (INT8, [linears]),
    }


def measure(call: Callable[[], Any], patches: list[Any]) -> float:
    """Milliseconds of CPU time per token."""
    for patch in patches:
        patch.start()
    began = time.process_time()
    call()
    taken = time.process_time() - began
    for patch in patches:
        patch.stop()
    return 1e3 * taken / bench_quantized.PRESET.steps


def compiled_prefill(name: str, bases: dict[str, nn.Module], tokens: Tensor, seconds: float) -> float:
    """Milliseconds of CPU time without the products of matrices: the least of several."""
    torch._dynamo.reset()
    model = bench_quantized.build(name, bases).eval().requires_grad_(False)
    free = mock.patch.object(extern_kernels, "_int_mm", lambda x, w, out: out.zero_())  # what compiled code calls
    with mock.patch.object(linear, "_PLAIN_LOOP", False), free:
        call = bench_quantized.Prefill(model, tokens, True)
        taken, end = [], time.monotonic() + seconds
        while time.monotonic() < end:
            began = time.process_time()
            call(0)
            taken.append(time.process_time() - began)
    return 1e3 * min(taken)


def main(arguments: Optional[list[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--out", help="write the JSON here instead")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    preset = bench_quantized.PRESET
    bases = {"fp32": bench_quantized.models.make_base(preset, torch.float32, "cpu")}
    tokens = torch.randint(0, preset.config["vocab_size"], (1, preset.prompt))
    calls = {}
    for name in (FP32, INT8):
        model = bench_quantized.build(name, bases).eval().requires_grad_(False)
        calls[name] = bench_model.Decoding(model, tokens, preset.steps, False)
    chosen = parts()
    best = {title: measure(lambda: calls[name](0), patches) for title, (name, patches) in chosen.items()}
    end = time.monotonic() + args.seconds
    while time.monotonic() < end:
        for title, (name, patches) in chosen.items():
            best[title] = min(best[title], measure(lambda: calls[name](0), patches))
    prompt = torch.randint(0, preset.config["vocab_size"], (1, preset.length))
    prefill = {name: compiled_prefill(name, bases, prompt, args.seconds) for name in (TORCHAO, INT8)}
    payload = {
        "benchmark": "quantized-profile", "environment": common.environment(), "preset": {"config": preset.config},
        "cpu_ms_per_token": {title: round(ms, 3) for title, ms in best.items()}, "tokens": preset.length,
        "cpu_ms_per_prefill": {name: round(ms, 2) for name, ms in prefill.items()},
    }  # fmt: skip
    for title, ms in best.items():
        print(f"{title:44} {ms:7.2f} ms of CPU time per token")
    for name, ms in prefill.items():
        print(f"{name + ', without its products':44} {ms:7.2f} ms of CPU time per compiled prefill")
    print("written to", common.write_json("quantized-profile", payload, out=args.out))


if __name__ == "__main__":
    main()
