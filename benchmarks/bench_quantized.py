"""Eight bits beside 32 and 16: the quantised ops, and whole models that use them.

    python benchmarks/bench_quantized.py            into results/<device>/quantized.json

Ops       bhyt's forward and its quantised twins on the same rows; RMSNorm followed by a scale per row, in eager ops
Models    one Llama-like model with the same matrices: as it is; as torchao's int8 settings make it; converted to BHyT;
          converted and quantised (`bhyt.quantization.quantize`). The head is quantised wherever the linears are.
Tasks     prefill   256 tokens, no cache
          decode    greedy steps one token at a time, batch 1, behind a prompt in a static cache
Wall time, host included. A compiled forward is one graph for the whole model.
"""

import argparse
import copy
import logging
from dataclasses import asdict
from typing import Any, Callable

import bench_model
import common
import models
import torch
import torchao
import transformers
from torch import Tensor, nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

import bhyt
from bhyt import functional as F
from bhyt.quantization import quantize

PRESET = models.Preset(
    models._shape(1024, 8, 16, 4, 2816, vocab_size=32000), "fp32,bf16", "fp32", batch=1, length=256, prompt=64, steps=8
)
OPS = ("forward", "add_forward", "forward_approx", "add_forward_approx")
SIZES = ((1, 1024), (16, 1024), (256, 1024), (1024, 4096), (8192, 4096))
INT8, FLOAT8 = "int8", "float8"
BASELINE, OURS = "RMSNorm fp32", "BHyT int8"
TORCHAO = "RMSNorm torchao"


def quantise_rows(y: Tensor) -> tuple[Tensor, Tensor]:
    """What a norm without a bound needs: a scale per row."""
    scale = y.abs().amax(-1, keepdim=True) / 127
    return (y / scale).round().to(torch.int8), scale


def op_calls(op: str, rows: int, d: int, dtype: torch.dtype, sets: int) -> dict[str, common.Call]:
    """By provider; the i-th call on the i-th set of rows."""
    lam, scale = torch.tensor([2.0]), 1 / 127
    given = [torch.randn(2 if "add" in op else 1, rows, d).to(dtype).unbind() for _ in range(sets)]
    variance = (torch.ones(rows, 1), None) if op.endswith("approx") else ()
    weight = torch.ones(d, dtype=dtype)
    plain, quantised = getattr(F, op), getattr(F, op + "_quantized")
    calls: dict[str, common.Call] = {
        "bhyt": lambda i: plain(*given[i], *variance, None, lam),
        INT8: lambda i: quantised(*given[i], *variance, None, lam, scale),
        FLOAT8: lambda i: quantised(*given[i], *variance, None, lam, 1 / 448, 0, torch.float8_e4m3fn),
    }
    if op == "forward":
        norm = torch.nn.functional.rms_norm
        calls["F.rms_norm, scale per row"] = lambda i: quantise_rows(norm(*given[i], (d,), weight))
    return calls


def measure_op(op: str, rows: int, d: int, dtype: str, seconds: float) -> dict[str, Any]:
    moved = common.minimal_bytes(op, rows, d, common.DTYPES[dtype].itemsize)
    sets = common.rotation(moved, common.last_level_cache())
    calls = op_calls(op, rows, d, common.DTYPES[dtype], sets)
    timings = common.timings_record(common.interleave(calls, sets=sets, seconds=seconds))
    return {"op": op, "rows": rows, "d": d, "dtype": dtype, "sets": sets, "providers": timings}


def build(name: str, bases: dict[str, nn.Module]) -> nn.Module:
    """A model by its name: norm, what the linears are, dtype of the rest."""
    base = bases["bf16" if name.endswith("bf16") else "fp32"]
    if name.startswith(TORCHAO):
        model = copy.deepcopy(base)
        config = Int8WeightOnlyConfig() if "weights" in name else Int8DynamicActivationInt8WeightConfig()
        quantize_(model, config)
        return model
    model = models.build("BHyT" if name.startswith("BHyT") else models.BASELINE, base, PRESET.length)
    if "int8" in name:
        quantize(model)
    return model


NAMES = (BASELINE, "RMSNorm bf16", f"{TORCHAO} int8 dynamic", f"{TORCHAO} int8 weights",
         f"{TORCHAO} int8 dynamic, bf16", "BHyT fp32", "BHyT bf16", OURS, f"{OURS}, bf16")  # fmt: skip


class Prefill:
    """Logits of a prompt."""

    def __init__(self, model: nn.Module, tokens: Tensor, compiled: bool) -> None:
        self.model, self.tokens = model, tokens
        self.run: Callable[..., Tensor] = bench_model.compile_alone(self.logits) if compiled else self.logits
        self(0)

    def logits(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits

    @torch.no_grad()
    def __call__(self, _: int) -> Tensor:
        return self.run(self.tokens)


def measure_models(
    task: str, mode: str, bases: dict[str, nn.Module], names: list[str], seconds: float
) -> dict[str, Any]:
    """Every model's time for a task, and those that could not run it."""
    torch._dynamo.reset()
    calls: dict[str, common.Call] = {}
    failed: dict[str, str] = {}
    generator = torch.Generator().manual_seed(1)
    length = PRESET.length if task == "prefill" else PRESET.prompt
    tokens = torch.randint(0, 32000, (1, length), generator=generator)
    for name in names:
        model = build(name, bases).eval().requires_grad_(False)
        try:
            if task == "prefill":
                calls[name] = Prefill(model, tokens, mode == "compiled")
            else:
                calls[name] = bench_model.Decoding(model, tokens, PRESET.steps, mode == "compiled")
        except Exception as error:  # of a peer, in a compiler: told, not hidden
            if not name.startswith(TORCHAO):
                raise
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    timings = common.timings_record(common.interleave(calls, seconds=seconds))
    count = length if task == "prefill" else PRESET.steps
    for timing in timings.values():
        timing["tokens_per_s"] = round(1e6 * count / timing["us"], 2)
    return {"task": task, "mode": mode, "tokens": count, "providers": timings, "failed": failed}


def goals(ops: list[dict[str, Any]], problems: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the project; a ratio is of two models in the same mode, whose samples took turns."""
    found = []
    wanted = {"decode": (2.5, 2.0), "prefill": (2.5, 1.3)}
    for p in problems:
        speeds = {name: timing["tokens_per_s"] for name, timing in p["providers"].items()}
        peers = (("its own fp32", "BHyT fp32"), ("the best torchao setting", TORCHAO))
        for target, (what, peer) in zip(wanted[p["task"]], peers):
            theirs = max((speed for name, speed in speeds.items() if name.startswith(peer)), default=None)
            ratio = speeds[OURS] / theirs if OURS in speeds and theirs else None
            met = None if ratio is None else ratio >= target
            found.append(common.goal(f"{p['task']} {p['mode']}, int8 over {what}", f">= {target}x", ratio, met))
    for dtype in ("fp32", "bf16"):
        ratios = {f"{p['op']}, {p['rows']} x {p['d']}": p["providers"]["bhyt"]["us"] / p["providers"][INT8]["us"]
                  for p in ops if p["dtype"] == dtype}  # fmt: skip
        if ratios:
            worst = min(ratios, key=lambda where: ratios[where])
            goal = common.goal(f"int8 over {dtype} op", ">= 1x", ratios[worst], ratios[worst] >= 1, worst)
            found.append(goal)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="prefill,decode")
    parser.add_argument("--modes", default="eager,compiled")
    parser.add_argument("--models", help="semicolon list of " + "; ".join(NAMES))
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing per problem; a tenth of it per op")
    parser.add_argument("--out", help="write the JSON here instead")
    args = parser.parse_args()
    common.reexecute()
    if args.threads:
        torch.set_num_threads(args.threads)
    logging.getLogger("torchao").setLevel(logging.ERROR)

    environment = common.environment()
    environment |= {"transformers": transformers.__version__, "torchao": torchao.__version__}
    payload: dict[str, Any] = {
        "benchmark": "quantized", "environment": environment, "preset": asdict(PRESET), "baseline": BASELINE,
        "goals": [], "ops": [], "problems": [],
    }  # fmt: skip

    def write() -> Any:
        payload["goals"] = goals(payload["ops"], payload["problems"])
        return common.write_json("quantized", payload, out=args.out)

    for op in OPS:
        for rows, d in SIZES:
            for dtype in ("fp32", "bf16"):
                payload["ops"].append(record := measure_op(op, rows, d, dtype, args.seconds / 10))
                times = {name: timing["us"] for name, timing in record["providers"].items()}
                print(f"{op:20} {rows:5} x {d} {dtype} ", {n: round(times["bhyt"] / us, 3) for n, us in times.items()})
    names = [name for name in NAMES if args.models is None or name in args.models.split(";")]
    bases = {dtype: models.make_base(PRESET, common.DTYPES[dtype], "cpu") for dtype in ("fp32", "bf16")}
    for mode in args.modes.split(","):
        for task in args.tasks.split(","):
            record = measure_models(task, mode, bases, names, args.seconds)
            base = record["providers"].get(BASELINE, {}).get("tokens_per_s", float("nan"))
            for name, timing in record["providers"].items():
                speed = timing["tokens_per_s"]
                print(f"{task:8}{mode:9} {name:32}{speed:10.1f} tokens/s {speed / base:7.3f}", flush=True)
            for name, reason in record["failed"].items():
                print(f"{task:8}{mode:9} {name:32} failed: {reason}")
            payload["problems"].append(record)
            path = write()  # each time: a run that is cut short leaves what it has
    for item in payload["goals"]:
        print(common.goal_line(item))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
