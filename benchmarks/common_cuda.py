"""What CUDA benchmarks add to common.py: timing by device events over replayed CUDA graphs, device facts."""

import gc
import json
from collections import deque
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Callable, Mapping, Optional

import common
import torch

DEVICE = "cuda"
MOST_ROWS = 1 << 60  # of a problem's buffers
# Milliseconds of work per sample: long against the few microseconds by which two events are off.
SAMPLE_MS = 0.5


@dataclass
class Timing:
    """Of one provider: median microseconds per call, and how it was run."""

    us: float
    spread: float  # interquartile range over median
    samples: int
    batch: int  # calls per sample
    mode: str  # "graph": replayed CUDA graph, no host time in it; "eager": calls from Python


def device_record() -> dict[str, Any]:
    """What a reader needs to judge a result, besides common.environment()."""
    properties = torch.cuda.get_device_properties(0)
    record: dict[str, Any] = {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
    }
    try:
        record["sm_clock_mhz"] = torch.cuda.clock_rate()
    except Exception:  # needs a driver library that not every installation has
        record["sm_clock_mhz"] = None
    return record


def sets_beyond_l2(bytes_per_call: int) -> int:
    """Sets of buffers whose rotation leaves nothing of a call in L2 for its next turn."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(64, ceil(3 * l2 / max(1, bytes_per_call)))) + 1


class _Runner:
    """A batch of calls that walks through all sets of buffers, as a CUDA graph where it can be captured."""

    def __init__(self, call: Callable[[int], object], sets: int, stream: torch.cuda.Stream) -> None:
        self.call, self.sets, self.stream = call, sets, stream
        self.graph: Optional[torch.cuda.CUDAGraph] = None
        self.replays = 1
        self.kept: list[object] = []  # outputs in the graph's memory
        self._calls(2 * sets)
        stream.synchronize()
        once = max(self._timed_eager(sets) / sets, 1e-4)
        self.batch = sets * max(1, ceil(SAMPLE_MS / once / sets))
        self._capture()

    def _calls(self, count: int) -> list[object]:
        held: deque[object] = deque(maxlen=self.sets)  # outputs rotate as inputs do
        for i in range(count):
            held.append(self.call(i % self.sets))
        return list(held)

    def _timed_eager(self, count: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(self.stream)
        self._calls(count)
        end.record(self.stream)
        end.synchronize()
        return start.elapsed_time(end)

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="relaxed"):
                self.kept = self._calls(self.batch)
            graph.replay()
            self.stream.synchronize()
        except Exception as error:
            print(f"    not captured, timed eagerly: {str(error).splitlines()[0][:100]}")
            torch.cuda.synchronize()
            return
        self.graph = graph
        # The eager calls that sized the batch may have been bound by the host; the device may be done much sooner.
        self.replays = max(1, ceil(SAMPLE_MS / max(self.sample(), 1e-3)))

    def sample(self) -> float:
        """Milliseconds for one batch."""
        if self.graph is None:
            return self._timed_eager(self.batch)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(self.stream)
        for _ in range(self.replays):
            self.graph.replay()
        end.record(self.stream)
        end.synchronize()
        return start.elapsed_time(end) / self.replays


def interleave(
    calls: Mapping[str, Callable[[int], object]], *, sets: int, rounds: int = 9, failures: dict[str, str]
) -> dict[str, Timing]:
    """Time all providers of one problem in turn, round after round, so that clock changes hit them alike.

    A provider that fails is named in `failures`; the others go on.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    gc.collect()
    times: dict[str, list[float]] = {}
    with torch.cuda.stream(stream):
        runners = {}
        for name, call in calls.items():
            try:
                runners[name] = _Runner(call, sets, stream)
            except Exception as error:
                failures[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                torch.cuda.synchronize()
        for _ in range(rounds):
            for name, runner in runners.items():
                times.setdefault(name, []).append(runner.sample() * 1e3 / runner.batch)
    torch.cuda.synchronize()
    result = {}
    for name, own in times.items():
        middle = median(own)
        low, _, high = quantiles(own, n=4)
        runner = runners[name]
        mode = "eager" if runner.graph is None else "graph"
        result[name] = Timing(round(middle, 4), round((high - low) / middle, 4), len(own), runner.batch, mode)
    del runners
    torch.cuda.empty_cache()
    return result


def environment() -> dict[str, Any]:
    """common.environment() and the device."""
    device = {"device": "dry run", "dry": True} if DEVICE == "cpu" else device_record()
    return {**common.environment(), **device}


def earlier(path: Optional[str], environment: dict[str, Any]) -> Optional[dict[str, Any]]:
    """What a file has of the same device, software and commit; None where there is nothing.

    Raises:
        SystemExit: the file is of another one.
    """
    if path is None or not Path(path).exists():
        return None
    payload = json.loads(Path(path).read_text())
    for key in ("device", "torch", "commit"):
        if payload["environment"].get(key) != environment.get(key):
            was, now = payload["environment"].get(key), environment.get(key)
            raise SystemExit(f"--resume: {path} is of {key} {was}, this is {now}")
    return payload


def dry_run() -> None:
    """For trying a benchmark without a GPU: problems have few rows, on the CPU, and every time is made up."""
    global DEVICE, MOST_ROWS, sets_beyond_l2, interleave

    def made_up(
        calls: Mapping[str, Callable[[int], object]], *, sets: int, rounds: int = 9, failures: dict[str, str]
    ) -> dict[str, Timing]:
        for name, call in calls.items():
            if name != "empty":
                call(0)
        return {name: Timing(float(len(name)), 0.0, rounds, 1, "made up") for name in calls}

    DEVICE, MOST_ROWS = "cpu", 4
    sets_beyond_l2, interleave = (lambda bytes_per_call: 2), made_up
