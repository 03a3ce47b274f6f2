"""The GPU's benchmarks without one. bench_cuda.py: who is timed, in which order and for how long, its calls on the CPU
and without its timer."""

import json
import math
from pathlib import Path
from typing import Any, Callable, Mapping

import pytest
import torch
from support.paths import BENCHMARKS
from test_benchmarks import load


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest) -> Any:
    """The script, on the CPU; what it times takes as many microseconds as its name has letters."""
    patch = pytest.MonkeyPatch()
    request.addfinalizer(patch.undo)
    patch.syspath_prepend(str(BENCHMARKS))
    module = load("bench_cuda")
    timing = module.common_cuda.Timing

    def interleave(
        calls: Mapping[str, Callable[[int], object]], *, sets: int, rounds: int, failures: dict[str, str]
    ) -> dict[str, Any]:
        for name, call in calls.items():
            if name != "empty":
                call(sets - 1)
        return {name: timing(float(len(name)), 0.0, rounds, 1, "graph") for name in calls}

    patch.setattr(module.common_cuda, "DEVICE", "cpu")
    patch.setattr(module.cuda_providers, "CHUNK", 60 * 64)  # 200 rows in four chunks
    patch.setattr(module.common_cuda, "sets_beyond_l2", lambda moved: 2)
    patch.setattr(module.common_cuda, "interleave", interleave)
    patch.setattr(torch.cuda, "empty_cache", lambda: None)
    return module


@pytest.fixture
def clock() -> list[float]:
    return [0.0]


def test_problems_are_in_order_of_worth(bench: Any) -> None:
    """Each once; the goals first, at 2^25 elements, decoding, then 2^28; integers only where there are kernels."""
    plain = list(bench.problems(lambda op: False))
    assert len(set(plain)) == len(plain)
    assert [part for i, part in enumerate(p.part for p in plain) if i == 0 or plain[i - 1].part != part] == [
        "goals", "decode", "large", "peers", "compiled", "more"
    ]  # fmt: skip
    goals = [p for p in plain if p.part in ("goals", "large")]
    assert {p.op for p in goals[:8]} == set(bench.OPS) and {p.d for p in goals[:8]} == {4096}
    sizes = [p.rows * p.d for p in goals]
    assert set(sizes) == {2**25, 2**28} and sizes == sorted(sizes)
    judged = {(p.op, p.d) for p in plain if p.part in ("goals", "more") and p.dtype == "bf16"}
    assert judged == {(op, 2**k) for op in bench.OPS for k in range(6, 18)}
    assert {p.op for p in plain} == set(bench.OPS)
    quantized = set(bench.problems(lambda op: True)) - set(plain)
    assert {p.op for p in quantized} == set(bench.QUANTIZED) and {p.part for p in quantized} == {"quantized"}
    assert all(hasattr(torch.ops.bhyt, op) for op in bench.QUANTIZED)


def small(bench: Any, part: str, op: str) -> Any:
    return bench.Problem(part, op, 200, 64, "fp32")


def test_every_op_is_checked_and_timed(bench: Any) -> None:
    """Own ops, ATen's norms and copies agree with float64, in every op; every problem has what its goals need."""
    for op in bench.OPS:
        result = bench.measure(small(bench, "peers", op), rounds=3)
        assert result["wrong"] == {} and set(result["missing"]) <= {"liger", "quack", "flashinfer"}
        assert {"bhyt", "copy", "rms_norm", "layer_norm"} <= set(result["providers"]), op
    for op in bench.QUANTIZED:
        result = bench.measure(small(bench, "quantized", op), rounds=3)
        assert result["wrong"] == {} and {"bhyt", "unquantized"} <= set(result["providers"]), op
        assert result["bytes"] == bench.minimal_bytes(small(bench, "", op.removesuffix("_quantized"))) - 3 * 200 * 64
    decode = bench.measure(bench.Problem("decode", "add_forward", 16, 64), rounds=3)
    assert decode["decode"] and set(decode["providers"]) == {"bhyt", "copy", "empty"}


@pytest.mark.parametrize("op", ["forward", "add_backward_approx"])
def test_who_computes_something_else_is_not_timed(
    bench: Any, monkeypatch: pytest.MonkeyPatch, op: str
) -> None:
    """Wrong in one of 200 rows, NaN, or an exception: named, and the others are timed."""
    providers = bench.cuda_providers
    right = providers.add_rms if op.startswith("add") else providers.rms

    def changed(change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        def function(*tensors: torch.Tensor) -> Any:
            result = right(*tensors)
            y, *rest = result if isinstance(result, tuple) else (result,)
            return (change(y), *rest) if rest else change(y)

        names = providers.ADDED if op.startswith("add") else providers.ROWS
        return providers.Peer(function, names, right)

    def one_row(y: torch.Tensor) -> torch.Tensor:
        return y * torch.where(torch.arange(200) == 199, 2.0, 1.0)[:, None]

    def fails(y: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel\nfor this")

    table = {
        "good": changed(lambda y: y * 1), "one_row": changed(one_row), "nan": changed(lambda y: y * math.nan),
        "fails": changed(fails),
    }  # fmt: skip

    def missing(adds: bool) -> dict[str, Any]:
        raise ImportError("No module named 'quack'")

    monkeypatch.setattr(providers, "PEERS", {"fake": lambda adds: table, "quack": missing})
    result = bench.measure(small(bench, "peers", op), rounds=3)
    assert set(result["providers"]) == {"bhyt", "copy", "good"}
    assert set(result["wrong"]) == {"one_row", "nan", "fails"}
    assert result["wrong"]["fails"] == "RuntimeError: no kernel" and "nan" in result["wrong"]["nan"]
    assert result["missing"] == {"quack": "ImportError: No module named 'quack'"}


def test_a_wrong_op_of_this_package_fails_its_problem(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not timed, and the run ends with a failure."""
    right = bench.cuda_providers.own
    monkeypatch.setattr(bench.cuda_providers, "own", lambda op, b: lambda i: (right(op, b)(i)[0] * 1.01, b.variance[i]))
    payload = bench.run([small(bench, "goals", "forward")], bench.Budget(100), 3, lambda payload: None)
    assert payload["results"] == [] and "relative error 0.01" in payload["failed"][0]["error"]


def test_budget(bench: Any, monkeypatch: pytest.MonkeyPatch, clock: list[float], tmp_path: Any) -> None:
    """What would take longer than is left is not begun, and is named; smaller ones behind it are. Results are on
    disk after each problem."""
    written: list[int] = []

    def measure(problem: Any, rounds: int) -> dict[str, Any]:
        clock[0] += {"goals": 3.0, "peers": 12.0}[problem.part]
        return {
            "op": problem.op, "rows": problem.rows, "d": problem.d, "dtype": "bf16", "decode": False,
            "providers": {"bhyt": {"us": 2.0}, "copy": {"us": 1.0}},
        }  # fmt: skip

    def write(payload: dict[str, Any]) -> None:
        written.append(len(json.loads(json.dumps(payload))["results"]))

    monkeypatch.setattr(bench, "measure", measure)
    goals = [bench.Problem("goals", "forward", 8192 * 4096 // d, d) for d in (4096, 2048, 1024)]
    peers = [bench.Problem("peers", "forward", 8192, 4096)] * 2
    budget = bench.Budget(20.0, lambda: clock[0])
    payload = bench.run([goals[0], peers[0], *goals[1:], peers[1]], budget, 3, write)
    # 3 + 12 s, then 3: 18 of 20 are gone, and neither a third of 3 s nor a peer of 12 s fits.
    assert written == [1, 2, 3, 3] and clock[0] == 18.0
    assert payload["left_out"] == ["goals forward 32768x1024 bf16", "peers forward 8192x4096 bf16"]


def test_a_run_goes_on_where_another_ended(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What was measured, or failed, is not measured again; goals are judged over all; never two commits in a file."""
    one, two, three = (bench.Problem("goals", "forward", 8192, d) for d in (4096, 2048, 1024))
    result = {**one._asdict(), "decode": False, "providers": {"bhyt": {"us": 2.0}, "copy": {"us": 1.0}}}
    before = {"results": [result], "failed": [{**two._asdict(), "error": "no"}], "left_out": [str(three), "another"]}
    seen: list[Any] = []
    monkeypatch.setattr(bench, "measure", lambda p, rounds: seen.append(p) or {**result, **p._asdict()})
    payload = bench.run([one, two, three], bench.Budget(100), 3, lambda payload: None, before)
    assert seen == [three] and [r["d"] for r in payload["results"]] == [4096, 1024]
    assert payload["left_out"] == ["another"] and len(payload["failed"]) == 1
    judged = {item["goal"]: item["measured"] for item in payload["goals"]}
    assert judged["exact forward, 2k-64k, 2^25, against copy"] == 0.5

    path = tmp_path / "cuda.json"
    here = {"device": "H100", "torch": "2.13.0", "commit": "a1"}
    assert bench.common_cuda.earlier(str(path), here) is None
    path.write_text(json.dumps({"environment": here, **payload}))
    assert bench.common_cuda.earlier(str(path), here)["results"] == payload["results"]
    with pytest.raises(SystemExit, match="is of commit a1, this is b2"):
        bench.common_cuda.earlier(str(path), {**here, "commit": "b2"})


def test_goals_are_judged_by_size(bench: Any) -> None:
    """2^25 and 2^28 elements apart, the worst of each; against the best RMSNorm; decoding against an empty kernel."""

    def result(rows: int, d: int, decode: bool = False, **us: float) -> dict[str, Any]:
        providers = {name: {"us": value} for name, value in us.items()}
        return {"op": "forward", "rows": rows, "d": d, "dtype": "bf16", "decode": decode, "providers": providers}

    items = {
        item["goal"]: item
        for item in bench.goals([
            result(8192, 4096, bhyt=10.0, copy=9.9, rms_norm=20.0, quack_rms_norm=9.0),
            result(4096, 8192, bhyt=10.0, copy=9.0),
            result(65536, 4096, bhyt=80.0, copy=80.0),
            result(16, 4096, True, bhyt=2.0, empty=1.0, copy=3.0),
            {**result(16, 4096, True, bhyt=2.0, unquantized=3.0), "op": "forward_quantized"},
        ])
    }  # fmt: skip
    at_25, at_28 = (items[f"exact forward, 2k-64k, {size}, against copy"] for size in ("2^25", "2^28"))
    assert at_25["measured"] == 0.9 and at_25["where"] == "4096x8192" and at_25["met"] is False
    assert at_28["measured"] == 1.0 and at_28["met"] is True
    assert items["exact forward, 2k-64k, 2^25, against rms"]["measured"] == 0.9
    assert items["decode, at most 1.5x an empty kernel, decode, against empty"]["measured"] == 0.5
    assert items["quantised, decode, against unquantized"]["measured"] == 1.5
    assert items["quantised, 2^25, against unquantized"]["measured"] is None
    assert items["exact backward, 1k-8k, 2^25, against copy"]["met"] is None


def test_formula_is_the_ops(bench: Any) -> None:
    """What outputs are compared with names its inputs as the op's schema does."""
    for op in bench.OPS + bench.QUANTIZED:
        names = bench.cuda_providers.formula(op)[1]
        base = op.replace("add_backward", "backward") if "backward" in op else op
        schema = [a.name for a in getattr(torch.ops.bhyt, base).default._schema.arguments]
        assert [name for name in schema if name in names] == list(names), op
