"""Draws the figures of research/study.md and writes its tables, from the results of run.py.

    python research/study/page.py --preset cpu

A table or figure stands between `<!-- study:NAME -->` and `<!-- /study:NAME -->`; what is between them is replaced.
Where the runs of one are missing, nothing stands there.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from pathlib import Path
from typing import Any, Callable

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[1:1] = [str(ROOT / "examples")]

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from jobs import NORMS, PRESETS, SAME_RATE, UNIT, final_loss, search  # noqa: E402
from results import SUFFIX, read_results  # noqa: E402
from tables import ESTIMATES, LABELS, STYLE, TABLES, Study, average, finished  # noqa: E402

STYLES = STYLE | {UNIT: ("black", "*", LABELS[UNIT])}
PAGE = ROOT / "research" / "study.md"
MARKED = re.compile(r"(<!-- study:(?P<name>[\w-]+) -->\n).*?(<!-- /study:(?P=name) -->)", re.DOTALL)


def panels(rows: int, columns: int, width: float = 5.0, height: float = 4.0, **shared: Any) -> tuple[Figure, Any]:
    return plt.subplots(rows, columns, figsize=(width * columns, height * rows), layout="constrained", squeeze=False,
                        **shared)


def draw(axes: Axes, norm: str, x: Any, y: Any) -> None:
    colour, marker, label = STYLES[norm]
    axes.plot(x, y, color=colour, marker=marker, markersize=5, markeredgecolor="white", linewidth=1.5, label=label)


# ---- the figures: each gives None when its runs are missing


def lrs(study: Study) -> Figure | None:
    """Held-out loss over the learning rate; a diverged run is a gap."""
    searches = {norm: [job for job in search(study.preset, norm, study.results) if job in study.results]
                for norm in NORMS if norm not in SAME_RATE}
    if not any(searches.values()):
        return None
    figure, ((axes,),) = panels(1, 1, 9, 5)
    for norm, jobs in searches.items():
        if jobs:
            draw(axes, norm, [job.lr for job in jobs], [final_loss(study.results[job]) for job in jobs])
    entropy = next(iter(study.results.values()))["unigram_entropy"]
    axes.axhline(entropy, color="black", linestyle="--", label="unigram entropy")
    axes.set(xscale="log", xlabel="peak learning rate", ylabel="held-out loss, nats per byte",
             title="The search: one seed each; a gap is a divergence")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def losses(study: Study) -> Figure | None:
    """Held-out loss over tokens and over seconds of training: mean of the seeds, and their range."""
    runs = {norm: good for norm in STYLES if (good := finished(study.compared(norm)))}
    if not runs:
        return None
    figure, ((left, right),) = panels(1, 2, 6.5)
    for norm, results in runs.items():
        curves = [[m["loss"] for m in result["measurements"]][1:] for result in results]
        low, high = [min(column) for column in zip(*curves)], [max(column) for column in zip(*curves)]
        for axes, key in ((left, "tokens"), (right, "seconds"))[: 1 + study.timed(results)]:
            x = [average(results, lambda m: m[key], i) for i in range(1, len(curves[0]) + 1)]
            draw(axes, norm, x, [sum(column) / len(column) for column in zip(*curves)])
            axes.fill_between(x, low, high, color=STYLES[norm][0], alpha=0.15, linewidth=0)
    left.set(xlabel="training tokens (bytes)", ylabel="held-out loss, nats per byte")
    right.set(xlabel="seconds of training")
    left.legend(fontsize=7, ncols=2)
    return figure


def activations(study: Study) -> Figure | None:
    """Magnitude and variance of the residual stream by depth; one line per measurement, later ones darker."""
    runs = {norm: good for norm in NORMS if (good := finished(study.compared(norm)))}
    if not runs:
        return None
    bands = math.ceil(len(runs) / 7)
    across = math.ceil(len(runs) / bands)
    figure, grid = panels(2 * bands, across, 2.6, 2.8, sharex=True)
    columns = [pair for band in range(0, len(grid), 2) for pair in zip(grid[band], grid[band + 1])]
    for column, (norm, results) in zip(columns, runs.items()):
        count = len(results[0]["measurements"])
        for axes, field, like in zip(column, ("magnitude", "variance"), columns[0]):
            for i in range(count):
                values = average(results, lambda m: m[field], i)
                step = results[0]["measurements"][i]["step"]
                axes.plot(values, color=plt.cm.viridis_r(0.1 + 0.9 * i / (count - 1)), label=f"step {step}")
            if axes is not like:
                axes.sharey(like)
            axes.set_yscale("log")
        column[0].set_title(STYLE[norm][2])
        column[1].set_xlabel("after block")
    for above, below in columns[::across]:
        above.set_ylabel("mean |x| of the stream")
        below.set_ylabel("variance of the stream")
    for axes in sum(columns[len(runs):], ()):
        axes.remove()
    columns[across - 1][0].legend(fontsize=7)
    return figure


def gradients(study: Study) -> Figure | None:
    """Gradient norms by depth at the first and the last measurement, and the saturated share at the last."""
    runs = {norm: good for norm in NORMS if (good := finished(study.compared(norm)))}
    if not runs:
        return None
    figure, ((first, last, saturated),) = panels(1, 3)
    blocks = range(1, study.preset.layers + 1)
    for norm, results in runs.items():
        for axes, index in ((first, 0), (last, -1)):
            draw(axes, norm, blocks, average(results, lambda m: m["gradient"], index))
        if "saturated" in results[0]["measurements"][-1]["sites"][0][0]:
            draw(saturated, norm, blocks, average(
                results, lambda m: [max(site["saturated"] for site in pair) for pair in m["sites"]]))
    for axes, title in ((first, "Gradient norm, start"), (last, "Gradient norm, end")):
        axes.set(title=title, xlabel="block", yscale="log", ylabel="of the block's parameters")
    saturated.set(title="Saturated, end", xlabel="block", ylabel="share of |tanh| > 0.9, worse site")
    last.legend(fontsize=7, ncols=2)
    return figure


def approximation(study: Study) -> Figure | None:
    """How true the estimates are by block and position, and two things that they do not know."""
    results = finished(study.compared("bhyt"))
    if not results:
        return None
    figure, ((layers, bias), (terms, sink)) = panels(2, 2, 6, 3.6)
    blocks, count = range(1, study.preset.layers + 1), len(results[0]["measurements"])
    positions = results[0]["measurements"][0]["approximation"]["positions"]
    for i in range(count):
        colour, step = plt.cm.viridis_r(0.1 + 0.9 * i / (count - 1)), results[0]["measurements"][i]["step"]
        for name, style in (("T", "-"), ("t", ":")):
            r = average(results, lambda m: [layer["estimates"][name]["pearson"] for layer in _layers(m)], i)
            layers.plot(blocks, r, style, color=colour)
        sinks = average(results, lambda m: [layer["sink"] for layer in _layers(m)], i)
        sink.plot(blocks, sinks, color=colour, label=f"step {step}")
    for name, label in ESTIMATES.items():
        bias.plot(positions, average(results, lambda m: m["approximation"]["pooled"][name]["bias_by_position"]),
                  marker="o", label=label)
    for number in range(study.preset.layers):
        ratios = average(results, lambda m: [branch / _layers(m)[number]["terms"]["offset"]
                                             for branch in _layers(m)[number]["terms"]["branch"]])
        terms.plot(positions, ratios, color=plt.cm.plasma(number / study.preset.layers), linewidth=1)
    terms.plot(positions, [study.preset.seq_len / t for t in positions], "k--", label="T / t")
    terms.axhline(1, color="black", linewidth=0.8)
    layers.set(title="Pearson r by block (dotted: 1 / t)", xlabel="block", ylabel="of estimate and true variance")
    bias.set(title="Error by position, end", xlabel="position t", xscale="log", ylabel="mean log(estimate / true)")
    terms.set(title="Attention's variance / offset, end", xlabel="position t", xscale="log", yscale="log",
              ylabel="one line per block, later ones lighter")
    sink.set(title="Attention to the first token", xlabel="block", ylabel="mean weight")
    for axes in (bias, terms, sink):
        axes.legend(fontsize=8)
    return figure


def _layers(measurement: dict[str, Any]) -> list[dict[str, Any]]:
    return measurement["approximation"]["layers"]


def bound(study: Study) -> Figure | None:
    """Site outputs and stream by depth for frozen lam / kappa, beside LNS; at the start and the end."""
    runs = {value: good for value in study.preset.bounds if (good := finished(study.bounded(value)))}
    if not runs or not (scaled := finished(study.unbounded())):
        return None
    figure, grid = panels(2, 2, 6, 3.6, sharex=True)
    blocks = range(1, study.preset.layers + 1)
    for column, index, title in ((grid[:, 0], 0, "start"), (grid[:, 1], -1, "end")):
        for i, (value, results) in enumerate([*runs.items(), ("LNS", scaled)]):
            style = {"color": "black", "linestyle": "--", "label": "LNS"} if value == "LNS" else {
                "color": plt.cm.viridis(i / len(runs)), "label": f"sqrt(L) lam / kappa = {value:g}"}
            sites = average(
                results, lambda m: [max(site["mean_square"] for site in pair) for pair in m["sites"]], index
            )
            column[0].plot(blocks, sites, **style)
            column[1].plot(blocks, average(results, lambda m: m["variance"][1:], index), **style)
        column[0].set(title=title, yscale="log", ylabel="mean square of a site's output")
        column[1].set(yscale="log", xlabel="block", ylabel="variance of the stream")
    grid[0, 0].legend(fontsize=8)
    return figure


FIGURES: dict[str, tuple[Callable[[Study], Figure | None], str]] = {
    "search-figure": (lrs, "Held-out loss over the learning rate"),
    "loss-figure": (losses, "Held-out loss over tokens and over seconds"),
    "activations-figure": (activations, "Magnitude and variance of the residual stream by depth, over training"),
    "gradients-figure": (gradients, "Gradient norms and saturation by depth"),
    "approximation-figure": (approximation, "True and approximate variance by block, position and training step"),
    "bound-figure": (bound, "Site outputs and stream by depth, for lam / kappa below, at and above 1 / sqrt(L)"),
}


# ---- the page


def fill(page: str, study: Study, folder: Path) -> str:
    """The page with every marked place anew; figures go to `folder`, beside the page."""

    def fresh(match: re.Match[str]) -> str:
        name = match["name"]
        if name in TABLES:
            lines = TABLES[name](study)
        elif name in FIGURES:
            draw_figure, alternative = FIGURES[name]
            path = folder / f"study-{name.removesuffix('-figure')}.png"
            lines = [f"![{alternative}]({folder.name}/{path.name})"] if save(draw_figure(study), path) else []
        else:
            raise SystemExit(f"study:{name} is unknown; there are {', '.join((*TABLES, *FIGURES))}")
        return match[1] + "".join(f"{line}\n" for line in ["", *lines, ""] if lines) + match[3]

    return MARKED.sub(fresh, page)


def save(figure: Figure | None, path: Path) -> bool:
    if figure is None:
        return False
    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return True


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="of the runs (default: %(default)s)")
    parser.add_argument("--results", type=Path, metavar="FILE",
                        help=f"default: results/PRESET{SUFFIX} beside this script")
    parser.add_argument("--page", type=Path, default=PAGE, help="default: research/study.md; figures/ is beside it")
    arguments = parser.parse_args(argv)
    file = arguments.results or HERE / "results" / f"{arguments.preset}{SUFFIX}"
    study = Study(PRESETS[arguments.preset], read_results(file))
    if not study.results:
        raise SystemExit(f"{file}: no results; run.py makes them")
    before = arguments.page.read_text(encoding="utf-8")
    if len(re.findall(r"<!-- /?study:", before)) != 2 * len(MARKED.findall(before)):
        raise SystemExit(f"{arguments.page}: a study: marker without its partner")
    arguments.page.write_text(fill(before, study, arguments.page.parent / "figures"), encoding="utf-8")
    print(f"{len(study.results)} results in {arguments.page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
