"""A converted model in vLLM beside vLLM's own Llama of the same matrices.

    python benchmarks/bench_serving.py                into results/<device>/serving.json

Cases
    prefill     eight prompts of a quarter of the preset's length, one token each
    decode 1    one prompt, and as many tokens as the preset decodes
    decode 8    eight of them at once

Engines
    Llama       vLLM's own class
    backend     the same folder by vLLM's transformers backend, which serves BHyT: what the backend alone costs
    BHyT        the converted model

All are in one process, and called in turn, in another order in each round. A figure is the median over the rounds of
Llama's time over the engine's in the same round, with quartiles: by the clock, and by the CPU time of the process,
which tells more where other work runs. A call is one of `LLM.generate`, scheduling included.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Callable, Mapping

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # what is timed runs here
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import common

if __name__ == "__main__":
    common.reexecute()  # before vLLM is imported, which takes its time

import models
import torch
import vllm

import bhyt.hf

ENGINES = {"Llama": {}, "backend": {"model_impl": "transformers"}, "BHyT": {}}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def load(preset: models.Preset, dtype: torch.dtype, folder: Path, compiled: bool) -> dict[str, Any]:
    """The engines, each of a model that was saved."""
    engines = {}
    base = models.make_base(preset, dtype, "cpu")
    for name, options in ENGINES.items():
        if name == "BHyT":
            bhyt.hf.convert(base, seq_len=preset.length)
        base.save_pretrained(folder / name)
        engines[name] = vllm.LLM(
            str(folder / name), skip_tokenizer_init=True, enforce_eager=not compiled, enable_prefix_caching=False,
            max_num_seqs=8, max_num_batched_tokens=2 * preset.length, seed=0, **options,
        )  # fmt: skip
    return engines


def generate(engine: Any, prompts: list[list[int]], tokens: int) -> Callable[[], object]:
    inputs = [vllm.TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    options = vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    return lambda: engine.generate(inputs, options, use_tqdm=False)


def interleave(calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, dict[str, list[float]]]:
    """Seconds of each call by each clock, round by round."""
    times: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in calls} for clock in CLOCKS}
    for call in calls.values():
        call()
    names, end = list(calls), time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["wall"][names[0]]) < 7:
        names = [*names[1:], names[0]]
        for name in names:
            before = {clock: read() for clock, read in CLOCKS.items()}
            calls[name]()
            for clock, read in CLOCKS.items():
                times[clock][name].append(read() - before[clock])
    return times


def speeds(times: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """Quartiles of Llama's time over each other engine's."""
    pairs = {name: zip(times["Llama"], own) for name, own in times.items() if name != "Llama"}
    return {name: [round(q, 3) for q in quantiles((a / b for a, b in pair), n=4)] for name, pair in pairs.items()}


def measure(engines: Mapping[str, Any], preset: models.Preset, seconds: float) -> list[dict[str, Any]]:
    vocabulary = preset.config["vocab_size"]
    prompts = torch.randint(0, vocabulary, (8, preset.length // 4)).tolist()
    short = [prompt[: preset.prompt] for prompt in prompts]
    cases = {"prefill": (prompts, 1), "decode 1": (short[:1], preset.steps), "decode 8": (short, preset.steps)}
    records = []
    for case, (inputs, tokens) in cases.items():
        times = interleave({name: generate(e, inputs, tokens) for name, e in engines.items()}, seconds)
        count = sum(map(len, inputs)) if case == "prefill" else tokens * len(inputs)
        rates = {name: round(count / median(own), 1) for name, own in times["wall"].items()}
        record = {"case": case, "rounds": len(times["wall"]["BHyT"]), "tokens_per_second": rates}
        records.append(record | {f"speed_{clock}": speeds(own) for clock, own in times.items()})
    return records


def report(record: Mapping[str, Any]) -> None:
    for name, rate in record["tokens_per_second"].items():
        own = [f"{clock} {record[f'speed_{clock}'].get(name, '')}" for clock in CLOCKS if name != "Llama"]
        print(f"{record['case']:9} {name:8}{rate:10.1f} tokens/s  {'   '.join(own)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="200m", help="of models.py; vLLM on a CPU wants heads of a multiple of 32")
    parser.add_argument("--dtype", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--compiled", action="store_true", help="vLLM's torch.compile, which takes minutes")
    parser.add_argument("--seconds", type=float, default=60.0, help="per case")
    parser.add_argument("--out", help="write the JSON here instead")
    args = parser.parse_args()
    preset, dtype = models.PRESETS[args.preset], common.DTYPES[args.dtype]
    environment = common.environment() | {"vllm": vllm.__version__}
    with tempfile.TemporaryDirectory() as folder:
        engines = load(preset, dtype, Path(folder), args.compiled)
        problems = measure(engines, preset, args.seconds)
    goals = []
    for record in problems:
        report(record)
        low, middle, high = record["speed_wall"]["BHyT"]
        text = f"{record['case']}: speed over vLLM's own Llama, within its quartiles {low} to {high}"
        goals.append(common.goal(text, ">= 1.0", middle, high >= 1.0))
    print("\n" + "\n".join(map(common.goal_line, goals)))
    payload = {"benchmark": "serving", "environment": environment, "preset": args.preset, "dtype": args.dtype,
               "compiled": args.compiled, "goals": goals, "problems": problems}  # fmt: skip
    print(f"written to {common.write_json('serving', payload, out=args.out)}")


if __name__ == "__main__":
    main()
