"""What the study trains: its presets, and one job per training run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Mapping, Sequence

NORMS = (
    "bhyt", "bhyt-exact", "rmsnorm", "layernorm", "dyt", "peri-ln", "lns",
    "derf", "mix-ln", "seednorm", "ssnorm", "pre-crmsnorm",
)
# Changes of BHyT; see variants.py.
FIRST_EXACT, ONE_VALUE, POSITION = VARIANTS = ("bhyt-first-exact", "bhyt-one-value", "bhyt-position")
# What may explain the distance between BHyT and RMSNorm, and at whose learning rates it is tried.
UNIT, BY_DEPTH = "bhyt-unit", "bhyt-by-depth"
GAP = {
    UNIT: ("rmsnorm", "bhyt"),
    BY_DEPTH: ("rmsnorm", "lns"),
    "rmsnorm-small": ("rmsnorm", "bhyt"),
    "rmsnorm-embedding": ("rmsnorm",),
    "bhyt-small": ("bhyt",),
    "bhyt-fast": ("bhyt",),
    "bhyt-embedding": ("bhyt",),
    FIRST_EXACT: ("bhyt",),
    "bhyt-unit-fast": ("rmsnorm",),
    "bhyt-unit-embedding": ("rmsnorm",),
    "bhyt-unit-first": ("rmsnorm",),
    "bhyt-unit-exact": ("rmsnorm",),
    "bhyt-by-depth-first": ("lns",),
}
# Whose learning rate it takes: Pre-CRMSNorm is the same function as LayerNorm, so it has no search of its own.
SAME_RATE = {"pre-crmsnorm": "layernorm", UNIT: "rmsnorm", BY_DEPTH: "lns", **{variant: "bhyt" for variant in VARIANTS}}
SEARCH_SEED = 0  # the learning-rate search has a seed of its own
REFRESH = 10  # steps between updates of the variance offsets, where nothing else is said
NEVER = 0  # as a refresh: after the initialisation no more


@dataclass(frozen=True)
class Preset:
    layers: int
    dim: int
    heads: int
    kv_heads: int
    seq_len: int
    batch: int
    short: int  # steps of a run of the learning-rate search and of the bound
    long: int  # steps of all others; equal steps are equal tokens
    measurements: int  # of a long run, after the one at its start; a short run has one
    lrs: tuple[float, ...]
    below: tuple[float, ...]  # rates for norms to which the lowest of lrs is the best, falling
    seeds: tuple[int, ...]
    refreshes: tuple[int, ...]
    bounds: tuple[float, ...]  # values of (lam / kappa) * sqrt(layers)
    device: str
    dtype: str


LRS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # the last two ask for trouble
BELOW = (3e-4, 1e-4)
SEEDS = (1, 2, 3)
POINTWISE = ("dyt", "derf")
ALPHAS = (0.3, 0.1, 0.03)  # of those two; their authors' rule gives 1 for this width
BOUNDS = (0.5, 1.0, 2.0, 4.0)

PRESETS = {
    "smoke": Preset(
        2, 16, 2, 1, 16, 16, 2, 4, 2, (1e-3, 1e-2), (1e-4,), (1, 2), (1, NEVER), (0.5, 2.0), "cpu", "float32"
    ),
    "cpu": Preset(
        24, 128, 4, 2, 128, 2, 240, 800, 4, LRS, BELOW, SEEDS, (REFRESH, 100, NEVER), BOUNDS, "cpu", "float32"
    ),
    "gpu": Preset(
        48, 256, 4, 2, 512, 32, 600, 4000, 8, LRS, BELOW, SEEDS, (1, REFRESH, 100, 1000, NEVER), BOUNDS, "cuda",
        "bfloat16",
    ),
}


@dataclass(frozen=True)
class Job:
    """One training run, as far as it differs from the others of its study."""

    norm: str
    lr: float
    seed: int
    steps: int
    measurements: int = 1
    refresh: int = REFRESH
    bound: float | None = None  # lam / kappa of both sites, frozen, in units of 1 / sqrt(layers)


Result = Mapping[str, Any]
Results = Mapping[Job, Result]


# ---- the experiments


def search(preset: Preset, norm: str, results: Results) -> list[Job]:
    """The same small grid of learning rates for every norm; below it one more for as long as the lowest is the best."""
    jobs = [Job(norm, lr, SEARCH_SEED, preset.short) for lr in preset.lrs]
    for lr in preset.below:
        if best_of(jobs, results) == jobs[0]:
            jobs.insert(0, Job(norm, lr, SEARCH_SEED, preset.short))
    return jobs


def searches(preset: Preset, results: Results) -> list[Job]:
    """What is wanted once the results are there: the runs of the grid, at first, then what they ask for."""
    return [job for norm in NORMS if norm not in SAME_RATE for job in search(preset, norm, results)]


def best_of(jobs: Sequence[Job], results: Results) -> Job | None:
    """The one of the lowest held-out loss, once all have a result."""
    return min(jobs, key=lambda job: final_loss(results[job])) if all(job in results for job in jobs) else None


def best_lrs(preset: Preset, results: Results) -> dict[str, float]:
    """The best learning rate of each norm whose search is complete, and of who shares it."""
    best = {norm: best_of(search(preset, norm, results), results) for norm in NORMS if norm not in SAME_RATE}
    lrs = {norm: job.lr for norm, job in best.items() if job}
    return lrs | {norm: lrs[other] for norm, other in SAME_RATE.items() if other in lrs}


def comparison(preset: Preset, norm: str, lr: float, refresh: int = REFRESH) -> list[Job]:
    """A long run for every seed."""
    return [Job(norm, lr, seed, preset.long, preset.measurements, refresh) for seed in preset.seeds]


def bounded(preset: Preset, lr: float, bound: float) -> list[Job]:
    return [Job("bhyt", lr, seed, preset.short, bound=bound) for seed in preset.seeds]


def unbounded(preset: Preset, lr: float) -> list[Job]:
    """LayerNorm-Scaling, which the bound is compared with, at the same learning rate and steps."""
    return [Job("lns", lr, seed, preset.short) for seed in preset.seeds]


def changed(preset: Preset, norm: str, lr: float) -> Job:
    """A run of the search, of a model that is not searched."""
    return Job(norm, lr, SEARCH_SEED, preset.short)


def alphas(preset: Preset, norm: str) -> list[Job]:
    """DyT or Derf with smaller alphas, at the lowest learning rate of the grid."""
    return [changed(preset, f"{norm}-{alpha:g}", preset.lrs[0]) for alpha in ALPHAS]


def experiments(preset: Preset, lrs: Mapping[str, float]) -> list[Job]:
    """All that follows the search; runs that two experiments share are there once."""
    lr = lrs["bhyt"]
    jobs = [job for norm in (*NORMS, UNIT, BY_DEPTH) for job in comparison(preset, norm, lrs[norm])]
    jobs += [changed(preset, norm, lrs[other]) for norm, others in GAP.items() for other in others]
    jobs += [job for norm in POINTWISE for job in alphas(preset, norm)]
    jobs += [job for bound in preset.bounds for job in bounded(preset, lr, bound)]
    jobs += unbounded(preset, lr)
    jobs += [job for variant in VARIANTS for job in comparison(preset, variant, lr)]
    jobs += [job for refresh in preset.refreshes for job in comparison(preset, "bhyt", lr, refresh)]
    return list(dict.fromkeys(jobs))


# ---- results


def final_loss(result: Result) -> float:
    """The last held-out loss in nats per byte; infinite for a run that diverged."""
    return math.inf if result["diverged"] else result["measurements"][-1]["loss"]
