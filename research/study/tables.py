"""The study's tables in Markdown. Each takes what `Study` holds and gives lines; none when its runs are missing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from statistics import mean, median, stdev
from typing import Any, Callable, Sequence

from jobs import (
    ALPHAS, BY_DEPTH, FIRST_EXACT, GAP, NEVER, NORMS, ONE_VALUE, POINTWISE, POSITION, REFRESH, SAME_RATE, UNIT,
    Job, Preset, Result, Results, alphas, best_lrs, bounded, changed, comparison, final_loss, unbounded,
)
from pretraining import plot
from pretraining.norms import KAPPA

# Colour, marker and name of each norm.
STYLE = plot.STYLE | {
    "bhyt": (*plot.STYLE["bhyt"][:2], "BHyT"),
    "peri-ln": ("#CC79A7", "P", "Peri-LN"),
    "lns": ("#555555", "X", "LNS"),
    "derf": ("#117733", "d", "Derf"),
    "mix-ln": ("#882255", "<", "Mix-LN"),
    "seednorm": ("#332288", ">", "SeeDNorm"),
    "ssnorm": ("#999933", "p", "Single-Scale RMSNorm"),
    "pre-crmsnorm": ("#661100", "h", "Pre-CRMSNorm"),
}
LABELS = {norm: label for norm, (_, _, label) in STYLE.items()} | {
    "rmsnorm-small": "RMSNorm, gains from lam / kappa",
    "rmsnorm-embedding": "RMSNorm, embeddings of variance 1",
    FIRST_EXACT: "BHyT, first block exact",
    UNIT: "BHyT, gains from kappa / lam",
    BY_DEPTH: "BHyT, gains from kappa / (lam sqrt(l))",
    "bhyt-small": "BHyT, gains from lam / kappa",
    "bhyt-fast": "BHyT, gains learn ten times as fast",
    "bhyt-embedding": "BHyT, embeddings of variance 1",
    "bhyt-unit-fast": "BHyT, gains from kappa / lam, learning ten times as fast",
    "bhyt-unit-embedding": "BHyT, gains from kappa / lam, embeddings of variance 1",
    "bhyt-unit-first": "BHyT, gains from kappa / lam, first block exact",
    "bhyt-by-depth-first": "BHyT, gains from kappa / (lam sqrt(l)), first block exact",
    "bhyt-unit-exact": "BHyT* (exact), gains from kappa / lam",
}
ESTIMATES = {"none": "v", "T": "v + offset (BHyT)", "t": "v + offset T / t", "one": "v + offset T",
             "weights": "v + offset T Σp²"}


@dataclass(frozen=True)
class Study:
    preset: Preset
    results: Results

    @cached_property
    def lrs(self) -> dict[str, float]:
        """The best learning rate of each norm whose search is complete."""
        return best_lrs(self.preset, self.results)

    def of(self, jobs: Sequence[Job]) -> list[Result]:
        """Those of the jobs' results that are there."""
        return [self.results[job] for job in jobs if job in self.results]

    def compared(self, norm: str, refresh: int = REFRESH) -> list[Result]:
        lr = self.lrs.get(norm)
        return self.of(comparison(self.preset, norm, lr, refresh)) if lr else []

    def bounded(self, bound: float) -> list[Result]:
        return self.of(bounded(self.preset, self.lrs["bhyt"], bound)) if "bhyt" in self.lrs else []

    def unbounded(self) -> list[Result]:
        return self.of(unbounded(self.preset, self.lrs["bhyt"])) if "bhyt" in self.lrs else []

    def timed(self, results: Sequence[Result]) -> bool:
        """Whether seconds mean something: of the machine of most runs, and where not more than two processes a core
        wanted it, on the median."""
        cpus = [result["environment"]["cpu"] for result in self.results.values()]
        load = median(r["environment"]["load_before"] / r["environment"]["cores"] for r in results)
        return load <= 2 and {r["environment"]["cpu"] for r in results} == {max(cpus, key=cpus.count)}

    def speed(self, results: Sequence[Result]) -> str:
        """Median training tokens per second of the runs."""
        if not self.timed(results):
            return ""
        lasts = [result["train"][-1] for result in results]
        return f"{median(last['tokens'] / last['seconds'] for last in lasts):,.0f}"


def finished(results: Sequence[Result]) -> list[Result]:
    return [result for result in results if not result["diverged"]]


def average(results: Sequence[Result], get: Callable[[dict[str, Any]], Any], index: int = -1) -> Any:
    """The mean over runs of what `get` finds in one of their measurements: a number, or a list of them."""
    values = [get(result["measurements"][index]) for result in results]
    return [mean(column) for column in zip(*values)] if isinstance(values[0], list) else mean(values)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column is aligned left, the others right; nothing for no rows."""
    assert all(len(row) == len(header) for row in rows), f"rows that do not fit the header {header}"
    rules = ["---", *["---:"] * (len(header) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (header, rules, *rows)] if rows else []


def number(value: float, digits: int = 3) -> str:
    """Significant digits, without an exponent where the number is of a readable size."""
    if not math.isfinite(value):
        return "-"
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    decimals = max(0, digits - 1 - (math.floor(math.log10(abs(value))) if value else 0))
    return f"{value:,.{decimals}f}"


def ratio(large: float, small: float) -> float:
    return large / small if small else math.inf  # a saturated model has gradients of zero


def loss(results: Sequence[Result]) -> str:
    """Mean and standard deviation of the held-out loss over the seeds that did not diverge, and how many did."""
    losses = [final_loss(result) for result in finished(results)]
    text = [f"{mean(losses):.3f}" + (f" ± {stdev(losses):.3f}" if len(losses) > 1 else "")] if losses else []
    lost = len(results) - len(losses)
    return ", ".join(text + ([f"{lost} of {len(results)} diverged"] if lost else []))


# ---- the tables


def setup(study: Study) -> list[str]:
    if not study.results:
        return []
    preset, result = study.preset, next(iter(study.results.values()))
    tokens = preset.batch * preset.seq_len
    sizes = (
        f"{preset.layers} layers, d = {preset.dim}, {preset.heads} query and {preset.kv_heads} key/value heads, "
        f"{result['parameters'] / 1e6:.2g} M parameters, T = {preset.seq_len} bytes, {preset.batch} sequences a step; "
        f"{preset.short * tokens:,} tokens in a short run, {preset.long * tokens:,} in a long one; {preset.dtype}."
    )
    (train, valid), name = result["common"]["text_tokens"], result["common"]["text"]
    text = f"Text: {name}, {train:,} training and {valid:,} held-out bytes, "
    return [sizes, text + f"unigram entropy {result['unigram_entropy']:.3f} nats.", *machines(study)]


def machines(study: Study) -> list[str]:
    """Where the runs were made, and how many, with the commit of the first."""
    places: dict[str, list[dict[str, Any]]] = {}
    for result in study.results.values():
        where = result["environment"]
        places.setdefault(f"{where['cpu']}, {where['cores']} cores; torch {where['torch']}", []).append(where)
    lines = []
    for place, runs in sorted(places.items(), key=lambda item: min(where["date"] for where in item[1])):
        first = min(runs, key=lambda where: where["date"])
        changes = " with local changes" if first["dirty"] else ""
        commit = f"commit {first['commit']}{changes}, " if first["commit"] else ""
        lines.append(f"{place}; {commit}{first['date'][:10]}: {len(runs)} runs.")
    return lines


def by_rate(study: Study, what: str, cell: Callable[[Result], str]) -> list[str]:
    """A row for every norm, a column for every learning rate of the search; the rate that was kept is bold. The search
    of a norm that has no such rate is not complete."""
    rates = sorted((*study.preset.below, *study.preset.lrs))
    rows = []
    for norm in NORMS:
        jobs = [] if norm in SAME_RATE else [changed(study.preset, norm, lr) for lr in rates]
        cells = ["".join(map(cell, study.of([job]))) for job in jobs]
        if any(cells):
            rows.append([LABELS[norm], *(f"**{text}**" if job.lr == study.lrs.get(norm) else text
                                         for job, text in zip(jobs, cells))])
    return markdown([f"{what} at learning rate", *(f"{lr:g}" for lr in rates)], rows)


def search_loss(study: Study) -> list[str]:
    return by_rate(study, "held-out loss", lambda r: "diverged" if r["diverged"] else f"{final_loss(r):.3f}")


def search_variance(study: Study) -> list[str]:
    """The only table that compares norms at equal learning rates."""
    return by_rate(study, "variance behind the last block",
                   lambda r: number(r["measurements"][-1]["variance"][-1] or math.nan))


def compared(study: Study) -> list[str]:
    rows = []
    for norm in (*NORMS, FIRST_EXACT, UNIT, BY_DEPTH):
        if not (results := study.compared(norm)):
            continue
        good = finished(results)
        growth = average(good, lambda m: m["variance"][-1] / m["variance"][1]) if good else math.nan
        gradients = average(good, lambda m: ratio(max(m["gradient"]), min(m["gradient"]))) if good else math.nan
        largest = max((record["largest_gradient"] or math.inf) for result in results for record in result["train"])
        last = average(good, lambda m: m["variance"][-1]) if good else math.nan
        rows.append([LABELS[norm], f"{study.lrs[norm]:g}", loss(results),
                     study.speed(results), number(last), number(growth), number(gradients), number(largest),
                     worst_share(good, "saturated"), worst_share(good, "unforeseen")])
    return markdown(["norm", "learning rate", "held-out loss", "tokens/s", "variance, last block",
                     "variance, last block / first", "gradient, largest block / smallest", "largest gradient norm",
                     "saturated, worst site", "beyond lam, worst site"], rows)


def distance(study: Study) -> list[str]:
    """What may explain the distance between BHyT and RMSNorm: what sub-layers read at first, and the loss."""
    rates = sorted({study.lrs[other] for others in GAP.values() for other in others if other in study.lrs})
    rows = []
    for norm in ("bhyt", "rmsnorm", "lns", *GAP):
        runs = [study.of([changed(study.preset, norm, lr)]) for lr in rates]
        if results := sum(runs, []):
            read = [average(results, lambda m: math.sqrt(m["sites"][layer][site]["mean_square"]), 0)
                    for layer in (0, -1) for site in (0, 1)]
            rows.append([LABELS[norm], *(f"{size:.2f}" for size in read), *map(loss, runs)])
    return markdown(["norm", "root mean square of what is read at the start: block 1, attention", "MLP",
                     "last block, attention", "MLP", *(f"held-out loss at {lr:g}" for lr in rates)], rows)


def smaller_alphas(study: Study) -> list[str]:
    """DyT and Derf at the lowest learning rate of the grid."""
    rows = []
    for norm in POINTWISE:
        jobs = changed(study.preset, norm, study.preset.lrs[0]), *alphas(study.preset, norm)
        results = [study.of([job]) for job in jobs]
        if any(results[1:]):
            rows.append([LABELS[norm], *map(loss, results)])
    return markdown(["held-out loss with alpha", "1", *(f"{alpha:g}" for alpha in ALPHAS)], rows)


def worst_share(results: Sequence[Result], kind: str) -> str:
    """The largest share of such values at any site and seed, at the end; nothing for norms that have no such values."""
    shares = [site[kind] for result in results for layer in result["measurements"][-1]["sites"]
              for site in layer if kind in site]
    return f"{number(100 * max(shares), 2)} %" if shares else ""


def approximation(study: Study) -> list[str]:
    results, rows = finished(study.compared("bhyt")), []
    for index in (0, -1) if results else ():
        for name, label in ESTIMATES.items():
            pooled = {key: average(results, lambda m: m["approximation"]["pooled"][name][key], index)
                      for key in ("pearson", "pearson_log", "bias", "error")}
            worst = average(results, lambda m: min(
                layer["estimates"][name]["pearson"] for layer in m["approximation"]["layers"]), index)
            first, others = errors(results, name, index)
            rows.append([str(results[0]["measurements"][index]["step"]), label, f"{pooled['pearson']:.4f}",
                         f"{pooled['pearson_log']:.4f}", f"{worst:.4f}", f"{pooled['bias']:+.3f}",
                         f"{pooled['error']:.3f}", f"{first:.3f}", f"{others:.3f}"])
    return markdown(["step", "estimate", "r, all layers", "r of logarithms", "r, worst layer",
                     "mean log(estimate / true)", "root mean square", "in block 1", "behind it"], rows)


def errors(results: Sequence[Result], estimate: str, index: int = -1) -> tuple[float, float]:
    """An estimate's root mean square of log(estimate / true), in the first block and over the others."""
    first, *others = average(results, lambda m: [
        layer["estimates"][estimate]["error"] for layer in m["approximation"]["layers"]], index)
    return first, math.sqrt(mean(error**2 for error in others))


def offsets(study: Study) -> list[str]:
    """How often the offset is refreshed, and 1 / t or 1 in place of 1 / T; each run's error is that of its own kind."""
    cases = {("1 / T, never again" if refresh == NEVER else f"1 / T, every {refresh} steps"):
             ("T", study.compared("bhyt", refresh)) for refresh in study.preset.refreshes}
    cases[f"1 / t, every {REFRESH} steps"] = "t", study.compared(POSITION)
    cases[f"1, every {REFRESH} steps"] = "one", study.compared(ONE_VALUE)
    rows = []
    for name, (estimate, results) in cases.items():
        if good := finished(results):
            stale = average(good, lambda m: max(abs(layer["staleness"]) for layer in m["approximation"]["layers"]))
            rows.append([name, loss(results), f"{stale:.3f}", *(f"{error:.3f}" for error in errors(good, estimate)),
                         worst_share(good, "saturated")])
    return markdown(["offset", "held-out loss", "largest abs(log(offset / fresh offset))",
                     "fresh: root mean square of log(estimate / true), in block 1", "behind it",
                     "saturated, worst site"], rows)


def bound(study: Study) -> list[str]:
    """Frozen lam / kappa in units of 1 / sqrt(L): outputs of the sites, and the stream against LNS's."""
    layers, scaled = study.preset.layers, finished(study.unbounded())
    runs = {value: good for value in study.preset.bounds if (good := finished(study.bounded(value)))}
    if not runs or not scaled:
        return []
    rows = []
    for value, results in [*runs.items(), (None, scaled)]:
        everyone = scaled if value is None else study.bounded(value)
        for index in (0, -1):
            largest = [average(results, lambda m: max(pair[i]["mean_square"] for pair in m["sites"]), index)
                       for i in (0, 1)]
            variance, other = (average(some, lambda m: m["variance"][1:], index) for some in (results, scaled))
            below = f"{sum(a < b for a, b in zip(variance, other))} of {layers}"
            rows.append([
                "LNS" if value is None else f"{value:g}", "" if value is None else f"{value / math.sqrt(layers):.3f}",
                str(results[0]["measurements"][index]["step"]), loss(everyone) if index else "",
                "" if value is None else number(value**2), *(number(layers * size) for size in largest),
                number(variance[-1]), "" if value is None else below,
            ])
    return markdown(["sqrt(L) lam / kappa", "lam / kappa", "step", "held-out loss", "L mean(y²): bound",
                     "first sites, largest", "second sites, largest", "variance of the stream, last block",
                     "blocks with less than LNS"], rows)


def lambdas(study: Study) -> list[str]:
    """Where training takes lam, over blocks and seeds, and what of the bound is left."""
    rows = []
    for norm in ("bhyt", "bhyt-exact"):
        results = finished(study.compared(norm))
        for i, place in enumerate(("first", "second")) if results else ():
            start, end = ([pair[i]["lam"] for result in results for pair in result["measurements"][index]["sites"]]
                          for index in (0, -1))
            largest = math.sqrt(study.preset.layers) * max(map(abs, end)) / KAPPA
            rows.append([f"{LABELS[norm]}, {place} site", number(mean(start)), number(mean(end)),
                         f"{number(min(end))} to {number(max(end))}", number(largest)])
    return markdown(["lam of", "start", "end, mean", "range", "largest sqrt(L) lam / kappa"], rows)


TABLES = {"setup": setup, "search": search_loss, "search-variance": search_variance, "compared": compared,
          "alphas": smaller_alphas, "distance": distance,
          "approximation": approximation, "offsets": offsets, "bound": bound, "lambdas": lambdas}
