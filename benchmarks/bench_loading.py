"""Peak memory and time of loading a converted model from safetensors, beside transformers' own of the same size.

    python benchmarks/bench_loading.py                into results/<device>/loading.json

Cases
    plain     one file of float32 weights
    bf16      the same file, loaded with dtype=torch.bfloat16
    sharded   the weights in files of an eighth of their size

Every load is a process of its own, started in turn with those of the other model; results are medians. The clock runs
during `from_pretrained` alone. The peak is the process's largest resident set (VmHWM), imports included, at the end of
a forward of one token, since what loading maps is resident only once it is read; `loaded` is that peak less what was
resident before `from_pretrained`.
"""

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, Mapping

import common
import torch
import transformers

CASES = {"plain": "whole", "bf16": "whole", "sharded": "sharded"}  # case -> how its weights were saved
PROVIDERS = ("Llama", "BHyT")
TARGET = 1.2


def resident(field: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at its peak. getrusage's maximum would include that of the parent."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def load(folder: str, case: str) -> None:
    """The process that is measured; prints its figures."""
    if Path(folder).name == "BHyT":
        import bhyt.hf  # noqa: F401
    else:
        importlib.import_module("transformers.models.llama.modeling_llama")
    before, start = resident("VmRSS"), time.perf_counter()
    dtype = torch.bfloat16 if case == "bf16" else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / CASES[case], dtype=dtype)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False)
    peak = resident("VmHWM")
    print(json.dumps({"class": type(model).__name__, "peak": peak, "loaded": peak - before, "seconds": seconds}))


def save(preset_name: str, folder: Path) -> int:
    """Both models with the same matrices, each as one file and in shards; returns the number of parameters."""
    import models

    import bhyt.hf

    preset = models.PRESETS[preset_name]
    model = models.make_base(preset, torch.float32, "cpu")
    parameters = sum(p.numel() for p in model.parameters())
    for provider in PROVIDERS:
        if provider == "BHyT":
            bhyt.hf.convert(model, seq_len=preset.length)
        model.save_pretrained(folder / provider / "whole", max_shard_size=8 * parameters)
        model.save_pretrained(folder / provider / "sharded", max_shard_size=parameters // 2)
    return parameters


def run(folder: Path, case: str) -> dict[str, Any]:
    """One load in a fresh process."""
    command = [sys.executable, __file__, "--load", str(folder), "--case", case]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(folder: Path, case: str, repeats: int) -> dict[str, Any]:
    """One problem: medians of both, and what is BHyT's over Llama's."""
    runs: dict[str, list[dict[str, Any]]] = {provider: [] for provider in PROVIDERS}
    for _ in range(repeats):
        for provider in PROVIDERS:
            runs[provider].append(run(folder / provider, case))
    record: dict[str, Any] = {"case": case, "files": len(list((folder / "BHyT" / CASES[case]).glob("*.safetensors")))}
    record["providers"] = {
        provider: {
            "class": results[0]["class"],
            "peak_mib": round(median(result["peak"] for result in results), 1),
            "loaded_mib": round(median(result["loaded"] for result in results), 1),
            "seconds": round(median(result["seconds"] for result in results), 3),
        }
        for provider, results in runs.items()
    }
    llama, ours = (record["providers"][provider] for provider in PROVIDERS)
    record["ratios"] = {
        name: round(ours[field] / llama[field], 3)
        for name, field in (("peak", "peak_mib"), ("loaded", "loaded_mib"), ("seconds", "seconds"))
    }
    return record


def report(record: Mapping[str, Any]) -> None:
    for provider, figures in record["providers"].items():
        line = f"{record['case']:9}{provider:7}peak {figures['peak_mib']:8.1f} MiB"
        print(f"{line}   loaded {figures['loaded_mib']:8.1f} MiB   {figures['seconds']:7.3f} s")
    print(f"{'':9}BHyT over Llama: " + ", ".join(f"{name} {value:.3f}" for name, value in record["ratios"].items()))
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="200m", help="of models.py")
    parser.add_argument("--repeats", type=int, default=5, help="processes per model and case")
    parser.add_argument("--out", help="write the JSON here instead")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        load(args.load, args.case)
        return
    # Not reexecuted as the other benchmarks: memory is to be given back as users' processes do.
    environment = common.environment() | {"transformers": transformers.__version__}
    with tempfile.TemporaryDirectory() as name:
        parameters = save(args.preset, Path(name))
        print(f"{args.preset}: {parameters / 1e6:.1f}M parameters, {4 * parameters / 2**20:.0f} MiB in float32\n")
        problems = []
        for case in CASES:
            problems.append(measure(Path(name), case, args.repeats))
            report(problems[-1])
    worst = max(problems, key=lambda problem: problem["ratios"]["peak"])
    ratio = worst["ratios"]["peak"]
    text = "peak memory of loading, every case, over that of transformers' Llama"
    goals = [common.goal(text, f"<= {TARGET}", ratio, ratio <= TARGET, worst["case"])]
    print("\n" + "\n".join(map(common.goal_line, goals)))
    payload = {"benchmark": "loading", "environment": environment, "preset": args.preset, "parameters": parameters}
    print(f"written to {common.write_json('loading', payload | {'goals': goals, 'problems': problems}, out=args.out)}")


if __name__ == "__main__":
    main()
