"""A Llama-like block under torch.compile: sites as fused ops, or as formulas that Inductor may fuse.

    python benchmarks/bench_compile.py                into results/<device>/compile.json
    python benchmarks/bench_compile.py --device cuda --dim 2048 --heads 16 --length 2048

One step is forward and backward of `--layers` blocks of examples/pretraining. Providers: BHyT (exact + approximate
sites) with every site a fused op, with approximate sites decomposed, with all sites decomposed; RMSNorm beside it;
each compiled, and BHyT and RMSNorm eager too.
"""

import argparse
import copy
import sys
from typing import Any

import common
import torch
from torch import Tensor, nn

import bhyt

sys.path.insert(0, str(common.REPOSITORY / "examples"))
from pretraining.model import ModelConfig, Rotary  # noqa: E402
from pretraining.norms import BLOCKS  # noqa: E402

SHAPE = {"layers": 2, "dim": 512, "heads": 8, "kv_heads": 2, "length": 256, "batch": 4}


class Blocks(nn.Module):
    def __init__(self, norm: str, config: ModelConfig) -> None:
        super().__init__()
        self.rotary = Rotary(config.dim // config.heads, config.seq_len)
        self.layers = nn.ModuleList(BLOCKS[norm](config, i + 1) for i in range(config.layers))
        for layer in self.layers:
            layer.refresh()

    def forward(self, stream: Tensor) -> Tensor:
        branch, rotary = None, self.rotary(stream)
        for layer in self.layers:
            branch, stream = layer(branch, stream, rotary)
        return stream + branch


class Step:
    """Forward and backward of blocks in one dtype; `decompose` is the setting they are compiled under."""

    def __init__(self, blocks: nn.Module, x: Tensor, decompose: str = "", dynamic: bool = False) -> None:
        self.x, self.decompose = x, decompose
        self.blocks = copy.deepcopy(blocks).to(x.device, x.dtype)
        self.run = torch.compile(self.blocks, fullgraph=True, dynamic=dynamic) if decompose else self.blocks
        self(0)

    def __call__(self, _: int) -> tuple[Tensor, ...]:
        bhyt.decompose_when_compiling(self.decompose or "none")
        return torch.autograd.grad(self.run(self.x).sum(), tuple(self.blocks.parameters()))


def measure(args: argparse.Namespace, dtype: str) -> dict[str, Any]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = ModelConfig(256, args.layers, args.dim, args.heads, args.kv_heads, args.length)
    x = torch.randn(args.batch, args.length, args.dim, dtype=common.DTYPES[dtype], device=args.device)
    ours, rms = Blocks("bhyt", config), Blocks("rmsnorm", config)
    calls: dict[str, common.Call] = {
        "fused ops": Step(ours, x, "none"),
        "approximate decomposed": Step(ours, x, "approximate"),
        "all decomposed": Step(ours, x, "all"),
        "rms_norm": Step(rms, x, "none"),
        "eager": Step(ours, x),
        "eager rms_norm": Step(rms, x),
    }
    if args.device != "cpu":
        calls = {name: synchronised(call) for name, call in calls.items()}
    timings = common.interleave(calls, seconds=args.seconds)
    shape = {name: vars(args)[name] for name in SHAPE}
    return {"dtype": dtype, **shape, "providers": common.timings_record(timings)}


def synchronised(call: common.Call) -> common.Call:
    def run(i: int) -> object:
        result = call(i)
        torch.cuda.synchronize()
        return result

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in SHAPE.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--out", help="write the JSON here instead")
    args = parser.parse_args()
    common.reexecute()
    environment = common.environment()
    if args.device != "cpu":
        environment["gpu"] = torch.cuda.get_device_name()
    records = []
    for dtype in args.dtypes.split(","):
        record = measure(args, dtype)
        records.append(record)
        fused = record["providers"]["fused ops"]["us"]
        for name, timing in record["providers"].items():
            print(f"{dtype:6}{name:26}{timing['us']:>12.0f} us   {timing['us'] / fused:.3f} of fused ops")
    device = None if args.device == "cpu" else common.slug(environment["gpu"])
    payload = {"benchmark": "compile", "environment": environment, "problems": records}
    print(f"written to {common.write_json('compile', payload, device=device, out=args.out)}")


if __name__ == "__main__":
    main()
