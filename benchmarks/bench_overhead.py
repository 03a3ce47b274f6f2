"""What a call costs: microseconds on 1 x 64 fp32, where nothing but the way into the kernel takes time.

    python benchmarks/bench_overhead.py               into results/<device>/overhead.json

Modes
    no_grad            the call under torch.no_grad(), no input requires a gradient
    grad               x and the parameters require gradients: the call records its graph, then drops it
    forward+backward   the call, then torch.autograd.grad of y for x and the parameters, a fixed gradient:
                       the same for every provider, nothing is accumulated into .grad

Providers: bhyt.functional.forward, torch.ops.bhyt.forward and the modules bhyt.BHyT and bhyt.BHyTApprox; F.layer_norm
and F.rms_norm; nn.LayerNorm and nn.RMSNorm. "+ add" is the site or norm of x + x. All in turn, round after round; a sample is a batch of calls, the
result the median.
"""

import argparse
from typing import Any, Callable, NamedTuple, Optional, Sequence

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bhyt

ROWS, D = 1, 64
MODES = ("no_grad", "grad", "forward+backward")
# Which peer each of ours is held against: functions against functions, modules against modules.
PAIRS = {
    "bhyt.functional.forward": "F.layer_norm",
    "torch.ops.bhyt.forward": "F.layer_norm",
    "bhyt.BHyT": "nn.LayerNorm",
    "bhyt.BHyTApprox": "nn.LayerNorm",
    "bhyt.BHyT + add": "nn.LayerNorm + add",
    "bhyt.BHyTApprox + add": "nn.LayerNorm + add",
}


class Provider(NamedTuple):
    call: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]


def providers(grad: bool) -> dict[str, Provider]:
    """Everybody on the same numbers, every parameter and x with or without requires_grad."""

    def leaf(value: Tensor) -> Tensor:
        return value.clone().requires_grad_(grad)

    x = leaf(torch.linspace(-2, 2, D).repeat(ROWS, 1))
    weight, bias, lam = leaf(torch.ones(D)), leaf(torch.zeros(D)), leaf(torch.ones(1))
    ours, shape = (x, weight, lam), (D,)
    table = {
        "bhyt.functional.forward": Provider(lambda: bhyt.functional.forward(x, weight, lam)[0], ours),
        "torch.ops.bhyt.forward": Provider(lambda: torch.ops.bhyt.forward(x, weight, lam)[0], ours),
        "F.layer_norm": Provider(lambda: F.layer_norm(x, shape, weight, bias), (x, weight, bias)),
        "F.rms_norm": Provider(lambda: F.rms_norm(x, shape, weight), (x, weight)),
    }
    exact, approximate, layer_norm, rms_norm = bhyt.BHyT(D), bhyt.BHyTApprox(D), nn.LayerNorm(D), nn.RMSNorm(D)
    approximate.set_variance_offset(0.01)
    variance = torch.ones(ROWS, 1)
    for name, module, call in (
        ("bhyt.BHyT", exact, lambda: exact(x)),
        ("bhyt.BHyTApprox", approximate, lambda: approximate(x, variance)),
        ("nn.LayerNorm", layer_norm, lambda: layer_norm(x)),
        ("nn.RMSNorm", rms_norm, lambda: rms_norm(x)),
        ("bhyt.BHyT + add", exact, lambda: exact(x, x)[0]),
        ("bhyt.BHyTApprox + add", approximate, lambda: approximate(x, variance, x)[0]),
        ("nn.LayerNorm + add", layer_norm, lambda: layer_norm(x + x)),
    ):
        module.requires_grad_(grad)
        table[name] = Provider(call, (x, *module.parameters()))
    return table


def timed_call(mode: str, provider: Provider) -> common.Call:
    call, leaves = provider
    if mode != "forward+backward":
        return lambda _: call()
    gradient = torch.linspace(1, 2, D).repeat(ROWS, 1)
    return lambda _: torch.autograd.grad(call(), leaves, gradient)


def measure(seconds: float) -> list[dict[str, Any]]:
    """One record per mode, with everybody's microseconds."""
    records = []
    for mode in MODES:
        calls = {name: timed_call(mode, provider) for name, provider in providers(mode != "no_grad").items()}
        with torch.set_grad_enabled(mode != "no_grad"):
            timings = common.interleave(calls, seconds=seconds, sample_seconds=2e-3, rounds=400)
        records.append({"mode": mode, "providers": common.timings_record(timings)})
    return records


def goals(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A call costs no more than LayerNorm's, in every mode."""
    items = []
    for record in records:
        times = record["providers"]
        for ours, peer in PAIRS.items():
            value = times[ours]["us"] / times[peer]["us"]
            text = f"{ours}, {record['mode']}, time over {peer}'s"
            items.append(common.goal(text, "<= 1", value, value <= 1, f"{ROWS}x{D}"))
    return items


def print_table(records: Sequence[dict[str, Any]]) -> None:
    print(f"{'microseconds per call':26}" + "".join(f"{record['mode']:>18}" for record in records))
    for name in records[0]["providers"]:
        print(f"{name:26}" + "".join(f"{record['providers'][name]['us']:>18.2f}" for record in records))


def main(arguments: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=8.0, help="measuring time per mode")
    parser.add_argument("--quick", action="store_true", help="0.1 s per mode")
    parser.add_argument("--device", help="name of the results folder; default: the CPU's")
    parser.add_argument("--out", help="write the JSON here instead")
    args = parser.parse_args(arguments)
    common.reexecute()
    torch.set_num_threads(args.threads)
    environment = common.environment()
    print(", ".join(f"{key} {value}" for key, value in environment.items()) + "\n")
    records = measure(0.1 if args.quick else args.seconds)
    items = goals(records)
    print_table(records)
    print("\n" + "\n".join(map(common.goal_line, items)))
    payload = {"benchmark": "overhead", "environment": environment, "rows": ROWS, "d": D, "goals": items}
    path = common.write_json("overhead", payload | {"modes": records}, device=args.device, out=args.out)
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
