"""Draws a result. Speed against a copy and the peers over all sizes, or what eight bits add to the held-out loss.

    python benchmarks/figures.py cpu                      the newest results/*/cpu.json -> docs/figures/speed-avx512.png
    python benchmarks/figures.py cpu-avx2                 the newest of it -> docs/figures/speed-avx2.png
    python benchmarks/figures.py quantized-accuracy-24    the newest of it -> docs/figures/quantization-outliers.png
    python benchmarks/figures.py cpu.json [--out cpu.png]
"""

import argparse
import json
from pathlib import Path
from typing import Any, Optional, Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend comes first: no display is needed)
from readme_table import REPOSITORY, newest_file  # noqa: E402

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")  # told apart by colour-blind readers too
SITES = {
    "forward": "exact",
    "forward_approx": "approximate",
    "add_forward": "residual + exact",
    "add_forward_approx": "residual + approximate",
}
PEERS = {
    "layer_norm": "F.layer_norm",
    "rms_norm": "F.rms_norm",
    "inductor": "the formula, Inductor",
    "inductor_rms_norm": "RMSNorm, Inductor",
    "inductor_dyt": "DyT, Inductor",
}

# (norm, way): title
BARS = {
    ("bhyt", "bound"): "BHyT, 1/127: no calibration",
    ("bhyt", "calibrated"): "BHyT, calibrated",
    ("bhyt", "per token"): "BHyT, scale per token",
    ("rmsnorm", "calibrated"): "RMSNorm, calibrated",
    ("rmsnorm", "per token"): "RMSNorm, scale per token",
}
GOAL = 0.002  # nats that eight bits may add

Problem = dict[str, Any]


def times(
    problems: Sequence[Problem], case: str, provider: str, sizes: Sequence[tuple[int, int]]
) -> list[float]:
    """Microseconds by size; NaN, which leaves a gap, where there is none."""
    found = {(p["rows"], p["d"]): p["providers"][provider]["us"] for p in problems
             if p["case"] == case and provider in p["providers"]}  # fmt: skip
    return [found.get(size, float("nan")) for size in sizes]


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(over, under)]


def draw_against_copy(axes: Any, problems: Sequence[Problem], sizes: Sequence[tuple[int, int]]) -> None:
    """Speed of each site as a share of a copy's of the same mix; two peers of the exact site in grey."""
    places = range(len(sizes))
    for colour, (case, title) in zip(COLOURS, SITES.items()):
        share = ratios(times(problems, case, "copy", sizes), times(problems, case, "bhyt", sizes))
        axes.plot(places, share, "o-", color=colour, label=title, linewidth=2)
    present = {name for p in problems for name in p["providers"]}
    for style, peer in ((":", "layer_norm"), ("--", "inductor")):
        if peer not in present:
            continue
        share = ratios(times(problems, "forward", "copy", sizes), times(problems, "forward", peer, sizes))
        axes.plot(places, share, style, color="0.45", label=PEERS[peer])
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_ylabel("speed, copy of the same mix = 1")


def draw_against_peers(axes: Any, problems: Sequence[Problem], sizes: Sequence[tuple[int, int]]) -> None:
    """Times faster than each peer, exact site: forward solid, forward + backward dashed."""
    places = range(len(sizes))
    present = {name for p in problems for name in p["providers"]}
    for colour, (peer, title) in zip(COLOURS, PEERS.items()):
        if peer not in present:
            continue
        for case, style, label in (("forward", "o-", title), ("forward+backward", "s--", None)):
            faster = ratios(times(problems, case, peer, sizes), times(problems, case, "bhyt", sizes))
            axes.plot(places, faster, style, color=colour, label=label, markersize=4)
    axes.plot([], [], "--", color="0.3", label="forward + backward")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_yscale("log")
    ticks = (0.5, 1, 2, 3, 5, 10, 20, 50)
    axes.set_yticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.set_ylabel("exact site, times faster than")


def draw_cpu(result: dict[str, Any]) -> Any:
    """One column of panels per dtype; sizes by elements, beyond the cache shaded."""
    problems, env = result["problems"], result["environment"]
    dtypes = list(dict.fromkeys(p["dtype"] for p in problems))
    figure, grid = plt.subplots(
        2, len(dtypes), figsize=(1.5 + 6 * len(dtypes), 9), sharey="row", squeeze=False, layout="constrained"
    )
    for column, dtype in enumerate(dtypes):
        own = [p for p in problems if p["dtype"] == dtype]
        sizes = sorted({(p["rows"], p["d"]) for p in own}, key=lambda size: (size[0] * size[1], size[0]))
        far = {(p["rows"], p["d"]) for p in own if p["case"] == "forward" and p["beyond_cache"]}
        for axes, draw_panel in zip(grid[:, column], (draw_against_copy, draw_against_peers)):
            draw_panel(axes, own, sizes)
            axes.set_xticks(
                range(len(sizes)), [f"{rows} x {d}" for rows, d in sizes], rotation=45, ha="right"
            )
            for place, size in enumerate(sizes):
                if size in far:
                    axes.axvspan(place - 0.5, place + 0.5, color="0.92", zorder=0)
            axes.grid(axis="y", color="0.85")
        grid[0, column].set_title(f"{dtype} (shaded: beyond the cache)")
    grid[0, 0].set_ylim(bottom=0)
    for axes in grid[:, 0]:
        axes.legend(fontsize=8)
    commit = f", commit {env['commit']}" if env["commit"] else ""
    figure.suptitle(
        f"{env['cpu']}, {env['threads']} threads, {env['tier']}, torch {env['torch']}{commit}", fontsize=11
    )
    return figure


def draw_quantized_accuracy(result: dict[str, Any]) -> Any:
    """A group of bars per case; linear up to the goal, logarithmic beyond it."""
    losses = {(r["where"], r["times"], r["norm"]): r["losses"] for r in result["records"]}
    cases = list(dict.fromkeys((r["where"], r["times"]) for r in result["records"]))
    figure, axes = plt.subplots(figsize=(11, 4.8), layout="constrained")
    width = 0.8 / len(BARS)
    for k, ((norm, way), title) in enumerate(BARS.items()):
        found = [losses.get((*case, norm), {}) for case in cases]
        added = [own[way] - own["float"] if way in own else float("nan") for own in found]
        places = [i + (k - len(BARS) / 2 + 0.5) * width for i in range(len(cases))]
        bars = axes.bar(places, added, width, color=COLOURS[k], label=title)
        labels = [f"{value * 1e3:+.1f}" for value in added]
        axes.bar_label(bars, labels, fontsize=7, padding=2)
    axes.axhspan(-GOAL, GOAL, color="0.92", zorder=0)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_yscale("symlog", linthresh=GOAL)
    names = ["no outlier" if where == "none" else f"{times:g}x,\n{where}" for where, times in cases]
    axes.set_xticks(range(len(cases)), names)
    axes.set_ylabel("nats per token above the float model")
    axes.set_xlabel("one channel of the residual stream, scaled")
    axes.grid(axis="y", color="0.85")
    axes.set_axisbelow(True)
    axes.margins(y=0.12)
    axes.legend(fontsize=8, loc="best")
    shape = "{layers} layers, d = {dim}".format(**result["model"])
    shaded = f"bars in thousandths, shaded: within {GOAL}"
    axes.set_title(f"{shape}, {result['tokens']:,} held-out tokens; {shaded}", fontsize=11)
    return figure


DRAW = {"cpu": draw_cpu, "quantized-accuracy": draw_quantized_accuracy}  # by the "benchmark" field
FIGURES = REPOSITORY / "docs" / "figures"
PAGES = {
    "cpu": FIGURES / "speed-avx512.png", "cpu-avx2": FIGURES / "speed-avx2.png",
    "quantized-accuracy-24": FIGURES / "quantization-outliers.png",
}  # fmt: skip


def main(arguments: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", help="a JSON of bench_cpu.py or quantized_accuracy.py, or the name of the newest")
    parser.add_argument("--out", type=Path, help="the PNG to write")
    args = parser.parse_args(arguments)
    path = Path(args.result) if args.result.endswith(".json") else newest_file(args.result)
    if path is None:
        raise SystemExit(f"figures: no {args.result}.json under benchmarks/results")
    result = json.loads(path.read_text())
    if result["benchmark"] not in DRAW:
        raise SystemExit(f"figures: {path} is of {result['benchmark']}; there are {', '.join(DRAW)}")
    out = args.out or PAGES.get(args.result, path.with_suffix(".png"))
    DRAW[result["benchmark"]](result).savefig(out, dpi=100)
    print(f"written to {out}")


if __name__ == "__main__":
    main()
