"""One PNG from the logs of the compared norms: loss over tokens, then magnitude and variance by depth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import EngFormatter, MaxNLocator  # noqa: E402

# One colour and marker per norm, the same in every picture; from the colour-blind-safe palettes of Okabe and Ito, and
# of Tol.
STYLE = {
    "bhyt-unit-gains": ("black", "*", "BHyT, gains from \u03ba/\u03bb"),
    "bhyt": ("#0072B2", "o", "BHyT, the paper's start"),
    "bhyt-exact": ("#56B4E9", "s", "BHyT* (exact)"),
    "rmsnorm": ("#D55E00", "^", "RMSNorm"),
    "layernorm": ("#E69F00", "v", "LayerNorm"),
    "dyt": ("#009E73", "D", "DyT"),
}
SMOOTHING = 0.3  # share of the past in the running mean of the training loss

Log = dict[str, list[dict[str, Any]]]  # the records of one run by event: start, train, valid, depth, steps


def read_log(path: Path) -> Log:
    records: Log = {"start": [], "train": [], "valid": [], "depth": [], "steps": []}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        records[record["event"]].append(record)
    return records


def plot_comparison(logs: dict[str, Log], path: Path) -> None:
    """logs: by norm, in the order of the legend."""
    plt.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False,
                         "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False})
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(17, 5.6), width_ratios=(1.5, 1, 1), layout="constrained"
    )
    _draw_losses(left, logs)
    _draw_depth(middle, logs, "magnitude", "Activation magnitude by depth", "mean |x| of the residual stream")
    _draw_depth(right, logs, "variance", "Activation variance by depth", "variance of the residual stream")
    start = next(iter(logs.values()))["start"][0]
    model, train, text = start["model"], start["train"], start["text"]
    figure.suptitle(
        f"{model['layers']} layers, d = {model['dim']}, {start['parameters'] / 1e6:.2g} M parameters, "
        f"peak learning rate {train['lr']:g}, seed {train['seed']}; text: "
        f"{text if len(text) < 60 else text[:57] + '...'}", fontsize=13
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_losses(axes: Axes, logs: dict[str, Log]) -> None:
    entropy = next(iter(logs.values()))["start"][0]["unigram_entropy"]
    axes.axhline(entropy, color="black", linestyle="--", label=f"unigram entropy, {entropy:.2f}")
    lowest = entropy
    for norm, records in logs.items():
        colour, marker, label = STYLE[norm]
        tokens = [record["tokens"] for record in records["train"]]
        losses = _smooth([record["loss"] for record in records["train"]])
        axes.plot(tokens, losses, color=colour, linewidth=1.6, alpha=0.75)
        tokens = [record["tokens"] for record in records["valid"]]
        losses = [record["loss"] for record in records["valid"]]
        axes.plot(tokens, losses, color=colour, linestyle="none", marker=marker, markersize=7,
                  markeredgecolor="white", label=f"{label}, {losses[-1]:.3f}")
        lowest = min(lowest, *losses)
    axes.set_ylim(lowest - 0.15, entropy + 0.8)  # the first steps, near ln 257, would squeeze the rest
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set(title="Loss: training (line, smoothed), held-out (points)", xlabel="training tokens (bytes)",
             ylabel="cross-entropy, nats per byte")
    axes.legend(title="last held-out loss", loc="upper right")


def _draw_depth(axes: Axes, logs: dict[str, Log], field: str, title: str, ylabel: str) -> None:
    for norm, records in logs.items():
        colour, marker, label = STYLE[norm]
        if records["depth"]:
            values = records["depth"][-1][field]
            axes.plot(range(len(values)), values, color=colour, marker=marker, markersize=7,
                      markeredgecolor="white", linewidth=1.6, label=label)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(title=title, xlabel="after block (0: embeddings)", ylabel=ylabel)
    if axes.lines:  # no run has come to its end otherwise
        axes.legend(loc="best")


def _smooth(values: list[float]) -> list[float]:
    """Running mean whose weights fall geometrically into the past, unbiased at the start."""
    mean, weight, result = 0.0, 0.0, []
    for value in values:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        result.append(mean / weight)
    return result
