"""The tables of README.md, docs/performance.md and docs/quantization-results.md.

They are made from the JSON in benchmarks/results, never by hand.

    python benchmarks/readme_table.py             rewrites them
    python benchmarks/readme_table.py --check     changes nothing; exit status 1 if one is out of date

A table stands between `<!-- table:NAME -->` and `<!-- /table:NAME -->`. NAME is the stem of a result file,
and the newest one of that name is taken whatever the device; NAME@DEVICE names the folder too. NAME-goals
gives the goals of that result, NAME-digest some lines of it. A file's "benchmark" field says how it is drawn: add a
function to RENDERERS for a new kind. A table whose code has changed since it was measured says so (staleness.py).
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Callable, Optional, Sequence

import staleness
from quantized_tables import quantized, quantized_accuracy, quantized_profile
from table_text import Result, caption, markdown, number

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
PAGES = (
    REPOSITORY / "README.md", REPOSITORY / "docs" / "performance.md",
    REPOSITORY / "docs" / "quantization-results.md",
)  # fmt: skip
MARKED = re.compile(r"(<!-- table:(?P<name>[\w@.-]+) -->\n).*?(<!-- /table:(?P=name) -->)", re.DOTALL)

CPU_SHAPES = ((64, 2048), (4096, 4096))
CPU_CASES = {
    "forward": "exact",
    "forward_approx": "approximate",
    "add_forward": "residual + exact",
    "add_forward_approx": "residual + approximate",
    "forward+backward": "exact, forward + backward",
    "forward_approx+backward": "approximate, forward + backward",
}
CPU_PEERS = {
    "layer_norm": "`F.layer_norm`",
    "rms_norm": "`F.rms_norm`",
    "eager": "the formula, eager",
    "inductor": "the formula, Inductor",
    "inductor_rms_norm": "RMSNorm, Inductor",
}


def cpu(result: Result) -> list[str]:
    """Two shapes, time and bandwidth, share of a copy, times faster than each peer."""
    problems = result["problems"]
    lines = [caption(result)]
    for rows, d in CPU_SHAPES:
        chosen = [p for p in problems if (p["rows"], p["d"]) == (rows, d) and p["case"] in CPU_CASES]
        if not chosen:
            continue
        peers = {
            peer: title for peer, title in CPU_PEERS.items() if any(peer in p["providers"] for p in chosen)
        }
        cells = []
        for p in chosen:
            times = {name: timing["us"] for name, timing in p["providers"].items()}
            us = times["bhyt"]
            of_copy = f"{100 * times['copy'] / us:.0f} %" if "copy" in times else "-"
            ratios = [f"{times[peer] / us:.2f}x" if peer in times else "-" for peer in peers]
            cells.append(
                [
                    CPU_CASES[p["case"]],
                    p["dtype"],
                    number(us),
                    number(p["bytes"] / us / 1e3),
                    of_copy,
                    *ratios,
                ]
            )
        placed = {"beyond the cache" if p["beyond_cache"] else "in cache" for p in chosen}
        place = placed.pop() if len(placed) == 1 else "partly in cache"
        lines += ["", f"**{rows} x {d}**, {place}; times faster than:", ""]
        lines += markdown(["site", "dtype", "us", "GB/s", "of a copy", *peers.values()], cells, left=2)
    return lines


def digest(result: Result) -> list[str]:
    """The lines of a CPU result that say most: times faster than the peers."""
    cases = ("forward", "forward+backward")
    chosen = [p for p in result["problems"] if (p["rows"], p["d"]) in CPU_SHAPES and p["case"] in cases]
    peers = {peer: title for peer, title in CPU_PEERS.items() if any(peer in p["providers"] for p in chosen)}
    cells = []
    for p in chosen:
        times = {name: timing["us"] for name, timing in p["providers"].items()}
        ratios = [f"{times[peer] / times['bhyt']:.2f}x" if peer in times else "-" for peer in peers]
        cells.append([f"{p['rows']} x {p['d']} {p['dtype']}, {CPU_CASES[p['case']]}", *ratios])
    return [caption(result), "", *markdown(["times faster than", *peers.values()], cells)]


def given(result: Result) -> list[str]:
    """The `out` overloads and vLLM's kernels, which allocate nothing: times faster."""
    problems = [p for p in result["problems"] if {"out", "vllm"} <= set(p["providers"])]
    sizes = {f"{p['rows']} x {p['d']} {p['dtype']}": None for p in problems}  # in order, once each
    found = {}
    for p in problems:
        times = {name: timing["us"] for name, timing in p["providers"].items()}
        found[f"{p['rows']} x {p['d']} {p['dtype']}", p["case"]] = f"{times['vllm'] / times['out']:.2f}x"
    cases = [case for case in CPU_CASES if "+" not in case]
    cells = [[size, *(found.get((size, case), "-") for case in cases)] for size in sizes]
    return [caption(result), "", *markdown(["times faster than vLLM's kernel", *(CPU_CASES[c] for c in cases)], cells)]


def serving(result: Result) -> list[str]:
    """Speed of a converted model in vLLM over vLLM's own Llama, with quartiles."""
    cells = []
    for p in result["problems"]:
        low, middle, high = p["speed_wall"]["BHyT"]
        tokens = p["tokens_per_second"]
        row = [p["case"], number(tokens["Llama"]), number(tokens["BHyT"]), f"{middle:.3f}", f"{low:.3f} to {high:.3f}"]
        cells.append([*row, f"{p['speed_cpu']['BHyT'][1]:.3f}"])
    mode = "compiled" if result["compiled"] else "eager"
    header = [f"{result['dtype']}, {mode}", "Llama, tokens/s", "BHyT, tokens/s"]
    header += ["speed over Llama", "quartiles", "by CPU time"]
    return [caption(result), "", *markdown(header, cells)]


def overhead(result: Result) -> list[str]:
    """Microseconds per call, one line per way to call."""
    modes = result["modes"]
    titles = {"no_grad": "no gradient", "grad": "recording", "forward+backward": "forward + backward"}
    header = [f"us per call, {result['rows']} x {result['d']} fp32", *(titles[m["mode"]] for m in modes)]
    names = modes[0]["providers"]
    cells = [[f"`{name}`", *(f"{m['providers'][name]['us']:.2f}" for m in modes)] for name in names]
    return [caption(result), "", *markdown(header, cells)]


def goals(result: Result) -> list[str]:
    """Every goal of a benchmark, met or missed."""
    cells = []
    for item in result["goals"]:
        measured = "not measured" if item["met"] is None else f"{item['measured']:.2f}"
        verdict = {None: "-", True: "met", False: "**missed**"}[item["met"]]
        cells.append([item["goal"], item["target"], measured, item["where"] or "-", verdict])
    return [caption(result), "", *markdown(["goal", "target", "measured (worst)", "at", ""], cells)]


def compiled(result: Result) -> list[str]:
    """Time of a training step of a block, relative to every site being a fused op."""
    problems = result["problems"]
    shape = "{layers} blocks, {batch} x {length} tokens, d = {dim}".format(**problems[0])
    names = {
        "fused ops": "BHyT compiled, sites as fused ops",
        "approximate decomposed": "BHyT compiled, approximate sites as formulas",
        "all decomposed": "BHyT compiled, all sites as formulas",
        "rms_norm": "RMSNorm compiled",
        "eager": "BHyT eager",
        "eager rms_norm": "RMSNorm eager",
    }
    cells = []
    for name, title in names.items():
        ratios = [p["providers"][name]["us"] / p["providers"]["fused ops"]["us"] for p in problems]
        cells.append([title, *(f"{ratio:.3f}" for ratio in ratios)])
    header = [f"step time over the first line's; {shape}", *(p["dtype"] for p in problems)]
    return [caption(result), "", *markdown(header, cells)]


def model(result: Result) -> list[str]:
    """Tokens/s of whole models relative to RMSNorm's, one table per preset, the paper's ratios beside."""
    baseline, paper = result["baseline"], result["paper"]
    lines = [caption(result)]
    for name, preset in result["presets"].items():
        problems = [p for p in result["problems"] if p["preset"] == name]
        present = {provider: None for p in problems for provider in p["providers"]}  # in order, once each
        speeds = [{each: t["tokens_per_s"] for each, t in p["providers"].items()} for p in problems]
        cells = [[f"{baseline}, tokens/s", *(number(own[baseline]) for own in speeds), *["-"] * len(paper)]]
        for provider in present:
            ratios = [f"{own[provider] / own[baseline]:.3f}" if provider in own else "-" for own in speeds]
            theirs = {task: {baseline: 1.0, **ratio} for task, ratio in paper.items()}
            published = [f"{theirs[task][provider]:.3f}" if provider in theirs[task] else "-" for task in paper]
            cells.append([provider, *ratios, *published])
        shape = "{num_hidden_layers} layers, d = {hidden_size}".format(**preset["config"])
        work = f"training on {preset['batch']} x {preset['length']} tokens, decoding {preset['steps']} behind"
        lines += ["", f"**{name}**: {shape}; {work} {preset['prompt']}:", ""]
        titles = [f"{p['task']} {p['mode']} {p['dtype']}" for p in problems]
        lines += markdown([f"over {baseline}", *titles, *(f"paper: {task}" for task in paper)], cells)
    absent = [f"{provider} ({reason})" for provider, reason in result["absent"].items()]
    return [*lines, "", result["paper_note"] + (f" Not measured: {'; '.join(absent)}." if absent else "")]


RENDERERS: dict[str, Callable[[Result], list[str]]] = {
    "cpu": cpu, "overhead": overhead, "compile": compiled, "model": model, "quantized": quantized, "serving": serving,
    "cpu-given": given, "quantized-accuracy": quantized_accuracy, "quantized-profile": quantized_profile,
}  # fmt: skip

PARTS: dict[str, Callable[[Result], list[str]]] = {"goals": goals, "digest": digest}


def newest_file(name: str, results: Path = RESULTS) -> Optional[Path]:
    """The newest result called `name` or `name@device`."""
    stem, _, device = name.partition("@")
    found = {path: json.loads(path.read_text()) for path in sorted(results.glob(f"{device or '*'}/{stem}.json"))}
    return max(found, key=lambda path: found[path]["environment"]["date"], default=None)


def newest(name: str, results: Path) -> Optional[Result]:
    path = newest_file(name, results)
    return json.loads(path.read_text()) if path else None


def render(name: str, results: Path) -> str:
    """The text between the markers of table `name`.

    Raises:
        LookupError: there is no such result, or no renderer for its kind.
    """
    result = newest(name, results)
    if result is not None:
        renderer = RENDERERS.get(result["benchmark"])
        if renderer is None:
            raise LookupError(f"table {name}: no renderer for the benchmark {result['benchmark']!r}")
        return "\n".join(renderer(result)) + "\n"
    stem, at, device = name.partition("@")
    base, _, part = stem.rpartition("-")
    if part in PARTS and (result := newest(base + at + device, results)):
        return "\n".join(PARTS[part](result)) + "\n"
    raise LookupError(f"table {name}: no result of that name under {results}")


def update(text: str, results: Path) -> tuple[str, list[str]]:
    """The text with every table made anew, and the names of those that changed."""
    changed = []

    def fresh(match: re.Match[str]) -> str:
        name = match["name"]
        whole = match[1] + "\n" + render(name, results) + "\n" + match[3]
        before = match[0]
        if not staleness.HISTORY:  # what the page says of its age cannot be judged here
            whole, before = (text.replace(staleness.NOTE, "") for text in (whole, before))
        if whole == before:
            return match[0]
        changed.append(name)
        return whole

    return MARKED.sub(fresh, text), changed


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only say whether the tables are up to date")
    parser.add_argument("--pages", type=Path, nargs="+", default=PAGES)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    return max([write(page, args.results, args.check) for page in args.pages])


def write(page: Path, results: Path, check: bool) -> int:
    """Make the tables of a page anew, or only compare; the exit status."""
    before = page.read_text()
    unpaired = len(re.findall(r"<!-- /?table:", before)) - 2 * len(MARKED.findall(before))
    if unpaired:
        print(f"{page.name}: {unpaired} table markers without their counterpart", file=sys.stderr)
        return 1
    try:
        after, changed = update(before, results)
    except LookupError as error:
        print(error.args[0], file=sys.stderr)
        return 1
    if check and changed:
        print(f"{page.name} is out of date: {', '.join(changed)}; run benchmarks/readme_table.py", file=sys.stderr)
        return 1
    if changed:
        page.write_text(after)
    print(f"{page.name}: {', '.join(changed) or 'nothing'} changed")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
