"""What every benchmark shares: bytes a problem must move, interleaved timing, environment record, JSON files.

Nothing here needs a GPU; a CUDA benchmark takes the byte formulas, the environment record and the files from
here and brings its own timer.
"""

import datetime
import gc
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Callable, Mapping, Optional

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}

# Tensors of rows x d that each op must read and write, whoever computes it.
MIX = {
    "forward": (1, 1),  # x -> y
    "forward_approx": (1, 1),
    "add_forward": (2, 2),  # x, residual -> y, sum
    "add_forward_approx": (2, 2),
    "backward": (2, 1),  # grad_y, x -> grad_x
    "backward_approx": (2, 1),
    "add_backward": (3, 1),  # grad_y, grad_sum, sum -> grad_x, which is grad_residual too
    "add_backward_approx": (3, 1),
}


# ---- problems


def parts(case: str) -> tuple[str, ...]:
    """The ops of a case: "add_forward+backward" -> ("add_forward", "add_backward"); any other is one op."""
    forward, plus, _ = case.partition("+")
    return (forward, forward.replace("forward", "backward")) if plus else (case,)


def minimal_bytes(case: str, rows: int, d: int, itemsize: int) -> int:
    """Bytes that any implementation of `case` must move: rows read and written once, gain and row statistics.

    The gain has the rows' dtype, statistics are four bytes per row. The same number serves every provider,
    also one that needs less (LayerNorm's bias and second statistic are not counted).
    """
    total = 0
    for op in parts(case):
        reads, writes = MIX[op]
        total += (reads + writes) * rows * d * itemsize + d * itemsize + 4 * rows
        if "backward" in op:
            total += d * itemsize  # grad_weight
            total += 4 * rows if op.endswith("approx") else 0  # grad_variance
    return total


def last_level_cache() -> int:
    """Size in bytes of this CPU's last-level cache (32 MiB if the system does not tell)."""
    sizes = []
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        text = (index / "size").read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]])
    return max(sizes, default=32 << 20)


def rotation(bytes_per_call: int, cache: int) -> int:
    """Sets of buffers to use in turn: 1 if a call fits in half of the cache, else enough to fill it twice."""
    return 1 if bytes_per_call <= cache // 2 else ceil(2 * cache / bytes_per_call)


# ---- timing

Call = Callable[[int], object]  # call(i) works on the i-th set of buffers and returns what it computed


@dataclass
class Timing:
    """Of one provider: median microseconds per call, and how far to trust it."""

    us: float
    spread: float  # interquartile range over median
    samples: int
    batch: int  # calls per sample
    faults: int  # page faults per sample, median: 0 when allocation costs nothing


def interleave(
    calls: Mapping[str, Call],
    *,
    sets: int = 1,
    seconds: float = 1.0,
    sample_seconds: float = 4e-3,
    rounds: int = 50,
) -> dict[str, Timing]:
    """Time all providers of one problem in turn, one sample of each per round, so that drift hits them alike.

    A sample is a batch of calls that takes at least `sample_seconds`, after warm-up. Calls walk through the
    sets of buffers; with more than one set as many outputs are kept alive, so that outputs rotate as inputs
    do. With one set an output is freed at once. Stops after `rounds` rounds, or after `seconds` once
    everybody has 7 samples (3 if one takes more than a quarter of a second; such a provider also sits out
    rounds once it has used its share of time).
    """
    held: deque[object] = deque(maxlen=sets if sets > 1 else 0)
    position = 0

    def sample(call: Call, batch: int) -> tuple[float, int]:
        nonlocal position
        indices = [(position + k) % sets for k in range(batch)]
        position += batch
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        start = time.perf_counter_ns()
        for i in indices:
            held.append(call(i))
        elapsed = (time.perf_counter_ns() - start) / 1e9
        return elapsed, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults

    def calibrate(call: Call) -> int:
        batch = 1
        sample(call, 1)
        while (elapsed := sample(call, batch)[0]) < sample_seconds:
            batch = max(2 * batch, min(20 * batch, ceil(1.1 * batch * sample_seconds / max(elapsed, 1e-9))))
        return batch

    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        batches = {name: calibrate(call) for name, call in calls.items()}
        times: dict[str, list[float]] = {name: [] for name in calls}
        faults: dict[str, list[int]] = {name: [] for name in calls}
        spent = 0.0
        for _ in range(rounds):
            for name, call in calls.items():
                own = times[name]
                slow = bool(own) and own[0] > 0.25
                if slow and len(own) >= 3 and sum(own) > seconds / len(calls):
                    continue
                elapsed, new = sample(call, batches[name])
                own.append(elapsed)
                faults[name].append(new)
                spent += elapsed
            if spent > seconds and all(len(own) >= (3 if own[0] > 0.25 else 7) for own in times.values()):
                break
    finally:
        if collecting:
            gc.enable()
    return {name: _timing(times[name], faults[name], batches[name]) for name in calls}


def _timing(times: list[float], faults: list[int], batch: int) -> Timing:
    middle = median(times)
    low, _, high = quantiles(times, n=4) if len(times) > 1 else (middle, middle, middle)
    return Timing(
        us=round(middle / batch * 1e6, 4),
        spread=round((high - low) / middle, 4),
        samples=len(times),
        batch=batch,
        faults=int(median(faults)),
    )


# ---- environment and results

# Heap memory is kept and never mapped anew, so that no provider pays page faults for its outputs.
FAULT_FREE = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}


def reexecute(tier: Optional[str] = None) -> None:
    """Start the running script again, once, with fault-free allocation and the CPU tier asked for.

    Both are read when the process starts. tier: "avx512", "avx2" or "default", what ATEN_CPU_CAPABILITY
    takes; it rules ATen's kernels, bhyt's and Inductor's. None leaves it as it is.
    """
    wanted = dict(FAULT_FREE) | ({"ATEN_CPU_CAPABILITY": tier} if tier else {})
    if any(os.environ.get(key) != value for key, value in wanted.items()):
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], dict(os.environ) | wanted)


def cpu_model() -> str:
    """The CPU as it calls itself."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def slug(name: str) -> str:
    """A device name fit for a folder: "Intel(R) Xeon(R) Processor" -> "intel-xeon-processor"."""
    name = re.sub(r"\((r|tm)\)|@.*", "", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def _git(*arguments: str) -> Optional[str]:
    try:
        done = subprocess.run(
            ["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def environment() -> dict[str, Any]:
    """What a reader needs to judge a result. `dirty`: files other than results and README were changed."""
    status = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!research/study/results", ":!README.md")
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "last_level_cache": last_level_cache(),
        "tier": torch.backends.cpu.get_cpu_capability(),
        "load_before": round(os.getloadavg()[0], 2),
        "fault_free_allocation": all(os.environ.get(key) == value for key, value in FAULT_FREE.items()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}",
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "dirty": None if status is None else bool(status),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def timings_record(timings: Mapping[str, Timing]) -> dict[str, dict[str, Any]]:
    """For JSON."""
    return {name: asdict(timing) for name, timing in timings.items()}


def goal(
    text: str, target: str, measured: Optional[float], met: Optional[bool], where: str = ""
) -> dict[str, Any]:
    """One goal of a benchmark; measured and met are None when this run did not measure it."""
    rounded = None if measured is None else round(measured, 3)
    return {"goal": text, "target": target, "measured": rounded, "met": met, "where": where}


def goal_line(item: Mapping[str, Any]) -> str:
    """A goal as a line to print."""
    if item["met"] is None:
        return f"not measured  {item['goal']}: {item['target']}"
    verdict = "met   " if item["met"] else "MISSED"
    where = f" at {item['where']}" if item["where"] else ""
    return f"{verdict}        {item['goal']}: {item['target']}, measured {item['measured']:.2f}{where}"


def result_path(name: str, *, device: Optional[str] = None, out: Optional[str] = None) -> Path:
    """results/<device>/<name>.json, or `out`."""
    return Path(out) if out else RESULTS / (device or slug(cpu_model())) / f"{name}.json"


def write_json(
    name: str, payload: Mapping[str, Any], *, device: Optional[str] = None, out: Optional[str] = None
) -> Path:
    """Write `result_path`; one line per problem, so that runs compare by diff.

    A file that is there is replaced at once: who is stopped while writing leaves the file of before.
    """
    path = result_path(name, device=device, out=out)
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = []
    for key, value in payload.items():
        if isinstance(value, list):
            text = "[\n" + ",\n".join("  " + json.dumps(item) for item in value) + "\n ]"
        else:
            text = json.dumps(value)
        fields.append(f" {json.dumps(key)}: {text}")
    fresh = path.with_name(path.name + ".new")
    fresh.write_text("{\n" + ",\n".join(fields) + "\n}\n")
    os.replace(fresh, path)
    return path
