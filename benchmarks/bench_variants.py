"""Builds of this package beside each other on one GPU: a kernel before and after a change, sample by sample.

    python benchmarks/bench_variants.py --variant before=FOLDER --variant now=FOLDER --out variants.json

FOLDER has a build's package `bhyt`: a wheel, unpacked. FOLDER@NAME runs it with BHYT_CUDA_BACKWARD=NAME, a variant of
the backward. Each variant runs in a process of its own, as a process can load but one build and keeps to one variant;
they are asked for a sample in turn, so that clock and heat are the same for all. The first variant is what the others
are compared with. Every process times a copy too: where the copies differ, nothing can be said.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any, Iterator, NamedTuple

HERE = Path(__file__).resolve().parent
ELEMENTS = 2**25


class Problem(NamedTuple):
    op: str
    rows: int
    d: int
    dtype: str = "bf16"

    def __str__(self) -> str:
        return f"{self.op} {self.rows}x{self.d} {self.dtype}"


def problems() -> Iterator[Problem]:
    """In order of worth."""
    yield from (Problem("backward", ELEMENTS // d, d) for d in (4096, 1024, 16384, 256, 65536))
    yield from (Problem(op, rows, 4096) for rows in (1, 128) for op in ("forward", "add_forward", "add_forward_approx"))
    yield Problem("add_backward", ELEMENTS // 2 // 4096, 4096, "fp32")
    yield from (Problem("backward_approx", ELEMENTS // d, d) for d in (4096, 65536))
    yield Problem("add_backward", ELEMENTS // 4096, 4096)


# The process of one build ---------------------------------------------------------------------------------------------


def serve(dry: bool) -> None:
    """Answers lines on stdin: null with the library's path and its variant of the backward, a problem with the names of
    its calls, a name with a sample of it in microseconds."""
    sys.path.append(str(HERE))
    import common
    import common_cuda
    import cuda_providers
    import torch

    import bhyt

    runners: dict[str, Any] = {}
    if dry:
        common_cuda.dry_run()
    stream = None if dry else torch.cuda.Stream()

    def prepare(problem: Problem) -> list[str]:
        runners.clear()
        if not dry:
            torch.cuda.empty_cache()
        decode = problem.rows <= 128
        moved = common.minimal_bytes(problem.op, problem.rows, problem.d, common.DTYPES[problem.dtype].itemsize)
        sets = 4 if decode else common_cuda.sets_beyond_l2(moved)
        rows, dtype = min(problem.rows, common_cuda.MOST_ROWS), common.DTYPES[problem.dtype]
        b = cuda_providers.Buffers(rows, problem.d, dtype, sets, common_cuda.DEVICE)
        for name, call in (("bhyt", cuda_providers.own(problem.op, b)), ("copy", cuda_providers.copy(problem.op, b))):
            if dry:
                call(0)
                runners[name] = lambda name=name: float(len(name))
                continue
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                runner = common_cuda._Runner(call, sets, stream)
            runners[name] = lambda runner=runner: runner.sample() * 1e3 / runner.batch
        return list(runners)

    def sample(name: str) -> float:
        if dry:
            return runners[name]()
        with torch.cuda.stream(stream):
            return runners[name]()

    for line in sys.stdin:
        request = json.loads(line)
        if request is None:
            named = os.environ.get("BHYT_CUDA_BACKWARD", "two_launches")
            if hasattr(torch.ops.bhyt, "cuda_backward"):
                torch.ops.bhyt.cuda_backward()  # raises where the build has no variant of that name
            elif named != "two_launches" and not dry:
                raise SystemExit(f"bench_variants.py: {bhyt.library_path()} has no variants of the backward")
            answer: Any = [str(bhyt.library_path()), named]
        else:
            answer = sample(request) if isinstance(request, str) else prepare(Problem(*request))
        print(json.dumps(answer), flush=True)


class Build:
    """A build's process, as its parent sees it."""

    def __init__(self, place: str, dry: bool) -> None:
        folder, _, backward = place.partition("@")
        command = [sys.executable, "-P", str(Path(__file__).resolve()), "--serve", *(["--dry"] if dry else [])]
        path = os.pathsep.join([str(Path(folder).resolve()), os.environ.get("PYTHONPATH", "")])
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        environment = {**os.environ, "PYTHONPATH": path, "BHYT_CUDA_BACKWARD": backward or "two_launches"}
        self.process = subprocess.Popen(command, text=True, env=environment, **pipes)

    def ask(self, request: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process has ended with status {self.process.wait()}")
        return json.loads(answer)

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=30)


def measure(problem: Problem, builds: dict[str, Build], rounds: int) -> dict[str, Any]:
    names = {variant: build.ask(list(problem)) for variant, build in builds.items()}
    times: dict[str, dict[str, list[float]]] = {variant: {n: [] for n in names[variant]} for variant in builds}
    for _ in range(rounds):
        for variant, build in builds.items():
            for name, own in times[variant].items():
                own.append(build.ask(name))
    us = {variant: {name: round(median(own), 4) for name, own in table.items()} for variant, table in times.items()}
    first = next(iter(us.values()))
    gain = {variant: round(first["bhyt"] / table["bhyt"], 4) for variant, table in us.items()}
    return {**problem._asdict(), "us": us, "of_the_first": gain}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", action="append", default=[], metavar="NAME=FOLDER[@BACKWARD]")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no problem after so many")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out")
    parser.add_argument("--dry", action="store_true", help="without a GPU: few rows on the CPU, times are made up")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.dry)
    if len(options.variant) < 2:
        parser.error("--variant: expected two or more, NAME=FOLDER")

    import common
    import common_cuda
    import torch

    if options.dry:
        common_cuda.dry_run()
    elif not torch.cuda.is_available():
        parser.exit(2, "bench_variants.py: no CUDA device\n")
    environment = common_cuda.environment()
    results = []
    builds = {name: Build(place, options.dry) for name, _, place in (v.partition("=") for v in options.variant)}
    kinds = {name: build.ask(None) for name, build in builds.items()}
    if len(set(map(tuple, kinds.values()))) < len(builds):
        raise SystemExit(f"bench_variants.py: expected variants that differ, got {kinds}")
    began = time.monotonic()
    for problem in problems():
        if time.monotonic() - began > options.seconds:
            break
        results.append(result := measure(problem, builds, options.rounds))
        print(f"{str(problem):34}" + "".join(f"  {variant} {table['bhyt']:.2f} us (copy {table['copy']:.2f})"
                                             for variant, table in result["us"].items()), flush=True)  # fmt: skip
        variants = {name: backward for name, (_, backward) in kinds.items()}
        payload = {"environment": environment, "variants": variants, "results": results}
        common.write_json("variants", payload, device=common.slug(environment["device"]), out=options.out)
    for build in builds.values():
        build.end()


if __name__ == "__main__":
    main()
