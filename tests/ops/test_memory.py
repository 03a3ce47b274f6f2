"""Peak extra memory of each op on the CPU: its outputs, one gain in the dtype of the arithmetic, bounded partial sums,
and in a backward nothing for a gradient that nobody wants.

Two measures: what torch's allocator gives out, tensors and scratch, to the byte, as torch's profiler records it; and
all memory, as the peak of the resident set, which the kernel resets on request.
"""

import json
import os
import platform
import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Callable, Collection, Dict, Iterator, List, Sequence, Tuple

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from support.cases import DTYPES, FORMS, Call, make_call, make_upstream
from support.paths import TESTS

CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
ROWS, D = 2048, 4096
LONG = 8, 2**19  # rows so long that a single one is 2 MB
# Pages of the stack, of code touched for the first time, and of counters that are summed over cores late.
NOISE = 2**20


def size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def allocations(function: Callable[[], object], folder: Path) -> Tuple[List[int], List[int]]:
    """The bytes of each block that `function` has from torch's allocator; and of those it frees again. Both sorted."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = function()
    del kept
    trace = folder / "trace.json"
    record.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "[memory]"]
    changes = [(e["args"]["Addr"], e["args"]["Bytes"]) for e in sorted(events, key=lambda e: e["ts"])]
    taken = {address for address, size in changes if size > 0}
    freed = [-size for address, size in changes if size < 0 and address in taken]
    return sorted(size for _, size in changes if size > 0), sorted(freed)


def subsets(names: Collection[str]) -> Iterator[Tuple[str, ...]]:
    """All but the empty one."""
    for n in range(1, len(names) + 1):
        yield from combinations(names, n)


def gain_copy(call: Call) -> List[int]:
    """Of a gain that rows cannot read as it is: none given, of another dtype, or beside lanes of bfloat16."""
    stream = call.residual if call.adds else call.x
    plain = torch.backends.cpu.get_cpu_capability() == "DEFAULT" and platform.machine() == "x86_64"
    in_order = stream.dtype != torch.bfloat16 or plain
    as_it_is = call.weight is not None and call.weight.dtype == call.accumulate and in_order
    return [] if as_it_is else [call.x.shape[-1] * call.accumulate.itemsize]


def backward_scratch(call: Call, wanted: Collection[str]) -> List[int]:
    """Of a backward on one thread that gives these gradients."""
    rows, d = call.x.numel() // call.x.shape[-1], call.x.shape[-1]
    chunks = -(-rows // max(8, -(-rows // 384)))
    row, grad_x = d * call.accumulate.itemsize, "x" in wanted or "residual" in wanted
    needs_sums = "lam" in wanted or (grad_x if call.exact else "variance" in wanted)
    scratch = gain_copy(call) if grad_x or needs_sums else []
    scratch += [chunks * row] if "weight" in wanted else []
    scratch += [chunks * 8] if "lam" in wanted else []
    return scratch + ([row] if call.exact and grad_x else [])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_memory_allocated(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Forward allocates its outputs and a copy of the gain where rows need one, with a graph too; backward the
    gradients and its scratch. Row strides need no copy."""
    call = make_call(form, (64, 96), dtype, weight=torch.float32)
    call = replace(call, x=torch.cat([call.x, call.x], -1)[:, 96:])
    outputs = [size(t) for t in call.run() if t is not None]
    assert allocations(call.run, tmp_path) == (sorted(outputs + gain_copy(call)), gain_copy(call))

    leaves = call.requiring_grad()
    assert allocations(leaves.run, tmp_path) == (sorted(outputs + gain_copy(call)), gain_copy(call))

    out, upstream = leaves.run(), make_upstream(call)
    used = [(o, g) for o, g in zip(out, upstream) if o is not None]
    inputs = leaves.differentiable()
    gradients = [size(t) for name, t in inputs.items() if name != "residual"]  # shares x's
    rows = [o for o, _ in used], list(inputs.values()), [g for _, g in used]
    scratch = backward_scratch(call, inputs)
    taken = allocations(lambda: torch.autograd.grad(*rows), tmp_path)
    assert taken == (sorted(gradients + scratch), sorted(scratch))


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16, None], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_only_what_is_wanted(form: str, weight: torch.dtype, tmp_path: Path) -> None:
    """Whatever gradients are left out (a frozen gain, no gain, a frozen lam, rows that need none): no tensor in the
    backward, and no scratch."""
    call = make_call(form, (64, 96), weight=weight)
    for names in subsets(call.differentiable()):
        leaves = call.requiring_grad(names)
        y, wanted = leaves.run().y, [leaves.differentiable()[name] for name in names]
        grad_y = torch.ones_like(y)
        gradients = [size(t) for name, t in zip(names, wanted) if name != "residual" or "x" not in names]
        scratch = backward_scratch(call, names)
        taken = allocations(lambda: torch.autograd.grad(y, wanted, grad_y), tmp_path)
        assert taken == (sorted(gradients + scratch), sorted(scratch)), names


@pytest.mark.parametrize("form", FORMS)
def test_one_copy_of_what_no_kernel_reads(form: str, tmp_path: Path) -> None:
    """A transposed x is copied once, and the copy is gone afterwards."""
    call = make_call(form, (32, 48))  # from 3600 elements on torch transposes through a buffer of its own
    call = replace(call, x=call.x.t().contiguous().t())
    outputs = [size(t) for t in call.run() if t is not None]
    assert allocations(call.run, tmp_path) == (sorted([*outputs, size(call.x)]), [size(call.x)])  # no copy of the gain


def resident(field: str) -> int:
    """VmRSS or VmHWM, its peak since the last reset, in bytes."""
    return next(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if line.startswith(field))


def peak_of(function: Callable[[], object]) -> int:
    """The most memory that `function` held at once beyond what there was before, in bytes."""
    CLEAR_REFS.write_text("5")
    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


def backward_of(call: Call, mask: Sequence[bool]) -> Callable[[], Tuple[Tensor, ...]]:
    """The backward op of a call, on its own x."""
    upstream, stream = make_upstream(call), call.residual if call.adds else call.x
    variance = stream.float().square().mean(-1, keepdim=True) if call.exact else call.variance
    rows = [upstream.y, *([upstream.variance] if call.exact else []), upstream.sum, stream, variance]
    rows += [] if call.exact else [call.offset]
    op = torch.ops.bhyt.backward if call.exact else torch.ops.bhyt.backward_approx
    return lambda: op(*rows, call.weight, call.lam, call.kappa, call.eps, list(mask))


def measure() -> Dict[str, List[int]]:
    """Peak, outputs and scratch in bytes: of every op, forward and backward, and of every mask of a backward."""
    torch.set_num_threads(1)
    measured = {}

    def peak(step: str, function: Callable[[], Tuple[Tensor, ...]], scratch: int) -> None:
        outputs = size(*function())
        measured[step] = [peak_of(function), outputs, scratch]

    for form in FORMS:
        for dtype in (torch.float32, torch.bfloat16):
            call = make_call(form, (ROWS, D), dtype, weight=torch.bfloat16)
            names = ["x", *([] if call.exact else ["variance"]), "weight", "lam"]
            peak(f"{form} {dtype}", call.run, sum(gain_copy(call)))
            all_of_them = backward_of(call, [True] * len(names))
            peak(f"gradients of {form} {dtype}", all_of_them, sum(backward_scratch(call, names)))
            if call.adds:
                continue
            call = make_call(form, LONG, dtype, weight=torch.bfloat16)
            for wanted in subsets(names):
                function = backward_of(call, [name in wanted for name in names])
                peak(f"{wanted} of {form} {dtype}", function, sum(backward_scratch(call, wanted)))
    return measured


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="only Linux resets the peak of the resident set")
def test_peak_of_all_memory() -> None:
    """Beyond its outputs a forward of 2048 x 4096 takes the gain in float32, a backward that, partial sums of 256 rows,
    a row of its own: 4 MB where a copy of the rows would be 17 or 34. A backward takes nothing for what it leaves out,
    by any mask."""
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # freed is given back
    command = [sys.executable, "-m", "ops.test_memory"]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, **environment}, cwd=TESTS
    )
    assert run.returncode == 0, run.stderr
    for step, (peak, outputs, scratch) in json.loads(run.stdout).items():
        assert outputs - NOISE < peak < outputs + scratch + NOISE, f"{step}: {peak} for outputs of {outputs}"


if __name__ == "__main__":
    print(json.dumps(measure()))
