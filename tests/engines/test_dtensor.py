"""DTensor: the ops on sharded rows against the truth, the sites against one process, and what is communicated: nothing.

In float64; sums are ordered differently, and that is all: 1e-12 of a tensor's norm is 5000 roundings.
"""

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Dict, Optional, Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

import bhyt
import bhyt.parallel
from support import truth
from support.cases import FORMS, Call, make_call, make_upstream, run_with_gradients
from support.processes import assert_same, assert_same_gradients, processes

WIDTH = 32
Layout = Sequence[Placement]


def distributed(call: Call, mesh: DeviceMesh, rows: Layout, per_row: Layout, gain: Layout) -> Call:
    """The same call on DTensors: x and residual laid out as `rows`, the variance as `per_row`, the weight as `gain`."""
    layouts = dict(x=rows, residual=rows, variance=per_row, weight=gain, lam=None, offset=None)
    given = {name: (getattr(call, name), layout) for name, layout in layouts.items() if getattr(call, name) is not None}
    return replace(call, **{name: distribute_tensor(t, mesh, layout) for name, (t, layout) in given.items()})


class Checked:
    """A call on DTensors whose outputs and gradients equal the truth; the collectives that it took."""

    def __init__(
        self,
        call: Call,
        mesh: DeviceMesh,
        rows: Layout,
        per_row: Layout,
        gain: Layout,
        names: Optional[Sequence[str]] = None,
        unused: Sequence[str] = (),
    ) -> None:
        upstream = make_upstream(call)._asdict()
        upstream = {name: None if name in unused else g for name, g in upstream.items()}
        layouts = dict(y=rows, sum=rows, variance=per_row)
        placed = {n: None if g is None else distribute_tensor(g, mesh, layouts[n]) for n, g in upstream.items()}
        on_shards = distributed(call, mesh, rows, per_row, gain)
        with CommDebugMode() as forward:
            on_shards.run()
        with CommDebugMode() as both:
            outputs, grads = run_with_gradients(
                on_shards, placed["y"], placed["sum"], placed["variance"], names=names
            )
        self.collectives_forward, self.collectives = forward.get_comm_counts(), both.get_comm_counts()
        self.outputs: Dict[str, Layout] = {n: t.placements for n, t in outputs._asdict().items() if t is not None}
        self.grads: Dict[str, Layout] = {name: tuple(grad.placements) for name, grad in grads.items()}
        for name, expected in truth.outputs(call)._asdict().items():
            if expected is not None:
                assert_same(getattr(outputs, name), expected, name)
        expected_grads = truth.gradients(call, upstream["y"], upstream["sum"], upstream["variance"])
        assert set(grads) == set(call.differentiable() if names is None else names)
        for name, grad in grads.items():
            assert_same(grad, expected_grads[name], f"gradient of {name}")


def call_of(form: str, *shape: int, **options) -> Call:
    dtypes = dict(dtype=torch.float64, weight=torch.float64, lam_dtype=torch.float64)
    return make_call(form, shape, **dtypes | options)


@processes(2)
def test_rows_sharded() -> None:
    """Every op, rows sharded in any leading dimension, evenly or not: no communication; every output and gradient of
    rows stays sharded, gradients of parameters are pending sums. USERS row 25."""
    mesh = init_device_mesh("cpu", (2,))
    for form in FORMS:
        for shape, dim in (((5, 8), 0), ((4, 6, 8), 0), ((4, 6, 8), 1), ((2, 3, 4, 7), 2)):
            shard = [Shard(dim)]
            checked = Checked(call_of(form, *shape), mesh, shard, shard, [Replicate()])
            assert not checked.collectives, (form, shape, dim, checked.collectives)
            assert all(layout == tuple(shard) for layout in checked.outputs.values())
            sums = {"weight", "lam"}
            assert all(layout == ((Partial(),) if n in sums else tuple(shard)) for n, layout in checked.grads.items())


@processes(2)
def test_some_gradients() -> None:
    """Any subset of gradients, one after another in the same layout; no weight at all: masked outputs are left out."""
    mesh = init_device_mesh("cpu", (2,))
    shard = [Shard(0)]
    for form in FORMS:
        call = call_of(form, 4, 8)
        for names in (["x"], ["weight"], ["lam"], ["x", "lam"], ["weight", "lam"], None, ["x"]):
            assert not Checked(call, mesh, shard, shard, [Replicate()], names).collectives
        for names in (["lam"], None, ["x"]):
            assert not Checked(replace(call, weight=None), mesh, shard, shard, [Replicate()], names).collectives


@processes(2)
def test_unused_outputs() -> None:
    """Outputs without a gradient, y among them; second derivatives of sharded rows."""
    mesh = init_device_mesh("cpu", (2,))
    shard = [Shard(0)]
    for form, unused in (("forward", "y"), ("add_forward", "y"), ("add_forward", "variance"), ("add_forward", "sum")):
        names = ["x", "lam", "weight"] if unused != "y" else ["x"]
        assert not Checked(call_of(form, 4, 8), mesh, shard, shard, [Replicate()], names, [unused]).collectives

    call = call_of("forward", 4, 8)
    second = []
    for leaves in (call, distributed(call, mesh, shard, shard, [Replicate()])):
        leaves = leaves.requiring_grad()
        (grad,) = torch.autograd.grad(leaves.run().y.square().sum(), leaves.x, create_graph=True)
        second.append(torch.autograd.grad(grad.square().sum(), [leaves.x, leaves.weight, leaves.lam]))
    for actual, expected in zip(*second):
        assert_same(actual, expected, "second derivative")


@processes(2)
def test_hidden_sharded() -> None:
    """Approximate sites sharded in d with their weight: no communication at all, gradients of variance and lam are
    pending sums. A replicated weight is cut for free; exact sites communicate, and are right. USERS row 25."""
    mesh = init_device_mesh("cpu", (2,))
    for form in ("forward_approx", "add_forward_approx"):
        for shape in ((8,), (3, 8), (2, 3, 9)):
            shard = [Shard(len(shape) - 1)]
            checked = Checked(call_of(form, *shape), mesh, shard, [Replicate()], [Shard(0)])
            assert not checked.collectives, (form, shape, checked.collectives)
            assert all(layout == tuple(shard) for layout in checked.outputs.values())
            assert checked.grads["x"] == tuple(shard) and checked.grads["weight"] == (Shard(0),)
            assert checked.grads["variance"] == checked.grads["lam"] == (Partial(),)
            assert not Checked(call_of(form, *shape), mesh, shard, [Replicate()], [Replicate()]).collectives
    for form in ("forward", "add_forward"):
        assert Checked(call_of(form, 4, 8), mesh, [Shard(1)], [Replicate()], [Shard(0)]).collectives_forward


@processes(2)
def test_pending_branch() -> None:
    """A branch that is a pending sum, as a row-wise parallel projection leaves it, joins a sequence-sharded stream by
    one reduce-scatter, and by nothing else."""
    mesh = init_device_mesh("cpu", (2,))
    shares = torch.randn(2, 4, 6, 8, dtype=torch.float64)
    for form in ("add_forward", "add_forward_approx"):
        call = replace(call_of(form, 4, 6, 8), x=shares.sum(0))
        on_shards = distributed(call, mesh, [Shard(1)], [Shard(1)], [Replicate()])
        on_shards = replace(on_shards, x=DTensor.from_local(shares[dist.get_rank()], mesh, [Partial()]))
        with CommDebugMode() as comm:
            outputs = on_shards.run()
        assert list(comm.get_comm_counts().values()) == [1], comm.get_comm_counts()
        assert "reduce_scatter" in str(*comm.get_comm_counts())
        for name, expected in truth.outputs(call)._asdict().items():
            if expected is not None:
                assert getattr(outputs, name).placements == (Shard(1),)
                assert_same(getattr(outputs, name), expected, name)


@processes(4)
def test_rows_and_hidden_sharded() -> None:
    """On a 2 x 2 mesh: batch and sequence; sequence and d."""
    mesh = init_device_mesh("cpu", (2, 2))
    for form in FORMS:
        rows = [Shard(0), Shard(1)]
        assert not Checked(call_of(form, 2, 4, 8), mesh, rows, rows, [Replicate()] * 2).collectives
    for form in ("forward_approx", "add_forward_approx"):
        layouts = [Shard(1), Shard(2)], [Shard(1), Replicate()], [Replicate(), Shard(0)]
        checked = Checked(call_of(form, 2, 4, 8), mesh, *layouts)
        assert not checked.collectives
        assert checked.grads["variance"] == (Shard(1), Partial()) and checked.grads["weight"] == (Partial(), Shard(0))


class Chain(nn.Module):
    """Every way into a site, with a pointwise branch between them; CommDebugMode wants each module called once."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = bhyt.BHyT(WIDTH, lam=2.0), bhyt.BHyTApprox(WIDTH)
        self.third, self.last = bhyt.BHyT(WIDTH, lam=1.5, learnable_lam=False), bhyt.BHyTApprox(WIDTH)
        self.fourth, self.fifth = bhyt.BHyT(WIDTH, lam=2.0), bhyt.BHyT(WIDTH)
        for site in self.children():
            nn.init.uniform_(site.weight, 0.5, 1.5)
        self.second.set_variance_offset(0.25)
        self.last.set_variance_offset(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y, variance = self.first.forward_with_variance(x)
        y, x = self.second.forward_add(y.sin(), residual=x, variance=variance)
        y, x, variance = self.third.forward_add_with_variance(y.sin(), x)
        y, x = self.fourth(self.last(y.sin(), variance), residual=x)
        return self.fifth(y) + x


def chains() -> Sequence[Chain]:
    chain = Chain().double()
    return chain, copy.deepcopy(chain)


@processes(2)
def test_sequence_parallel_site() -> None:
    """Every method of both sites on plain shards and on DTensors, under `SequenceParallelSite`: equal to one process,
    without communication, the kind of tensor kept; a frozen lam and copies included. USERS row 25."""
    mesh = init_device_mesh("cpu", (2,))
    x = torch.randn(2, 6, WIDTH, dtype=torch.float64)
    for plain in (True, False):
        reference, chain = chains()
        plan = {name: bhyt.parallel.SequenceParallelSite() for name, _ in chain.named_children()}
        parallelize_module(chain, mesh, plan)
        chain = copy.deepcopy(chain)
        shard = distribute_tensor(x, mesh, [Shard(1)]).requires_grad_()
        given = shard.to_local().detach().requires_grad_() if plain else shard
        with CommDebugMode() as comm:
            y = chain(given)
            y.square().sum().backward()
        assert not comm.get_comm_counts(), comm.get_comm_counts()
        assert isinstance(y, DTensor) != plain
        leaf = x.clone().requires_grad_()
        expected = reference(leaf)
        expected.square().sum().backward()
        if plain:
            y, grad = (DTensor.from_local(t, mesh, [Shard(1)]) for t in (y, given.grad))
        assert_same(y, expected, "y")
        assert_same(grad if plain else given.grad, leaf.grad, "gradient of x")
        assert_same_gradients(chain, reference)
    site = bhyt.BHyT(WIDTH).double()
    styled = parallelize_module(copy.deepcopy(site), mesh, SequenceParallel())
    assert_same(styled(shard), site(x), "y under PyTorch's style")
    replicated = distribute_tensor(x, mesh, [Replicate()])
    assert chain.first(replicated).placements == (Shard(1),)
    with pytest.raises(TypeError, match="got Linear"):
        parallelize_module(nn.Linear(2, 2), mesh, bhyt.parallel.SequenceParallelSite())


def test_import_without_distributed() -> None:
    """`import bhyt` and its sites need nothing of torch.distributed.tensor, and do not load it."""
    blocked = "import sys; sys.modules['torch.distributed.tensor'] = None; "
    run = "import torch, bhyt; bhyt.BHyT(4)(torch.ones(2, 4)).sum().backward()"
    subprocess.run([sys.executable, "-c", blocked + run], check=True, cwd=Path(__file__).parent)
