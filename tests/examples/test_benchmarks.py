"""The benchmarks run at tiny sizes and write what the README's tables are made of. No figure is judged
here."""

import importlib.util
import json
import subprocess
import sys

import pytest

from support.packages import needs
from support.paths import BENCHMARKS


def load(name):
    """A script of benchmarks/ as a module; none of them needs to be installed."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run(script, *arguments):
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def common():
    return load("common")


@pytest.fixture(scope="module")
def cpu_result(tmp_path_factory):
    """All cases and providers but the compiled ones, at a tiny size; (path of the JSON, printed text)."""
    path = tmp_path_factory.mktemp("cpu") / "cpu.json"
    options = ["--rows", "3", "--dims", "64", "--peers", "copy,layer_norm,rms_norm,eager"]
    printed = run(
        "bench_cpu.py", *options, "--seconds", 0.001, "--threads", 1, "--tier", "default", "--out", path
    )
    return path, printed


def test_cpu_result(cpu_result):
    path, printed = cpu_result
    result = json.loads(path.read_text())
    assert {"cpu", "cores", "threads", "tier", "torch", "python", "commit", "dirty", "date"} <= set(
        result["environment"]
    )
    assert result["environment"]["threads"] == 1 and result["environment"]["tier"] == "DEFAULT"
    assert result["environment"]["fault_free_allocation"]
    problems = result["problems"]
    assert len({(p["case"], p["rows"], p["d"], p["dtype"]) for p in problems}) == len(problems) == 10 * 2
    for problem in problems:
        assert set(problem["providers"]) == {"bhyt", "copy", "layer_norm", "rms_norm", "eager"}
        assert all(timing["us"] > 0 and timing["samples"] >= 3 for timing in problem["providers"].values())
        assert problem["sets"] == 1 and not problem["beyond_cache"] and problem["copy_by"]
    not_measured = [goal for goal in result["goals"] if goal["met"] is None]
    assert {"inductor" in goal["goal"].lower() or "beyond" in goal["goal"] for goal in not_measured} == {True}
    assert "forward_approx+backward" in printed and "exact forward, every size fp32" in printed


def test_cpu_masks(tmp_path):
    """Gradients left out: beside the same call with all of them, and beside peers that have what is wanted."""
    path = tmp_path / "masks.json"
    options = ["--rows", 3, "--dims", 2048, "--dtypes", "fp32", "--peers", "copy,layer_norm,all_gradients"]
    run("bench_cpu.py", "--masks", *options, "--seconds", 0.001, "--threads", 1, "--out", path)
    result = json.loads(path.read_text())
    providers = {p["case"]: set(p["providers"]) for p in result["problems"]}
    assert len(providers) == 13 and all("all_gradients" in found for found in providers.values())
    assert providers["backward[x]"] == {"bhyt", "copy", "layer_norm", "all_gradients"}
    assert providers["backward_approx[lam]"] == {"bhyt", "all_gradients"}
    assert sum("all gradients" in goal["goal"] and goal["measured"] > 0 for goal in result["goals"]) == 2


@pytest.mark.slow
@pytest.mark.release
def test_cpu_compiled_peers(tmp_path):
    path = tmp_path / "cpu.json"
    options = [
        "--rows",
        "2",
        "--dims",
        "64",
        "--dtypes",
        "fp32",
        "--ops",
        "backward,add_forward",
        "--seconds",
        0.001,
    ]
    run("bench_cpu.py", *options, "--threads", 1, "--out", path)
    backward, add = (set(p["providers"]) for p in json.loads(path.read_text())["problems"])
    assert {"inductor", "inductor_rms_norm", "inductor_dyt"} <= backward
    assert {"inductor", "inductor_rms_norm"} <= add and "inductor_dyt" not in add


def test_overhead(tmp_path):
    path = tmp_path / "overhead.json"
    run("bench_overhead.py", "--quick", "--out", path)
    result = json.loads(path.read_text())
    assert [record["mode"] for record in result["modes"]] == ["no_grad", "grad", "forward+backward"]
    assert all(len(record["providers"]) == 11 for record in result["modes"])
    assert len(result["goals"]) == 18 and all(goal["measured"] > 0 for goal in result["goals"])


@pytest.mark.slow
@pytest.mark.release
def test_loading(tmp_path):
    """Both models loaded in every way; every figure there, the shards several files, the goal from the worst ratio."""
    needs("transformers")
    path = tmp_path / "loading.json"
    run("bench_loading.py", "--preset", "smoke", "--repeats", 1, "--out", path)
    result = json.loads(path.read_text())
    problems = result["problems"]
    assert [problem["case"] for problem in problems] == ["plain", "bf16", "sharded"]
    assert [problem["files"] > 1 for problem in problems] == [False, False, True]
    for problem in problems:
        classes = {name: figures["class"] for name, figures in problem["providers"].items()}
        assert classes == {"Llama": "LlamaForCausalLM", "BHyT": "BHyTLlamaForCausalLM"}
        for figures in problem["providers"].values():
            assert figures["peak_mib"] > figures["loaded_mib"] > 0 and figures["seconds"] > 0
    assert result["goals"][0]["measured"] == max(problem["ratios"]["peak"] for problem in problems)


def test_plot(cpu_result, tmp_path):
    needs("matplotlib")
    run("figures.py", cpu_result[0], "--out", tmp_path / "cpu.png")
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")


def test_plot_quantized(tmp_path):
    """Of the result that the page's figure is of, which an sdist has not."""
    needs("matplotlib")
    if not (BENCHMARKS / "results").exists():
        pytest.skip("no benchmarks/results")
    run("figures.py", "quantized-accuracy-24", "--out", tmp_path / "outliers.png")
    assert (tmp_path / "outliers.png").read_bytes().startswith(b"\x89PNG")


def test_minimal_bytes(common):
    rows, d = 3, 5
    gain, statistics = 2 * d, 4 * rows
    assert common.minimal_bytes("forward", rows, d, 2) == 2 * 2 * rows * d + gain + statistics
    assert common.minimal_bytes("add_forward_approx", rows, d, 2) == 4 * 2 * rows * d + gain + statistics
    assert common.minimal_bytes("backward", rows, d, 2) == 3 * 2 * rows * d + 2 * gain + statistics
    assert common.minimal_bytes("backward_approx", rows, d, 2) == 3 * 2 * rows * d + 2 * gain + 2 * statistics
    both = common.minimal_bytes("add_forward", rows, d, 4) + common.minimal_bytes("add_backward", rows, d, 4)
    assert common.minimal_bytes("add_forward+backward", rows, d, 4) == both


def test_rotation_fills_the_cache_twice(common):
    assert common.rotation(50, cache=100) == 1
    assert common.rotation(51, cache=100) == 4
    assert common.rotation(250, cache=100) == 1


def test_interleave_takes_turns_and_walks_the_sets(common):
    seen = []
    calls = {name: lambda i, name=name: seen.append((name, i)) for name in "ab"}
    timings = common.interleave(calls, sets=3, seconds=0.0, sample_seconds=0.0)
    assert {name: timing.samples for name, timing in timings.items()} == {"a": 7, "b": 7}
    assert [name for name, _ in seen[-14:]] == ["a", "b"] * 7
    assert all(after == (before + 1) % 3 for (_, before), (_, after) in zip(seen[-14:], seen[-13:]))


# ---- the README's tables


def sample(date, us):
    """A small result as bench_cpu.py writes it."""
    environment = {
        "cpu": "Some CPU", "threads": 2, "tier": "AVX2", "last_level_cache": 32 << 20, "torch": "2.13.0",
        "python": "3.12.0", "commit": "abc", "dirty": False, "date": date,
    }  # fmt: skip
    providers = {"bhyt": {"us": us}, "copy": {"us": 8.0}, "layer_norm": {"us": 25.0}}
    problem = {
        "case": "forward",
        "rows": 64,
        "d": 2048,
        "dtype": "fp32",
        "bytes": 1_000_000,
        "beyond_cache": False,
    }
    goals = [
        {"goal": "fast", "target": ">= 7", "measured": 6.5, "met": False, "where": "64x2048"},
        {"goal": "small", "target": ">= 1", "measured": None, "met": None, "where": ""},
    ]
    return {
        "benchmark": "cpu", "environment": environment, "goals": goals, "problems": [problem | {"providers":
        providers}]
    }  # fmt: skip


@pytest.fixture
def readme(tmp_path):
    """(module, folder of results with an older and a newer result, a README with two empty tables)."""
    for device, result in (("old", sample("2026-01-01", 20.0)), ("new", sample("2026-02-01", 10.0))):
        (tmp_path / "results" / device).mkdir(parents=True)
        (tmp_path / "results" / device / "cpu.json").write_text(json.dumps(result))
    text = "# Title\n\n<!-- table:cpu -->\n<!-- /table:cpu -->\n\nwords\n\n"
    text += "<!-- table:cpu-goals@old -->\nstale\n<!-- /table:cpu-goals@old -->\n"
    (tmp_path / "README.md").write_text(text)
    return load("readme_table"), tmp_path


def test_readme_tables_check_and_write(readme, capsys):
    module, folder = readme
    where = ["--pages", str(folder / "README.md"), "--results", str(folder / "results")]
    before = (folder / "README.md").read_text()
    assert module.main([*where, "--check"]) == 1
    assert "cpu, cpu-goals@old" in capsys.readouterr().err
    assert (folder / "README.md").read_text() == before
    assert module.main(where) == 0
    after = (folder / "README.md").read_text()
    assert "| exact | fp32 | 10.0 | 100 | 80 % | 2.50x |" in after  # the newer of the two results
    assert "| fast | >= 7 | 6.50 | 64x2048 | **missed** |" in after
    assert "| small | >= 1 | not measured | - | - |" in after
    assert "words" in after and "stale" not in after
    assert module.main([*where, "--check"]) == 0
    (folder / "README.md").write_text(after.replace("2.50x", "3.50x"))  # by hand
    assert module.main([*where, "--check"]) == 1


@pytest.mark.parametrize("text", ["<!-- table:gone -->\n<!-- /table:gone -->\n", "<!-- table:cpu -->\n"])
def test_readme_tables_refuse_unknown_and_unpaired(readme, text):
    module, folder = readme
    (folder / "README.md").write_text(text)
    assert module.main(["--pages", str(folder / "README.md"), "--results", str(folder / "results")]) == 1
    assert (folder / "README.md").read_text() == text
