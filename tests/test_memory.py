"""Peak extra memory of each op on the CPU: its outputs, one gain in the dtype of the arithmetic, bounded partial
sums.

Two measures: tensors, to the byte, as torch's profiler records every allocation; and all memory, the scratch no
tensor owns included, as the peak of the resident set, which the kernel resets on request.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Callable, Dict, List, Tuple

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from cases import DTYPES, FORMS, make_call, make_upstream

CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
ROWS, D = 2048, 4096
# Pages of the stack, of code touched for the first time, and of counters that are summed over cores late.
NOISE = 2**20


def size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def allocations(function: Callable[[], object], folder: Path) -> Tuple[List[int], List[int]]:
    """The bytes of each tensor's memory that `function` allocates; and of those it frees again. Both sorted."""
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_tensors_allocated(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Forward allocates its outputs and no other tensor, with a graph too; backward the gradients and no other.
    Row strides need no copy."""
    call = make_call(form, (64, 96), dtype, weight=torch.float32)
    call = replace(call, x=torch.cat([call.x, call.x], -1)[:, 96:])
    outputs = [size(t) for t in call.run() if t is not None]
    assert allocations(call.run, tmp_path) == (sorted(outputs), [])

    leaves = call.requiring_grad()
    assert allocations(leaves.run, tmp_path) == (sorted(outputs), [])

    out, upstream = leaves.run(), make_upstream(call)
    used = [(o, g) for o, g in zip(out, upstream) if o is not None]
    inputs = leaves.differentiable()
    gradients = {name: size(t) for name, t in inputs.items() if name != "residual"}  # shares x's
    rows = [o for o, _ in used], list(inputs.values()), [g for _, g in used]
    assert allocations(lambda: torch.autograd.grad(*rows), tmp_path) == (sorted(gradients.values()), [])


@pytest.mark.parametrize("form", FORMS)
def test_only_what_is_wanted(form: str, tmp_path: Path) -> None:
    """A frozen gain and lam, and rows that need no gradient, cost no tensor in the backward."""
    call = make_call(form, (64, 96))
    for names in (["x"], ["weight"], ["lam"]):
        leaves = call.requiring_grad(names)
        y, wanted = leaves.run().y, leaves.differentiable()[names[0]]
        grad_y = torch.ones_like(y)
        taken = allocations(lambda: torch.autograd.grad(y, wanted, grad_y), tmp_path)
        assert taken == ([size(wanted)], []), names


@pytest.mark.parametrize("form", FORMS)
def test_one_copy_of_what_no_kernel_reads(form: str, tmp_path: Path) -> None:
    """A transposed x is copied once, and the copy is gone afterwards."""
    call = make_call(form, (32, 48))  # from 3600 elements on torch transposes through a buffer of its own
    call = replace(call, x=call.x.t().contiguous().t())
    outputs = [size(t) for t in call.run() if t is not None]
    assert allocations(call.run, tmp_path) == (sorted([*outputs, size(call.x)]), [size(call.x)])


def resident(field: str) -> int:
    """VmRSS or VmHWM, its peak since the last reset, in bytes."""
    return next(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if line.startswith(field))


def peak_of(function: Callable[[], object]) -> int:
    """The most memory that `function` held at once beyond what there was before, in bytes."""
    CLEAR_REFS.write_text("5")
    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


def measure() -> Dict[str, List[int]]:
    """Peak and outputs in bytes of every op, forward and backward, on one thread."""
    torch.set_num_threads(1)
    measured = {}
    for form in FORMS:
        for dtype in (torch.float32, torch.bfloat16):
            call = make_call(form, (ROWS, D), dtype, weight=torch.bfloat16)
            upstream = make_upstream(call)
            arguments = [upstream.y]
            variance = call.x.float().square().mean(-1, keepdim=True) if call.exact else call.variance
            arguments += [upstream.variance, call.x, call.x, variance] if call.exact else [call.x, call.x, variance]
            arguments += [*([] if call.exact else [call.offset]), call.weight, call.lam, call.kappa, call.eps]
            backward = torch.ops.bhyt.backward if call.exact else torch.ops.bhyt.backward_approx
            mask = [True] * (3 if call.exact else 4)
            steps = {form: call.run, f"gradients of {form}": lambda: backward(*arguments, mask)}
            for step, function in steps.items():
                outputs = size(*function())
                measured[f"{step} {dtype}"] = [peak_of(function), outputs]
    return measured


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="only Linux resets the peak of the resident set")
def test_peak_of_all_memory() -> None:
    """Beyond its outputs a forward of 2048 x 4096 takes the gain in float32, a backward that and partial sums of at
    most 256 rows: no more than 5 MB where a copy of the rows would be 17 or 34."""
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # freed is given back
    command = [sys.executable, __file__]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **environment})
    assert run.returncode == 0, run.stderr
    gain = 4 * D
    for step, (peak, outputs) in json.loads(run.stdout).items():
        scratch = gain + (256 * (4 * D + 8) if step.startswith("gradients") else 0)
        assert outputs - NOISE < peak < outputs + scratch + NOISE, f"{step}: {peak} for outputs of {outputs}"


if __name__ == "__main__":
    print(json.dumps(measure()))
