"""Wrong input is a Python error that names the argument, what was expected and what was given (SPEC.md
section 3)."""

from dataclasses import replace
from typing import Any, Dict, List, NamedTuple, Tuple

import pytest
import torch

from support.cases import FORMS, Call, make_call, make_upstream
from support.checks import same_bits

SHAPE = (4, 6)


class Fault(NamedTuple):
    """Arguments replaced, the exception, and what its message must contain."""

    changes: Dict[str, Any]
    error: type
    message: Tuple[str, ...]


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype, device=device)


EVERYWHERE = [
    Fault({"x": zeros(4, 6, dtype=torch.int64)}, TypeError, ("x:", "float32", "int64")),
    Fault({"x": zeros(4, 6, dtype=torch.bool)}, TypeError, ("x:", "float32", "bool")),
    Fault({"x": zeros(4, 6, dtype=torch.complex64)}, TypeError, ("x:", "float32", "complex64")),
    Fault({"x": zeros(4, 6).to(torch.float8_e4m3fn)}, TypeError, ("x:", "float32", "float8_e4m3fn")),
    Fault({"weight": zeros(6, dtype=torch.int32)}, TypeError, ("weight:", "float32", "int32")),
    Fault({"weight": zeros(5)}, ValueError, ("weight:", "[6]", "[5]")),
    Fault({"weight": zeros(1)}, ValueError, ("weight:", "[6]", "[1]")),
    Fault({"weight": zeros(1, 6)}, ValueError, ("weight:", "[6]", "[1, 6]")),
    Fault({"lam": zeros(2)}, ValueError, ("lam:", "one element", "[2]")),
    Fault({"lam": zeros(0)}, ValueError, ("lam:", "one element", "[0]")),
    Fault({"lam": zeros(1, dtype=torch.int64)}, TypeError, ("lam:", "float32", "int64")),
    Fault({"kappa": 0.0}, ValueError, ("kappa:", "> 0", "0")),
    Fault({"kappa": -10.0}, ValueError, ("kappa:", "> 0", "-10")),
    Fault({"kappa": float("nan")}, ValueError, ("kappa:", "> 0", "nan")),
    Fault({"eps": -1e-6}, ValueError, ("eps:", ">= 0", "-1e-06")),
    Fault({"eps": float("nan")}, ValueError, ("eps:", ">= 0", "nan")),
]
ADDING = [
    Fault({"residual": zeros(4, 5)}, ValueError, ("residual:", "[4, 6]", "[4, 5]")),
    Fault({"residual": zeros(1, 6)}, ValueError, ("residual:", "[4, 6]", "[1, 6]")),
    Fault({"residual": zeros(6)}, ValueError, ("residual:", "[4, 6]", "[6]")),
    Fault({"residual": zeros(4, 6, dtype=torch.bfloat16)}, TypeError, ("residual:", "float32", "bfloat16")),
    Fault({"residual": zeros(4, 6, dtype=torch.int64)}, TypeError, ("residual:", "int64")),
]
APPROXIMATE = [
    Fault({"variance": zeros(4, 2)}, ValueError, ("variance:", "[..., 1]", "[4, 2]")),
    Fault({"variance": zeros(4)}, ValueError, ("variance:", "[..., 1]", "[4]")),
    Fault({"variance": zeros(3, 1)}, ValueError, ("variance:", "[4, 6]", "[3, 1]")),
    Fault({"variance": zeros(4, 1, dtype=torch.float64)}, TypeError, ("variance:", "float32", "float64")),
    Fault({"variance": zeros(4, 1, dtype=torch.bfloat16)}, TypeError, ("variance:", "float32", "bfloat16")),
    Fault({"offset": zeros(2)}, ValueError, ("variance_offset:", "one element", "[2]")),
    Fault({"offset": zeros(1, dtype=torch.int64)}, TypeError, ("variance_offset:", "int64")),
]


def faults(call: Call) -> List[Fault]:
    return EVERYWHERE + (ADDING if call.adds else []) + ([] if call.exact else APPROXIMATE)


def to(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def assert_raises(fault: Fault, function) -> None:
    with pytest.raises(fault.error) as raised:
        function()
    text = str(raised.value).splitlines()[0]
    assert text.startswith("bhyt: "), text
    missing = [part for part in fault.message if part not in text]
    assert not missing, f"{missing} not in: {text}"


@pytest.mark.parametrize("requires_grad", (False, True))
@pytest.mark.parametrize("form", FORMS)
def test_forwards(form: str, requires_grad: bool, device: str) -> None:
    """Each malformed argument of the four forwards, with and without a graph; nothing is modified."""
    call = make_call(form, SHAPE, device=device)
    before = [t.clone() for t in call.differentiable().values()]
    for fault in faults(call):
        wrong = replace(call, **{name: to(value, device) for name, value in fault.changes.items()})
        if requires_grad:
            wrong = replace(
                wrong, lam=wrong.lam.float().requires_grad_() if "lam" not in fault.changes else wrong.lam
            )
        assert_raises(fault, wrong.run)
    assert all(map(same_bits, before, call.differentiable().values()))


@pytest.mark.parametrize("form", FORMS)
def test_meta_checks_the_same(form: str) -> None:
    """The same errors without data: under fake tensors a wrong call fails when traced, not when run."""
    call = make_call(form, SHAPE)
    meta = {name: getattr(call, name) for name in ("x", "residual", "variance", "offset", "weight", "lam")}
    for fault in faults(call):
        wrong = replace(
            call, **{name: to(value, "meta") for name, value in {**meta, **fault.changes}.items()}
        )
        assert_raises(fault, wrong.run)


@pytest.mark.parametrize("form", FORMS)
def test_scalars_are_no_rows(form: str, device: str) -> None:
    """x without dimensions."""
    call = make_call(form, (1,), device=device)
    rows = {
        name: torch.tensor(1.0, device=device)
        for name in ("x", "residual")
        if getattr(call, name) is not None
    }
    assert_raises(Fault({}, ValueError, ("x:", "[..., d]", "scalar")), replace(call, **rows).run)


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_kinds_do_not_mix(form: str, device: str) -> None:
    """float16 and bfloat16 are not one wider than the other."""
    if "add" not in form:
        pytest.skip("only adding forms have two streams")
    for x, residual in ((torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)):
        call = make_call(form, SHAPE, x, device, stream=residual)
        assert_raises(Fault({}, TypeError, ("residual:", "float16", "bfloat16")), call.run)


@pytest.mark.parametrize("form", FORMS)
def test_devices(form: str) -> None:
    """Each tensor on another device than x: meta beside cpu needs no GPU."""
    call = make_call(form, SHAPE)
    for name in ("residual", "variance", "offset", "weight", "lam"):
        tensor = getattr(call, name)
        if tensor is None:
            continue
        argument = "variance_offset" if name == "offset" else name
        fault = Fault({}, ValueError, (f"{argument}:", "cpu", "meta"))
        assert_raises(fault, replace(call, **{name: tensor.to("meta")}).run)


def backward_arguments(call: Call) -> Tuple[Any, Dict[str, Any]]:
    """The backward op of `call`'s form, with arguments by name."""
    upstream = make_upstream(call)
    named = {"grad_y": upstream.y}
    if call.exact:
        named["grad_variance"] = upstream.variance
    named.update(grad_sum=torch.ones_like(call.x), x=call.x)
    named["variance"] = call.x.square().mean(-1, keepdim=True) if call.exact else call.variance
    if not call.exact:
        named["variance_offset"] = call.offset
    named.update(weight=call.weight, lam=call.lam, kappa=call.kappa, eps=call.eps)
    named["output_mask"] = [True] * (3 if call.exact else 4)
    return torch.ops.bhyt.backward if call.exact else torch.ops.bhyt.backward_approx, named


@pytest.mark.parametrize("form", ("forward", "forward_approx"))
def test_backwards(form: str, device: str) -> None:
    """Each malformed argument of the two backwards."""
    call = make_call(form, SHAPE, device=device)
    op, named = backward_arguments(call)
    renamed = [
        Fault({"variance_offset": f.changes["offset"]}, *f[1:]) for f in APPROXIMATE if "offset" in f.changes
    ]
    variance = [fault for fault in APPROXIMATE if "variance" in fault.changes]
    wrong = (
        [fault for fault in EVERYWHERE if "x" not in fault.changes]
        + variance
        + ([] if call.exact else renamed)
    )
    wrong += [
        Fault({"grad_y": zeros(4, 5)}, ValueError, ("grad_y:", "[4, 6]", "[4, 5]")),
        Fault({"grad_y": zeros(4, 6, dtype=torch.int64)}, TypeError, ("grad_y:", "int64")),
        Fault({"grad_sum": zeros(6)}, ValueError, ("grad_sum:", "[4, 6]", "[6]")),
        Fault({"grad_sum": zeros(4, 6, dtype=torch.float64)}, TypeError, ("grad_sum:", "float32", "float64")),
        Fault({"x": zeros(4, 6, dtype=torch.int64)}, TypeError, ("x:", "int64")),
        Fault({"grad_y": zeros(4, 6, device="meta")}, ValueError, ("grad_y:", device, "meta")),
    ]
    if call.exact:
        wrong.append(
            Fault({"grad_variance": zeros(4, 6)}, ValueError, ("grad_variance:", "[..., 1]", "[4, 6]"))
        )
    for fault in wrong:
        moved = {k: v if getattr(v, "is_meta", False) else to(v, device) for k, v in fault.changes.items()}
        assert_raises(fault, lambda: op(*{**named, **moved}.values()))


@pytest.mark.parametrize("form", FORMS)
def test_not_tensors(form: str) -> None:
    """Something else than a tensor is refused before any kernel, naming the argument."""
    call = make_call(form, SHAPE)
    for name, value in (("x", [1.0, 2.0]), ("lam", "two"), ("weight", 1.0)):
        with pytest.raises((TypeError, RuntimeError), match=f"'?{name}'?"):
            replace(call, **{name: value}).run()


@pytest.mark.parametrize("name", ("x", "residual", "variance", "weight", "lam", "offset"))
def test_freed_storage(name: str, device: str) -> None:
    """A tensor whose storage was freed, as sharding libraries do, is an error and no crash."""
    for form in FORMS:
        call = make_call(form, SHAPE, device=device)
        if getattr(call, name) is not None:
            getattr(call, name).untyped_storage().resize_(0)
            with pytest.raises(ValueError, match="storage has been freed"):
                call.run()
