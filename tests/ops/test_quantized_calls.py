"""The quantised ops as ops: opcheck, reference and composite, no gradients, errors, compilers."""

from dataclasses import replace
from typing import Any, Dict, Optional, Tuple

import pytest
import torch
from torch import Tensor

import bhyt
from support import truth
from support.cases import FORMS, Call, make_call
from support.checks import same_bits
from test_quantized import F8, Target, assert_quantized


@pytest.mark.parametrize("overload", ("default", "explicit"))
@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form: str, overload: str, device: str) -> None:
    """Schema, fake tensors, AOT with dynamic shapes."""
    op = getattr(getattr(torch.ops.bhyt, form + "_quantized"), overload)
    for shape, dtype, stream in (((4, 16), torch.float32, torch.float32), ((2, 3, 5), torch.bfloat16, torch.float32)):
        for target in (Target(), Target(F8, 0, 1 / 448)):
            torch.library.opcheck(op, target.arguments(make_call(form, shape, dtype, device, stream=stream)))


@pytest.mark.parametrize("form", FORMS)
def test_reference_and_composite(form: str) -> None:
    """The formulas in float64 and under vmap give what the kernels are held to."""
    for target in (Target(torch.uint8, 128), Target(torch.int8, -77, 3e-3), Target(F8, 0, 1 / 448)):
        call = make_call(form, (4, 50), torch.float64)
        true = truth.outputs(call).y
        assert_quantized(target.run(call, bhyt.reference).y, true, target)
        op = getattr(torch.ops.bhyt, form + "_quantized")
        rows = [call.x, call.residual] if call.adds else [call.x]
        rows += [] if call.exact else [call.variance]

        def one(*given: Tensor, op: Any = op, target: Target = target, call: Call = call) -> Tensor:
            named = dict(zip([n for n in ("x", "residual", "variance") if getattr(call, n) is not None], given))
            out = op(*target.arguments(replace(call, **named)))
            return out[0] if isinstance(out, tuple) else out

        if target.dtype != F8:  # vmap has no batching rule for what casts to it
            assert_quantized(torch.vmap(one)(*rows), true, target)


def test_composite_is_what_other_backends_run() -> None:
    """On the CPU too, when its own key is left out."""
    op = torch.ops.bhyt.forward_quantized.explicit
    call = make_call("forward", (5, 60))
    for target in (Target(), Target(torch.uint8, 128), Target(F8, 0, 1 / 448)):
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradCPU)):
            q, _ = op._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *target.arguments(call))
        assert_quantized(q, truth.outputs(call).y, target)


@pytest.mark.parametrize("form", FORMS)
def test_no_gradients(form: str, device: str) -> None:
    """Recording a graph is an error; without one, tensors that require grad are fine."""
    call = make_call(form, (4, 6), device=device)
    for name in call.differentiable():
        with pytest.raises(RuntimeError, match=f"bhyt: {form}_quantized: not differentiable"):
            Target().run(call.requiring_grad([name]))
    with torch.no_grad():
        assert same_bits(Target().run(call.requiring_grad()).y, Target().run(call).y)
    with pytest.raises(RuntimeError, match="not differentiable"):
        torch.func.jvp(lambda x: Target().run(replace(call, x=x)).y.float(), (call.x,), (call.x,))


FAULTS: Dict[str, Tuple[Dict[str, Any], type, Tuple[str, ...]]] = {
    "no scale": ({"scale": 0.0}, ValueError, ("scale:", "> 0", "0")),
    "negative scale": ({"scale": -1.0}, ValueError, ("scale:", "> 0", "-1")),
    "NaN": ({"scale": float("nan")}, ValueError, ("scale:", "nan")),
    "infinity": ({"scale": float("inf")}, ValueError, ("scale:", "inf")),
    "int32": ({"dtype": torch.int32}, TypeError, ("dtype:", "int8, uint8 or float8_e4m3fn", "int32")),
    "float32": ({"dtype": torch.float32}, TypeError, ("dtype:", "float32")),
    "e5m2": ({"dtype": torch.float8_e5m2}, TypeError, ("dtype:", "Float8_e5m2")),
    "int8 of 128": ({"zero_point": 128}, ValueError, ("zero_point:", "-128 to 127", "int8", "128")),
    "uint8 of -1": ({"zero_point": -1, "dtype": torch.uint8}, ValueError, ("zero_point:", "0 to 255", "uint8", "-1")),
    "float8 of 1": ({"zero_point": 1, "dtype": F8}, ValueError, ("zero_point:", "0 to 0", "float8_e4m3fn", "1")),
}


@pytest.mark.parametrize("where", ("cpu", "meta", pytest.param("cuda", marks=pytest.mark.gpu)))
@pytest.mark.parametrize("fault", FAULTS)
def test_errors(fault: str, where: str) -> None:
    """One line that names the argument, what was expected and what was given; of the site's arguments too."""
    changes, error, message = FAULTS[fault]
    for form in FORMS:
        call = make_call(form, (4, 6), device="cpu")
        names = ("x", "lam", "weight", "residual", "variance", "offset")
        call = replace(call, **{n: getattr(call, n).to(where) for n in names
                                if getattr(call, n) is not None})  # fmt: skip
        with pytest.raises(error) as raised:
            replace(Target(), **changes).run(call)
        text = str(raised.value).splitlines()[0]
        assert text.startswith("bhyt: ") and all(part in text for part in message), text
        with pytest.raises(ValueError, match="bhyt: lam: expected one element"):
            Target().run(replace(call, lam=torch.zeros(2, device=where)))


def test_compiled_and_exported(device: str) -> None:
    """torch.compile with dynamic shapes and torch.export see one op, with the bits of the eager one."""
    call = make_call("add_forward", (6, 64), device=device)

    def site(x: Tensor, residual: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        return bhyt.functional.add_forward_quantized(x, residual, call.weight, call.lam, 1 / 127, 128, torch.uint8)

    expected = site(call.x, call.residual)
    compiled = torch.compile(site, fullgraph=True, dynamic=True, backend="aot_eager")
    assert all(map(same_bits, compiled(call.x, call.residual), expected))

    class Site(torch.nn.Module):
        def forward(self, x: Tensor, residual: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
            return site(x, residual)

    exported = torch.export.export(Site(), (call.x, call.residual))
    assert all(map(same_bits, exported.module()(call.x, call.residual), expected))
    assert "add_forward_quantized" in exported.graph_module.code


@pytest.mark.parametrize("form", FORMS)
def test_overloads(form: str) -> None:
    """`explicit` has the arguments of the op without their defaults, and is what a graph below autograd holds,
    whole."""
    packet, call = getattr(torch.ops.bhyt, form + "_quantized"), make_call(form, (4, 16))
    default, explicit = packet.default._schema, packet.explicit._schema
    assert not explicit.is_mutable and all(a.alias_info is None for a in (*explicit.arguments, *explicit.returns))
    assert [(a.name, str(a.type)) for a in explicit.arguments] == [(a.name, str(a.type)) for a in default.arguments]
    assert [(r.name, str(r.type)) for r in explicit.returns] == [(r.name, str(r.type)) for r in default.returns]
    assert [a.name for a in default.arguments if a.has_default_value()] == ["zero_point", "dtype", "kappa", "eps"]
    assert not any(a.has_default_value() for a in explicit.arguments)

    *given, _, _ = call.arguments()

    class Site(torch.nn.Module):
        def forward(self, *rows: Optional[Tensor]) -> Any:
            return packet(*rows, 1 / 127)

    program = torch.export.export(Site(), tuple(given)).run_decompositions()
    (node,) = [node for node in program.graph.nodes if str(node.target).startswith("bhyt.")]
    assert node.target == packet.explicit and node.args[-5:] == (1 / 127, 0, torch.int8, 10.0, 1e-6)
