"""Statistics of each BHyT site while a model runs: magnitude, variance, saturation, lam, and the error of v'.

Examples:
    >>> import torch, bhyt
    >>> model = torch.nn.Sequential(bhyt.BHyT(4, lam=2.0))
    >>> with bhyt.diagnostics.record(model) as record:
    ...     y = model(torch.ones(2, 4))     # once or many times, backward included
    >>> [(site.name, site.kind, site.rows, site.variance) for site in record]
    [('0', 'exact', 2, 1.0)]
"""

import contextlib
import inspect
import math
import threading
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from bhyt.modules import BHyT, BHyTApprox

SATURATED = 0.95  # |tanh| above this counts as saturated: its derivative is below a tenth


@dataclass(frozen=True)
class SiteStatistics:
    """One site's statistics: means over all rows x [d] that it was given in the context, the residual added.

    Attributes:
        name: as in `model.named_modules()`.
        kind: "exact" or "approximate".
        rows: the number of rows.
        magnitude: mean |x|.
        variance: mean of v = mean(x^2), computed from the row at both kinds of site.
        saturation: share of elements with |tanh(a x)| > 0.95, a = lam / (kappa sqrt(v + eps)), with v' for v at an
            approximate site.
        lam: its value at the last call.
        approximation: mean of v', the variance an approximate site used, its offset included; None at an exact site.
        relative_error: mean of |v' - v| / (v + eps); None at an exact site.
        correlation: Pearson's r between v' and v over the rows; None at an exact site, NaN where v or v' is constant.
    """

    name: str
    kind: str
    rows: int
    magnitude: float
    variance: float
    saturation: float
    lam: float
    approximation: Optional[float] = None
    relative_error: Optional[float] = None
    correlation: Optional[float] = None


class Record:
    """The statistics that `record` yields. Iterating gives `SiteStatistics`, in the model's order.

    Sites that were not called are left out. Iterating, printing and plotting wait for the device. A record can be read
    in the context and after it.

    Args:
        sites: the running statistics, which `record` makes.
    """

    def __init__(self, sites: List["_SiteStatistics"]) -> None:
        self._sites = sites

    def __iter__(self) -> Iterator[SiteStatistics]:
        """The statistics of each site that was called, in the model's order. Waits for the device."""
        return iter([site.read() for site in self._sites if site.rows])

    def __str__(self) -> str:
        header = ("site", "rows", "mean |x|", "variance", "saturated", "lam", "v'", "|v' - v| / v", "r")
        table: List[Tuple[str, ...]] = [header]
        for site in self:
            numbers = [f"{site.magnitude:.4g}", f"{site.variance:.4g}", f"{site.saturation:.3%}", f"{site.lam:.4g}"]
            if site.kind == "approximate":
                numbers += [f"{site.approximation:.4g}", f"{site.relative_error:.3%}", f"{site.correlation:.4f}"]
            table.append((site.name, f"{site.rows}", *numbers, *[""] * (len(header) - 2 - len(numbers))))
        widths = [max(map(len, column)) for column in zip(*table)]
        lines = [[cell.rjust(width) for cell, width in zip(row, widths)] for row in table]
        return "\n".join("  ".join([row[0].ljust(widths[0]), *line[1:]]).rstrip() for row, line in zip(table, lines))

    def plot(self, path: Any) -> None:
        """Draw magnitude, variance and v', saturation, and the error of v' by depth into a file.

        Args:
            path: of the picture; its ending is the format, as `matplotlib.figure.Figure.savefig` takes it.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
            from matplotlib.ticker import MaxNLocator, PercentFormatter
        except ImportError as error:
            raise ImportError("bhyt.diagnostics: plot needs matplotlib: pip install matplotlib") from error

        figure = Figure(figsize=(11, 7), layout="constrained")
        panels = figure.subplots(2, 2)
        for axes, (field, title) in zip(panels.flat, _PANELS.items()):
            for kind, marker in (("exact", "o"), ("approximate", "s")):
                points = [(i, getattr(site, field)) for i, site in enumerate(self) if site.kind == kind]
                points = [point for point in points if point[1] is not None]
                if points:
                    axes.plot(*zip(*points), marker, label=kind)
            axes.set(title=title, xlabel="site")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.25)
        (magnitude, variance), (saturation, relative_error) = panels
        approximations = [(i, site.approximation) for i, site in enumerate(self) if site.kind == "approximate"]
        if approximations:
            variance.plot(*zip(*approximations), "x", label="v' of the approximate")
        magnitude.set_yscale("log")
        variance.set_yscale("log")
        variance.legend()
        saturation.yaxis.set_major_formatter(PercentFormatter(1))
        relative_error.yaxis.set_major_formatter(PercentFormatter(1))
        figure.savefig(path)


_PANELS = {
    "magnitude": "mean |x|",
    "variance": "variance v = mean(x²)",
    "saturation": f"share of |tanh| > {SATURATED}",
    "relative_error": "|v' - v| / v",
}


@contextlib.contextmanager
def record(model: nn.Module) -> Iterator[Record]:
    """Record every BHyT site of `model` within the context: each call of the module, by any of its methods.

    Outputs and gradients keep their bits. Nothing waits for the device before the record is read. The memory does not
    grow with the calls. The context leaves nothing behind, also after exceptions. In a training loop, record every so
    many steps.

    Rows that activation checkpointing computes again in the backward pass count once. Models that torch.compile has
    compiled run eagerly in the context. Scripted and exported models, and CUDA graphs that were captured before, hide
    their sites. With several processes each records the rows it sees itself. Padding counts as any row.

    Args:
        model: any module with `bhyt.BHyT` or `bhyt.BHyTApprox` sites, or a site itself.

    Yields:
        A `Record`.

    Raises:
        ValueError: the model has no site, or one that another context is recording.
    """
    sites: Dict[nn.Module, _SiteStatistics] = {}
    for name, module in model.named_modules():
        if isinstance(module, (BHyT, BHyTApprox)):
            sites[module] = _SiteStatistics(name, isinstance(module, BHyT))
    if not sites:
        raise ValueError(f"model: {type(model).__name__} has no BHyT site")
    with _lock:
        if not _recording.keys().isdisjoint(sites):
            raise ValueError(f"model: {type(model).__name__} is being recorded by another context")
        if not _recording:
            _start()
        _recording.update(sites)
    try:
        yield Record(list(sites.values()))
    finally:
        with _lock:
            for site in sites:
                del _recording[site]
            if not _recording:
                _undo.close()


class _SiteStatistics:
    """Running statistics of one site, on its device.

    Means and co-moments of several batches are merged as in Chan, Golub and LeVeque, "Updating formulae and a pairwise
    algorithm for computing sample variances" (1979): no sums of squares, so float32 is enough.
    """

    def __init__(self, name: str, exact: bool) -> None:
        self.name = name
        self.exact = exact
        self.rows = 0
        self.mean: Tensor
        self.moments: Tensor
        self.lam: Tensor

    @torch.no_grad()
    def add(self, site: Any, x: Tensor, variance: Optional[Tensor]) -> None:
        """x: [..., d]; variance: [..., 1], as given to an approximate site, None at an exact one."""
        if x.is_nested:
            x, variance = x.values(), None if variance is None else variance.values()
        x = x.detach().reshape(-1, x.shape[-1])
        count, d = x.shape
        if count == 0:
            return
        dtype = torch.promote_types(x.dtype, torch.float32)
        true = torch.linalg.vector_norm(x, 2, -1, dtype=dtype).square() / d
        used = true if variance is None else variance.reshape(-1) + site.variance_offset.to(dtype)
        # |tanh(a x)| > 0.95 where |x| > atanh(0.95) / a.
        limit = math.atanh(SATURATED) * site.kappa * torch.sqrt(used + site.eps) / site.lam.to(dtype).abs()
        values = torch.stack([  # [5, rows]
            true,
            used,
            torch.linalg.vector_norm(x, 1, -1, dtype=dtype) / d,
            (x.abs() > limit[:, None]).sum(-1) / d,
            (used - true).abs() / (true + site.eps),
        ])
        mean = values.mean(1)
        centred = values[:2] - mean[:2, None]
        moments = (centred[:, None] * centred).sum(-1)  # [2, 2]
        if self.rows:
            share = count / (self.rows + count)
            delta = mean - self.mean
            mean = self.mean + share * delta
            moments = self.moments + moments + share * self.rows * torch.outer(delta[:2], delta[:2])
        self.mean, self.moments, self.lam = mean, moments, site.lam.detach().clone()
        self.rows += count

    def read(self) -> SiteStatistics:
        true, used, magnitude, saturation, error = self.mean.tolist()
        statistics = (self.rows, magnitude, true, saturation, self.lam.item())
        if self.exact:
            return SiteStatistics(self.name, "exact", *statistics)
        (true_square, product), (_, used_square) = self.moments.tolist()
        scale = math.sqrt(true_square) * math.sqrt(used_square)
        return SiteStatistics(
            self.name, "approximate", *statistics, used, error, product / scale if scale else math.nan
        )


# A copy of a site would have the site's hooks. So one hook on every module, registered while any model is recorded,
# looks here for the statistics that it adds to.
_recording: Dict[nn.Module, _SiteStatistics] = {}
_undo = contextlib.ExitStack()
_lock = threading.Lock()
_SIGNATURES = {kind: inspect.signature(kind.forward) for kind in (BHyT, BHyTApprox)}


def _start() -> None:
    _undo.enter_context(torch.compiler.set_stance("force_eager"))
    handle = register_module_forward_hook(_observe, with_kwargs=True)
    _undo.callback(handle.remove)


def _observe(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
    statistics = _recording.get(module)
    # Within a backward pass activation checkpointing makes the call, for rows that have been counted.
    if statistics is not None and torch._C._current_graph_task_id() == -1:
        signature = _SIGNATURES[BHyT if statistics.exact else BHyTApprox]
        given = signature.bind(module, *args, **kwargs).arguments
        rows = given["x"] if given.get("residual") is None else result[1]
        statistics.add(module, rows, given.get("variance"))
