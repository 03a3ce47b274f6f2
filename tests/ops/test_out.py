"""The overloads that write into given memory: the same bits, in place too; compiled; what they refuse."""

from typing import Any, Dict, List, Tuple

import pytest
import torch
from torch import Tensor

from support.cases import FORMS, Call, Outputs, make_call
from support.checks import same_bits

MIXES = [
    ((5, 33), torch.float32, None),
    ((2, 3, 64), torch.bfloat16, torch.float32),
    ((4, 2048), torch.bfloat16, None),
    ((3, 40), torch.float64, None),
    ((1, 8), torch.float16, None),
    ((0, 8), torch.float32, None),
    ((3, 0), torch.float32, None),
]
mixes = pytest.mark.parametrize("shape, dtype, stream", MIXES, ids=str)
forms = pytest.mark.parametrize("form", FORMS)


def overload(call: Call) -> Any:
    return getattr(torch.ops.bhyt, call.form).out


def named(outputs: Outputs) -> Dict[str, Tensor]:
    return {name: t for name, t in outputs._asdict().items() if t is not None}


def fresh(call: Call) -> Dict[str, Tensor]:
    """Outputs of the right shapes and dtypes, full of NaN."""
    return {name: torch.full_like(t, float("nan")) for name, t in named(call.run()).items()}


@pytest.mark.every_tier
@forms
@mixes
def test_same_bits(form: str, shape: Tuple[int, ...], dtype: torch.dtype, stream: Any, device: str) -> None:
    """The outputs given hold the bits of the op without outputs, and are what the call returns."""
    call = make_call(form, shape, dtype, device, stream=stream)
    into = fresh(call)
    returned = overload(call)(*call.arguments(), **into)
    returned = (returned,) if isinstance(returned, Tensor) else returned
    assert all(a is b for a, b in zip(returned, into.values()))
    for name, expected in named(call.run()).items():
        assert same_bits(into[name], expected)


@pytest.mark.every_tier
@forms
@mixes
def test_in_place(form: str, shape: Tuple[int, ...], dtype: torch.dtype, stream: Any, device: str) -> None:
    """y may be written over x and sum over residual. Both tensors count the write."""
    call = make_call(form, shape, dtype, device, stream=stream)
    expected, into = named(call.run()), fresh(call)
    into["y"] = call.x
    if call.residual is not None:
        into["sum"] = call.residual
    before = call.x._version
    overload(call)(*call.arguments(), **into)
    assert call.x._version == before + 1
    for name, output in expected.items():
        assert same_bits(into[name], output)


@pytest.mark.slow
@forms
def test_compiled(form: str, device: str) -> None:
    """Under torch.compile a write is functionalized: the caller's tensors hold what the eager call writes."""
    call = make_call(form, (4, 16), device=device)
    expected, into = named(call.run()), fresh(call)
    into["y"] = call.x

    @torch.compile(fullgraph=True)
    def doubled(arguments: List[Any], into: Dict[str, Tensor]) -> Tensor:
        overload(call)(*arguments, **into)
        return into["y"] * 2

    result = doubled(call.arguments(), into)
    assert same_bits(result, expected["y"] * 2)
    for name, output in expected.items():
        assert same_bits(into[name], output)


@forms
def test_opcheck(form: str, device: str) -> None:
    """opcheck: the schema's mutations, fake tensors, functionalization."""
    call = make_call(form, (3, 9), device=device)
    torch.library.opcheck(overload(call), tuple(call.arguments()), fresh(call))


@forms
def test_outputs_that_do_not_fit(form: str, device: str) -> None:
    """No output is resized, cast or written through strides. The message names the output."""
    call = make_call(form, (4, 6), device=device)
    for name, right in fresh(call).items():
        transposed = torch.empty(*reversed(right.shape), device=device).t()
        wrong: List[Tuple[Tensor, type, str]] = [
            (right[:3].clone(), ValueError, "expected shape"),
            (right.double(), TypeError, "expected dtype float32, got float64"),
            (right.to("meta"), ValueError, "expected device"),
        ]
        if name != "variance":
            wrong.append((transposed, ValueError, "expected a contiguous tensor"))
        for tensor, error, message in wrong:
            with pytest.raises(error, match=f"bhyt: {name}: {message}"):
                overload(call)(*call.arguments(), **{**fresh(call), name: tensor})


@forms
def test_overlaps(form: str, device: str) -> None:
    """An output that shares memory with an input, or with another output, is refused and nothing is written."""
    call = make_call(form, (4, 6), device=device)
    memory = torch.zeros(64, device=device)
    shifted = memory[6:30].view(4, 6).copy_(call.x)
    given = {"weight": call.weight, "residual": call.residual, "variance": call.variance, "lam": call.lam}
    for name, tensor in given.items():
        if tensor is None:
            continue
        around = torch.zeros(64, device=device)
        lying = around[2 : 2 + tensor.numel()].view(tensor.shape).copy_(tensor)
        arguments = [lying if a is tensor else a for a in call.arguments()]
        before = around.clone()
        with pytest.raises(ValueError, match=f"bhyt: y: expected memory of its own.*it overlaps {name}"):
            overload(call)(*arguments, **{**fresh(call), "y": around[:24].view(4, 6)})
        assert same_bits(around, before)
    arguments = [shifted if a is call.x else a for a in call.arguments()]
    with pytest.raises(ValueError, match="bhyt: y: .*it overlaps x"):  # rows of x behind those that are written
        overload(call)(*arguments, **{**fresh(call), "y": memory[:24].view(4, 6)})
    if call.residual is not None:
        into = fresh(call)
        with pytest.raises(ValueError, match="bhyt: sum: .*it overlaps y"):
            overload(call)(*call.arguments(), **{**into, "sum": into["y"]})
        with pytest.raises(ValueError, match="bhyt: sum: .*it overlaps x"):
            overload(call)(*call.arguments(), **{**into, "sum": call.x})


@forms
def test_no_graph(form: str, device: str) -> None:
    """A call that would have to be recorded, or transformed, is refused; under no_grad it runs."""
    call = make_call(form, (4, 6), device=device)
    into = fresh(call)
    arguments = call.requiring_grad().arguments()
    with pytest.raises(RuntimeError, match=f"bhyt: {form}.out: not differentiable"):
        overload(call)(*arguments, **into)
    with pytest.raises(RuntimeError, match=f"bhyt: {form}.out: not differentiable"):
        overload(call)(*call.arguments(), **{**into, "y": into["y"].clone().requires_grad_()})
    with torch.no_grad():
        overload(call)(*arguments, **into)
    assert same_bits(into["y"], call.run().y)
    with pytest.raises(NotImplementedError, match=f"bhyt: {form}.out: not under functorch transforms"):
        torch.func.grad(lambda lam: (overload(call)(*call.arguments(), **into), lam.sum())[1])(call.lam)
    batched = {name: t.expand(2, *t.shape).clone() for name, t in into.items()}
    torch.func.vmap(lambda x, into: overload(call)(x, *call.arguments()[1:], **into), (None, 0))(call.x, batched)
    for name, expected in named(call.run()).items():
        torch.testing.assert_close(batched[name], expected.expand_as(batched[name]))
