"""A converted model in vLLM beside vLLM's own Llama of the same matrices, and the ops beside vLLM's kernels.

    python benchmarks/bench_serving.py                into results/<device>/serving.json

Cases
    prefill     eight prompts of the preset's length, one token each
    decode 1    one prompt, and as many tokens as the preset decodes
    decode 8    eight of them at once
    <rows>      forward and add_forward(_approx) of rows x d, beside rms_norm and fused_add_rms_norm

Both models are in one process, and called in turn; a time is that of a call of `LLM.generate`, scheduling included.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any, Callable, Mapping

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # what is timed runs here
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import common

if __name__ == "__main__":
    common.reexecute()  # before vLLM is imported, which takes its time

import models
import torch
import vllm

import bhyt
import bhyt.hf

ROWS, WIDTH = (1, 64, 4096), 2048
PEERS = {"forward": "rms_norm", "add_forward": "fused_add_rms_norm", "add_forward_approx": "fused_add_rms_norm"}


def load(preset: models.Preset, dtype: torch.dtype, folder: Path, compiled: bool) -> dict[str, Any]:
    """The engines, each of a model that was saved."""
    engines = {}
    base = models.make_base(preset, dtype, "cpu")
    for name in ("Llama", "BHyT"):
        if name == "BHyT":
            bhyt.hf.convert(base, seq_len=preset.length)
        base.save_pretrained(folder / name)
        engines[name] = vllm.LLM(
            str(folder / name), skip_tokenizer_init=True, enforce_eager=not compiled, enable_prefix_caching=False,
            max_num_seqs=8, max_num_batched_tokens=8 * preset.length, seed=0,
        )  # fmt: skip
    return engines


def generate(engine: Any, prompts: list[list[int]], tokens: int) -> Callable[[int], object]:
    inputs = [vllm.TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    options = vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    return lambda _: engine.generate(inputs, options, use_tqdm=False)


def of_models(engines: Mapping[str, Any], preset: models.Preset, seconds: float) -> list[dict[str, Any]]:
    vocabulary = preset.config["vocab_size"]
    prompts = torch.randint(0, vocabulary, (8, preset.length - 1)).tolist()
    short = [prompt[: preset.prompt] for prompt in prompts]
    cases = {"prefill": (prompts, 1), "decode 1": (short[:1], preset.steps), "decode 8": (short, preset.steps)}
    records = []
    for case, (inputs, tokens) in cases.items():
        calls = {name: generate(engine, inputs, tokens) for name, engine in engines.items()}
        timings = common.interleave(calls, seconds=seconds)
        count = sum(map(len, inputs)) if case == "prefill" else tokens * len(inputs)
        record = {"case": case, "tokens": count, "providers": common.timings_record(timings)}
        records.append(record | {"speed": round(timings["Llama"].us / timings["BHyT"].us, 3)})
    return records


def of_ops(dtype: torch.dtype, seconds: float) -> list[dict[str, Any]]:
    """fused_add_rms_norm writes over its inputs; ours returns new tensors."""
    records = []
    weight, lam = torch.ones(WIDTH, dtype=dtype), torch.ones(1)
    offset = torch.full((1,), 1e-3)
    for rows in ROWS:
        x, residual, out = (torch.randn(rows, WIDTH).to(dtype) for _ in range(3))
        variance = x.float().square().mean(-1, keepdim=True)
        calls: dict[str, Callable[[int], object]] = {
            "rms_norm": lambda _: torch.ops._C.rms_norm(out, x, weight, 1e-6),
            "fused_add_rms_norm": lambda _: torch.ops._C.fused_add_rms_norm(x, residual, weight, 1e-6),
            "forward": lambda _: bhyt.functional.forward(x, weight, lam),
            "add_forward": lambda _: bhyt.functional.add_forward(x, residual, weight, lam),
            "add_forward_approx": lambda _: bhyt.functional.add_forward_approx(
                x, residual, variance, offset, weight, lam
            ),
        }
        with torch.inference_mode():
            timings = common.interleave(calls, seconds=seconds)
        speeds = {ours: round(timings[peer].us / timings[ours].us, 3) for ours, peer in PEERS.items()}
        records.append({"case": str(rows), "providers": common.timings_record(timings), "speed": speeds})
    return records


def report(record: Mapping[str, Any]) -> None:
    for name, timing in record["providers"].items():
        print(f"{record['case']:9} {name:19}{timing['us']:14.1f} us   spread {timing['spread']:.2f}")
    print(f"{'':10}{'speed over vLLM':19}{record['speed']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="200m", help="of models.py; vLLM on a CPU wants heads of a multiple of 32")
    parser.add_argument("--dtype", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--compiled", action="store_true", help="vLLM's torch.compile, which takes minutes")
    parser.add_argument("--seconds", type=float, default=20.0, help="per case of the models")
    parser.add_argument("--out", help="write the JSON here instead")
    args = parser.parse_args()
    preset, dtype = models.PRESETS[args.preset], common.DTYPES[args.dtype]
    environment = common.environment() | {"vllm": vllm.__version__}
    with tempfile.TemporaryDirectory() as folder:
        engines = load(preset, dtype, Path(folder), args.compiled)
        problems = of_models(engines, preset, args.seconds)
    problems += of_ops(dtype, min(2.0, args.seconds))
    for record in problems:
        report(record)
    goals = []
    for record in problems[:3]:
        text = f"{record['case']}: tokens per second over those of vLLM's own Llama"
        goals.append(common.goal(text, ">= 1.0", record["speed"], record["speed"] >= 1.0))
    print("\n" + "\n".join(map(common.goal_line, goals)))
    payload = {"benchmark": "serving", "environment": environment, "preset": args.preset, "dtype": args.dtype,
               "compiled": args.compiled, "width": WIDTH, "goals": goals, "problems": problems}  # fmt: skip
    print(f"written to {common.write_json('serving', payload, out=args.out)}")


if __name__ == "__main__":
    main()
