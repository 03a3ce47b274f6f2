"""bhyt.diagnostics: the statistics against float64, through every method; nothing changed within or left behind."""

import copy
import math
import pickle
import sys
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Tuple, Union

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import bhyt
from bhyt import diagnostics
from bhyt.diagnostics import SiteStatistics, record
from support.checks import OpsCalled, same_bits
from test_block import LAYERS, LENGTH, Decoder

D, ROWS = 48, 40
OFFSET = 0.25
Site = Union[bhyt.BHyT, bhyt.BHyTApprox]
METHODS = [
    (kind, name if name != "forward" else "__call__")
    for kind in (bhyt.BHyT, bhyt.BHyTApprox) for name in vars(kind) if name.startswith("forward")
]  # fmt: skip


def truth(site: Site, x: Tensor, variance: Optional[Tensor] = None) -> Dict[str, float]:
    """docs/mathematics.md in float64 for rows x [rows, d]; the bounds on `saturation` leave out elements at the
    limit."""
    row = x.detach().double().reshape(-1, x.shape[-1])
    v = row.square().mean(-1)
    used = v if variance is None else variance.detach().double().reshape(-1) + site.variance_offset.double()
    z = site.lam.detach().double() * row / (site.kappa * (used + site.eps).sqrt())[:, None]
    t = torch.tanh(z).abs()
    # 1e-5 relative in z, a dozen float32 roundings, is at most 4e-6 in tanh near 0.95.
    numbers = dict(
        rows=len(row), magnitude=row.abs().mean(), variance=v.mean(), lam=site.lam.detach().double(),
        least=(t > 0.95 + 4e-6).double().mean(), most=(t > 0.95 - 4e-6).double().mean(),
    )
    if variance is not None:
        numbers |= dict(
            approximation=used.mean(), relative_error=((used - v).abs() / (v + site.eps)).mean(),
            correlation=torch.corrcoef(torch.stack([used, v]))[0, 1],
        )
    return {name: float(number) for name, number in numbers.items()}


def check(found: SiteStatistics, expected: Dict[str, float]) -> None:
    """Within 1e-5: float32 sums of at most d = 48 and of some hundred rows, each rounding 6e-8."""
    expected = dict(expected)
    assert expected.pop("least") - 1e-6 <= found.saturation <= expected.pop("most") + 1e-6
    assert found.rows == expected.pop("rows")
    for name in ("approximation", "relative_error", "correlation"):
        assert name in expected or getattr(found, name) is None
    for name, number in expected.items():
        assert getattr(found, name) == pytest.approx(number, rel=1e-5), name


def global_hooks() -> int:
    return len(torch.nn.modules.module._global_forward_hooks)


def site_of(kind: type, **options) -> Site:
    """kappa 1.5 and lam 2: a good deal of saturation."""
    site = kind(D, lam=2.0, kappa=1.5, **options)
    if kind is bhyt.BHyTApprox:
        site.set_variance_offset(OFFSET)
    return site


def given(kind: type, method: str, rows: int = ROWS, dtype: torch.dtype = torch.float32) -> Tuple[Tensor, ...]:
    """Arguments of the method, for rows of varied magnitude; the variance is off by more than the offset."""
    x = torch.randn(2, rows // 2, D) * torch.rand(2, rows // 2, 1).add(0.5)
    arguments = [x.to(dtype)]
    if "add" in method:
        arguments.append(torch.randn_like(x).to(dtype))
    if kind is bhyt.BHyTApprox:
        v = sum(arguments).double().square().mean(-1, keepdim=True) * torch.rand(2, rows // 2, 1).add(0.5)
        arguments.append(v.to(torch.promote_types(dtype, torch.float32)))
    return tuple(arguments)


def rows_and_variance(kind: type, method: str, arguments: Tuple[Tensor, ...]) -> Tuple[Tensor, Optional[Tensor]]:
    row = arguments[0] + arguments[1] if "add" in method else arguments[0]
    return row, arguments[-1] if kind is bhyt.BHyTApprox else None


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64), ids=str)
@pytest.mark.parametrize("kind, method", METHODS, ids=lambda value: getattr(value, "__name__", value))
def test_every_method(kind: type, method: str, dtype: torch.dtype, device: str) -> None:
    """Every statistic of a site, through each of its methods and in each dtype, arguments by position or by name."""
    site = site_of(kind, learnable_lam=dtype != torch.float32).to(device)
    arguments = tuple(argument.to(device) for argument in given(kind, method, dtype=dtype))
    expected = truth(site, *rows_and_variance(kind, method, arguments))
    assert 0.1 < expected["least"] < 0.6
    with record(site) as found:
        getattr(site, method)(*arguments)
    (statistics,) = found
    assert (statistics.name, statistics.kind) == ("", "exact" if kind is bhyt.BHyT else "approximate")
    check(statistics, expected)
    names = ["x"] + ["residual"] * ("add" in method) + ["variance"] * (kind is bhyt.BHyTApprox)
    with record(site) as found:
        getattr(site, method)(**dict(zip(names, arguments)))
    assert list(found) == [statistics]


@pytest.mark.parametrize("kind, method", METHODS, ids=lambda value: getattr(value, "__name__", value))
def test_calls_accumulate(kind: type, method: str) -> None:
    """Three calls with different numbers of rows and magnitudes, one of them empty and some without gradient: the
    statistics of all rows together, readable in between."""
    site = site_of(kind)
    calls = [given(kind, method, rows) for rows in (8, 0, 60)]
    calls[2] = tuple(3 * argument for argument in calls[2])
    with record(site) as found:
        with torch.inference_mode():
            getattr(site, method)(*calls[0])
        check(*found, truth(site, *rows_and_variance(kind, method, calls[0])))
        getattr(site, method)(*calls[1])
        getattr(site, method)(*calls[2])
    together = tuple(torch.cat([t.flatten(0, 1) for t in tensors]) for tensors in zip(*calls))
    check(*found, truth(site, *rows_and_variance(kind, method, together)))


def test_constant_rows() -> None:
    """One row, a zero row, lam 0: no correlation, no saturation, and numbers all the same."""
    site = site_of(bhyt.BHyTApprox)
    with record(site) as found:
        site(torch.ones(1, D), torch.ones(1, 1))
    (statistics,) = found
    assert math.isnan(statistics.correlation) and statistics.relative_error == pytest.approx(OFFSET, rel=1e-5)
    nn.init.zeros_(site.lam)
    with record(site) as found:
        site(torch.zeros(2, D), torch.zeros(2, 1))
    (statistics,) = found
    assert statistics.saturation == statistics.variance == statistics.magnitude == 0
    assert statistics.relative_error == pytest.approx(OFFSET / site.eps, rel=1e-5)


def walk(model: Decoder, x: Tensor) -> Iterator[Tuple[str, Tensor, Optional[Tensor]]]:
    """By the formulas, in the order of calls: a site's name, its rows, and the variance it is given."""
    for i, block in enumerate(model.blocks):
        y, variance = bhyt.reference.forward(x, block.norm1.weight, block.norm1.lam)
        yield f"blocks.{i}.norm1", x, None
        x = x + block.attention(y)
        yield f"blocks.{i}.norm2", x, variance
        offset = block.norm2.variance_offset
        x = x + block.mlp(bhyt.reference.forward_approx(x, variance, offset, block.norm2.weight, block.norm2.lam))
    yield "norm", x, None


def decoder() -> Decoder:
    model = Decoder()
    model.refresh()
    return model


def test_whole_model() -> None:
    """A decoder's sites, all by name and in order, against its float64 evaluation; one row per token."""
    model, x = decoder(), torch.randn(4, LENGTH, 32)
    with record(model) as found:
        model(x)
    exact = copy.deepcopy(model).double()
    sites = dict(exact.named_modules())
    expected = {name: truth(sites[name], *values) for name, *values in walk(exact, x.double())}
    assert len(expected) == 2 * LAYERS + 1 and {site.name for site in found} == expected.keys()
    assert [site.name for site in found] == [name for name in sites if name in expected]
    for site in found:
        check(site, expected[site.name])


def run(model: nn.Module, x: Tensor) -> List[Tensor]:
    """Output and gradients."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().mean().backward()
    return [y.detach(), x.grad] + [parameter.grad.clone() for parameter in model.parameters()]


def test_same_bits_and_nothing_left() -> None:
    """Outputs and gradients have the same bits before, in and after the context. After it, an exception included, the
    classes and the instances have exactly the attributes they had, and a later call adds nothing."""
    model, x = decoder(), torch.randn(4, LENGTH, 32)
    classes = [dict(vars(kind)) for kind in (bhyt.BHyT, bhyt.BHyTApprox)]
    instances = [vars(module).copy() for module in model.modules()]
    before = run(model, x)
    with pytest.raises(KeyError):
        with record(model) as found:
            assert global_hooks()
            within = run(model, x)
            raise KeyError
    statistics = list(found)
    assert [dict(vars(kind)) for kind in (bhyt.BHyT, bhyt.BHyTApprox)] == classes
    assert [vars(module) for module in model.modules()] == instances
    assert all(map(same_bits, before, within)) and all(map(same_bits, before, run(model, x)))
    assert list(found) == statistics and statistics[0].rows == 4 * LENGTH and not global_hooks()


def test_copies_within() -> None:
    """A copy or pickle made in the context is an ordinary model: it runs, and is not counted. USERS row 28."""
    model, x = decoder(), torch.randn(4, LENGTH, 32)
    with record(model) as found:
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        for other in copies:
            assert not any(vars(module).keys() & {"forward", "forward_add"} for module in other.modules())
            assert torch.allclose(other(x), model.by_reference(x), rtol=1e-4, atol=1e-5)
    assert list(found) == []


def test_two_models() -> None:
    """Contexts of two models may overlap in any order; one model can be recorded once at a time, all of it."""
    first, second, x = decoder(), decoder(), torch.randn(2, LENGTH, 32)
    one, two = record(first), record(second)
    found_one, found_two = one.__enter__(), two.__enter__()
    first(x)
    with pytest.raises(ValueError, match="ModuleList is being recorded by another context"):
        with record(nn.ModuleList([decoder(), second])):
            pass
    one.__exit__(None, None, None)
    first(x), second(x), second(x)
    two.__exit__(None, None, None)
    assert {site.rows for site in found_one} == {2 * LENGTH}
    assert {site.rows for site in found_two} == {4 * LENGTH}
    assert not global_hooks()


@pytest.mark.parametrize("use_reentrant", (False, True))
def test_checkpointing(use_reentrant: bool) -> None:
    """Rows that checkpointing computes again in the backward pass count once. USERS row 24."""

    class Checkpointed(Decoder):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=use_reentrant)

    model, x = Checkpointed(), torch.randn(4, LENGTH, 32)
    model.refresh()
    with record(model) as found, OpsCalled() as ops:
        run(model, x)
    assert ops.names.count("bhyt.add_forward_approx.default") == 2 * LAYERS  # it did compute twice
    assert [site.rows for site in found] == [4 * LENGTH] * (2 * LAYERS + 1)


def test_compiled() -> None:
    """A compiled model runs eagerly in the context and is seen; afterwards its compiled code runs, without compiling
    anew."""
    model, x = decoder(), torch.randn(4, LENGTH, 32)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    compiled(x)
    assert counter.frame_count == 1
    with record(compiled) as found:
        compiled(x)
    assert [site.rows for site in found] == [4 * LENGTH] * (2 * LAYERS + 1)
    compiled(x)
    assert counter.frame_count == 1


def test_nothing_waits() -> None:
    """Recording reads no number: it works on the meta device, where reading one raises, as the record then does."""
    model, x = decoder().to("meta"), torch.randn(4, LENGTH, 32, device="meta")
    with record(model) as found:
        run(model, x)
        run(model, x)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        list(found)


def test_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """str(record) has a line per site; without matplotlib plot says what is missing."""
    model, x = decoder(), torch.randn(4, LENGTH, 32)
    with record(model) as found:
        model(x)
    header, *lines = str(found).splitlines()
    assert header.split()[:2] == ["site", "rows"]
    assert [line.split()[0] for line in lines] == [site.name for site in found]
    assert f"{list(found)[1].correlation:.4f}" in lines[1]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        found.plot(tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_no_site() -> None:
    """A model without sites is refused, and nothing is left behind."""
    with pytest.raises(ValueError, match="Linear has no BHyT site"):
        with record(nn.Linear(2, 2)):
            pass
    assert not global_hooks() and not diagnostics._recording
