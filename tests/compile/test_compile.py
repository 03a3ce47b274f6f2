"""torch.compile, activation checkpointing and torch.export: no graph breaks, few compiles, the same
answers."""

import functools
import io
from collections import Counter
from typing import Any, Callable, Dict, Iterator, List, Set, Tuple

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import bhyt
from support.checks import same_bits
from support.tolerances import relative_l2

D = 32


class Block(nn.Module):
    """Both sites around small mixing layers, every residual add fused."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = bhyt.BHyT(D, lam=2.0), bhyt.BHyTApprox(D)
        self.second.set_variance_offset(0.25)
        self.mix, self.mlp = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, branch: Tensor, stream: Tensor) -> Tuple[Tensor, Tensor]:
        y, stream, v = self.first.forward_add_with_variance(branch, stream)
        y, stream = self.second.forward_add(self.mix(y), stream, v)
        return self.mlp(y).tanh(), stream


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def inputs(length: int, device: str, seed: int = 0) -> List[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(2, length, D, device=device, requires_grad=True) for _ in range(2)]


def results(function: Callable, block: nn.Module, length: int, device: str) -> Dict[str, Tensor]:
    """Outputs and every gradient, by name."""
    block.zero_grad(set_to_none=True)
    given = inputs(length, device)
    branch, stream = function(*given)
    (branch.square().sum() + stream.square().sum()).backward()
    grads = {name: parameter.grad for name, parameter in block.named_parameters()}
    return {
        "branch": branch.detach(),
        "stream": stream.detach(),
        "x": given[0].grad,
        "r": given[1].grad,
        **grads,
    }


class Graphs:
    """A backend that counts the graphs that run. Dynamo compiles kappa and eps as symbolic floats first, finds that an
    op takes them as they are, and starts over: what it compiled before never runs."""

    def __init__(self) -> None:
        self.used: Set[int] = set()
        self._compile = lookup_backend("aot_eager")

    def __call__(self, graph: torch.fx.GraphModule, inputs: List[Tensor]) -> Callable[..., Any]:
        compiled = self._compile(graph, inputs)

        def run(*args: Any) -> Any:
            self.used.add(id(compiled))
            return compiled(*args)

        return run


def assert_close(actual: Dict[str, Tensor], expected: Dict[str, Tensor]) -> None:
    """The compiler may fuse and reorder what is around the ops: 1e-5, ten float32 roundings of gradients'
    sums."""
    for name, t in expected.items():
        assert relative_l2(actual[name], t.double()) <= 1e-5, name


@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
def test_fullgraph(backend: str, device: str) -> None:
    """One graph for forward and backward; the same bits as eager. USERS row 22."""
    block = Block().to(device)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    actual, expected = results(compiled, block, 8, device), results(block, block, 8, device)
    assert all(same_bits(actual[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("mode, dynamic", (("default", True), ("reduce-overhead", False)))
def test_inductor(mode: str, dynamic: bool, device: str) -> None:
    """Inductor's code around the ops, dynamic and with CUDA graphs, with a length of 1 too. USERS row 22."""
    block = Block().to(device)
    compiled = torch.compile(block, fullgraph=True, mode=mode, dynamic=dynamic)
    for length in (8, 8, 13, 1):
        assert_close(results(compiled, block, length, device), results(block, block, length, device))


def test_dynamic_is_one_graph(device: str) -> None:
    """dynamic=True compiles once for every length. USERS row 22."""
    block, counter = Block().to(device), Graphs()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    for length in (8, 3, 17, 64, 5):
        assert_close(results(compiled, block, length, device), results(block, block, length, device))
    assert len(counter.used) == 1


def test_at_most_two_compiles(device: str) -> None:
    """Ten lengths under the default settings: one compile for the first, one that is dynamic. USERS row
    22."""
    block, counter = Block().to(device), Graphs()
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for length in range(4, 24, 2):
        results(compiled, block, length, device)
    assert 1 <= len(counter.used) <= 2


def test_functional_forms(device: str) -> None:
    """The four functions compile without a break, with no gain and no offset either. USERS row 22."""
    lam = torch.ones(1, device=device)

    def all_four(x: Tensor, r: Tensor) -> Tuple[Tensor, ...]:
        f = bhyt.functional
        y, v = f.forward(x, None, lam)
        return (
            y,
            *f.add_forward(x, r, None, lam),
            f.forward_approx(x, v, None, None, lam),
            *f.add_forward_approx(x, r, v, None, None, lam),
        )

    compiled = torch.compile(all_four, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        given = inputs(4, device)
        assert all(map(same_bits, compiled(*given), all_four(*given)))


def test_compiled_in_bfloat16_with_float32_stream(device: str) -> None:
    """Mixed dtypes and autocast compile to one graph; the stream stays float32. USERS rows 12 and 22."""
    block = Block().to(device)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x, r = inputs(4, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        expected, actual = block(x.bfloat16(), r), compiled(x.bfloat16(), r)
    assert actual[0].dtype == torch.bfloat16 and actual[1].dtype == torch.float32
    assert all(map(same_bits, [t.detach() for t in actual], [t.detach() for t in expected]))


@pytest.mark.parametrize("reentrant", (True, False))
def test_activation_checkpointing(reentrant: bool, device: str) -> None:
    """Both modes give the bits of training without it, alone and under torch.compile. USERS row 24."""
    block = Block().to(device)
    expected = results(block, block, 8, device)

    def checkpointed(*given: Tensor) -> Tuple[Tensor, Tensor]:
        return checkpoint(block, *given, use_reentrant=reentrant)

    actual = results(checkpointed, block, 8, device)
    assert all(same_bits(actual[name], expected[name]) for name in expected)
    if not reentrant:
        compiled = torch.compile(checkpointed, fullgraph=True, backend="aot_eager")
        actual = results(compiled, block, 8, device)
        assert all(same_bits(actual[name], expected[name]) for name in expected)


class Count(TorchDispatchMode):
    """How often each of our ops ran below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "bhyt":
            self.calls[op._schema.name.removeprefix("bhyt::")] += 1
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("saved", (True, False))
def test_selective_checkpointing(saved: bool, device: str) -> None:
    """A policy names the ops: what it saves is not run again, the rest is; the bits stay. USERS row 24."""
    block = Block().to(device)
    expected = results(block, block, 8, device)
    ours = {getattr(torch.ops.bhyt, name).default for name in ("add_forward", "add_forward_approx")}

    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if saved and op in ours else CheckpointPolicy.PREFER_RECOMPUTE

    def checkpointed(*given: Tensor) -> Tuple[Tensor, Tensor]:
        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(block, *given, use_reentrant=False, context_fn=contexts)

    with Count() as count:
        actual = results(checkpointed, block, 8, device)
    assert all(same_bits(actual[name], expected[name]) for name in expected)
    runs = 1 if saved else 2
    assert count.calls == {
        "add_forward": runs, "add_forward_approx": runs, "backward": 1, "backward_approx": 1
    }
    compiled = torch.compile(checkpointed, fullgraph=True, backend="aot_eager")
    actual = results(compiled, block, 8, device)
    assert all(same_bits(actual[name], expected[name]) for name in expected)


@pytest.fixture
def default_setting() -> Iterator[None]:
    yield
    bhyt.decompose_when_compiling("none")


@pytest.mark.parametrize("sites, fused", (("none", 2), ("approximate", 1), ("all", 0)))
def test_decompose_when_compiling(sites: str, fused: int, default_setting: None, device: str) -> None:
    """The setting says which sites stay ops in compiled code; eager ones always do. USERS row 22."""
    block, seen = Block().to(device), []

    def backend(graph: torch.fx.GraphModule, inputs: List[Tensor]) -> Callable:
        seen.append(sum("bhyt" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    expected = results(block, block, 8, device)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for setting, count in (("none", 2), (sites, fused)):  # the second time the same code is compiled anew
        bhyt.decompose_when_compiling(setting)
        assert_close(results(compiled, block, 8, device), expected)
        assert seen[-1] == count
    with Count() as count:
        results(block, block, 8, device)
    assert count.calls["add_forward"] == count.calls["add_forward_approx"] == 1


def test_decompose_when_compiling_refuses_other_values() -> None:
    with pytest.raises(ValueError, match="none, approximate, all.*'everything'"):
        bhyt.decompose_when_compiling("everything")


def test_compiled_autograd(device: str) -> None:
    """A backward traced by compiled autograd gives the same gradients. USERS row 22."""
    block = Block().to(device)
    expected = results(block, block, 8, device)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        actual = results(block, block, 8, device)
    assert all(same_bits(actual[name], expected[name]) for name in expected)


def test_export(device: str) -> None:
    """torch.export with a dynamic length, saved, loaded and run at other lengths: the same bits. USERS row
    23."""
    block = Block().to(device).eval()
    given = tuple(t.detach() for t in inputs(8, device))
    length = torch.export.Dim("length", min=2, max=512)
    program = torch.export.export(block, given, dynamic_shapes=({1: length}, {1: length}))
    assert any("bhyt.add_forward" in str(node.target) for node in program.graph.nodes)
    stream = io.BytesIO()
    torch.export.save(program, stream)
    stream.seek(0)
    loaded = torch.export.load(stream).module()
    with torch.no_grad():
        for n in (8, 5, 100):
            other = tuple(t.detach() for t in inputs(n, device, seed=n))
            assert all(map(same_bits, loaded(*other), block(*other)))


def test_fake_tensors_allocate_nothing() -> None:
    """Shapes and dtypes of every output under FakeTensorMode: a hundred gigabytes cost nothing. USERS row
    22."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(1 << 20, 1 << 16, dtype=torch.bfloat16)
        y, total, v = bhyt.functional.add_forward(x, x.float(), torch.empty(1 << 16), torch.empty(1))
    assert (y.dtype, total.dtype, v.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert y.shape == total.shape == x.shape and v.shape == (1 << 20, 1)
