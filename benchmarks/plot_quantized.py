"""Draws what eight bits add to the held-out loss, from what quantized_accuracy.py measured.

    python benchmarks/plot_quantized.py [results/<device>/quantized-accuracy-24.json] [--out quantization-outliers.png]

Without a file the newest results/*/quantized-accuracy-24.json is drawn, into docs/figures/quantization-outliers.png.
"""

import argparse
import json
from pathlib import Path
from typing import Any, Optional, Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from plot import COLOURS  # noqa: E402
from readme_table import REPOSITORY, newest  # noqa: E402

# (norm, way): title
BARS = {
    ("bhyt", "bound"): "BHyT, 1/127: no calibration",
    ("bhyt", "calibrated"): "BHyT, calibrated",
    ("bhyt", "per token"): "BHyT, scale per token",
    ("rmsnorm", "calibrated"): "RMSNorm, calibrated",
    ("rmsnorm", "per token"): "RMSNorm, scale per token",
}
GOAL = 0.002  # nats that eight bits may add


def draw(result: dict[str, Any]) -> Any:
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
    axes.set_title(f"{shape}, {result['tokens']:,} held-out tokens; bars in thousandths, shaded: within {GOAL}", fontsize=11)
    return figure


def main(arguments: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, nargs="?", help="a quantized_accuracy.py JSON; default: the newest")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "figures" / "quantization-outliers.png")
    args = parser.parse_args(arguments)
    results = REPOSITORY / "benchmarks" / "results"
    result = json.loads(args.result.read_text()) if args.result else newest("quantized-accuracy-24", results)
    if result is None:
        raise SystemExit("plot_quantized: no quantized-accuracy-24.json; run quantized_accuracy.py first")
    draw(result).savefig(args.out, dpi=130)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
