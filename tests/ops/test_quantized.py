"""The quantised forward ops (docs/ops.md): the integers of float64 arithmetic, and what holds of the six ops beside."""

from dataclasses import dataclass, replace
from typing import Any, Tuple

import pytest
import torch
from torch import Tensor

import bhyt
from support import truth
from support.cases import FORMS, Call, Outputs, make_call
from support.checks import same_bits

F8 = torch.float8_e4m3fn
# dtype, zero point, scale for a bound of 1: those of use, and some that saturate or are fine.
TARGETS = ((torch.int8, 0, 1 / 127), (torch.uint8, 128, 1 / 127), (torch.int8, -77, 3e-3), (torch.uint8, 3, 1e-2),
           (F8, 0, 1 / 448), (F8, 0, 1.0), (F8, 0, 1e-3))  # fmt: skip
# branch, stream
PAIRS = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16),
         (torch.float64, torch.float64), (torch.bfloat16, torch.float32), (torch.float16, torch.float32),
         (torch.float32, torch.float64), (torch.bfloat16, torch.float64), (torch.float16, torch.float64)]  # fmt: skip
every_tier = pytest.mark.every_tier


@dataclass(frozen=True)
class Target:
    """How a call is quantised."""

    dtype: torch.dtype = torch.int8
    zero_point: int = 0
    scale: float = 1 / 127

    def run(self, call: Call, functions: Any = bhyt.functional) -> Outputs:
        """The outputs of the quantised twin of `call`; q in the place of y."""
        out = getattr(functions, call.form + "_quantized")(*self.arguments(call))
        if call.exact:
            return Outputs(*out) if call.adds else Outputs(out[0], None, out[1])
        return Outputs(*out) if call.adds else Outputs(out)

    def arguments(self, call: Call) -> Tuple[Any, ...]:
        *given, kappa, eps = call.arguments()
        return (*given, self.scale, self.zero_point, self.dtype, kappa, eps)

    def limits(self) -> Tuple[float, float]:
        if self.dtype == F8:
            return -448.0, 448.0
        info = torch.iinfo(self.dtype)
        return info.min - self.zero_point, info.max - self.zero_point


def assert_quantized(q: Tensor, y: Tensor, target: Target) -> None:
    """q is the number nearest to the float64 y / scale; either neighbour within 1e-4 of a step of a tie. NaN:
    zero_point, or NaN in float8."""
    assert q.dtype == target.dtype and q.shape == y.shape and q.is_contiguous()
    scaled, q = y / target.scale, q.double() - target.zero_point
    nan = scaled.isnan()
    assert (q[nan].isnan() if target.dtype == F8 else q[nan] == 0).all()
    scaled, q = scaled[~nan].clamp(*target.limits()), q[~nan]
    step = torch.ones_like(scaled)
    if target.dtype == F8:  # 8 steps to a power of two from 2^-6 on
        step = torch.ldexp(step, torch.frexp(scaled)[1].clamp_min(-5) - 4)
    off = (q - scaled).abs() / step
    assert not (off > 0.5 + 1e-4).any(), f"{target}: {off.max().item():.5f} steps from {scaled[off.argmax()].item()}"


def check(call: Call, target: Target) -> Outputs:
    """q against float64; sum and variance with the bits of the unquantised op."""
    out, plain = target.run(call), call.run()
    assert_quantized(out.y, truth.outputs(call).y, target)
    assert same_bits(out.sum, plain.sum) and same_bits(out.variance, plain.variance)
    return out


@every_tier
@pytest.mark.parametrize("form", FORMS)
def test_integers_of_float64(form: str, device: str) -> None:
    """Every pair of dtypes, target and size, with and without a gain."""
    for n, (branch, stream) in enumerate(PAIRS):
        if branch != stream and "add" not in form:
            continue
        for m, target in enumerate(Target(*t) for t in TARGETS):
            for d in (1, 15, 64, 77 + m, 3000):
                weight = (None, torch.float32, stream, torch.float16)[(n + m + d) % 4]
                check(make_call(form, (3, d), branch, device, stream=stream, weight=weight), target)


@every_tier
@pytest.mark.parametrize("rows,lam,kappa", (("normal", 30.0, 1.0), ("outlier", 2.0, 10.0), ("scales", 2.0, 1.0),
                                            ("constant", 2.0, 10.0), ("normal", 1e-3, 10.0)))  # fmt: skip
def test_stressed_rows(rows: str, lam: float, kappa: float, device: str) -> None:
    """Saturated rows among them, which are at the limits of the type or of the scale."""
    for form in FORMS:
        for dtype in (torch.float32, torch.bfloat16):
            for target in (Target(*t) for t in TARGETS):
                check(make_call(form, (4, 333), dtype, device, rows=rows, lam=lam, kappa=kappa, weight=None), target)


@every_tier
@pytest.mark.parametrize("large", (1.0, -1.0))
@pytest.mark.parametrize("place", (0, 40, 77))
def test_one_gain_beyond_the_limits(large: float, place: int, device: str) -> None:
    """One column of y passes a limit of the type and is clamped. The others fit."""
    for dtype in (torch.float32, torch.bfloat16):
        call = make_call("forward", (6, 78), dtype, device, lam=30.0, kappa=1.0)
        weight = torch.full((78,), 0.2, device=device)
        weight[place] = large
        for target in (Target(zero_point=0), Target(zero_point=96), Target(zero_point=-96), Target(torch.uint8, 32)):
            check(replace(call, weight=weight), target)


@every_tier
def test_many_values(device: str) -> None:
    """A quarter of a million elements of each 8-bit type: every number but -128 or NaN is among them."""
    call = make_call("forward", (64, 4096), torch.float32, device, lam=20.0, weight=None)
    small = replace(call, x=call.x * torch.rand_like(call.x).mul(-20).exp2())
    for rows, target in ((call, Target()), (call, Target(torch.uint8, 128)), (small, Target(F8, 0, 1 / 448))):
        numbers = check(rows, target).y.view(torch.uint8).unique().numel()
        assert numbers == (254 if target.dtype == F8 else 255)


@every_tier
def test_every_tie_is_approached(device: str) -> None:
    """A million arguments of tanh up to 2, the scale such that all steps are taken below 1, or below 2."""
    x = torch.linspace(-2, 2, 1 << 20, device=device).view(64, -1)
    ones = {"lam": torch.ones(1, device=device), "variance": torch.ones(64, 1, device=device)}
    for scale in (0.7615941559557649 / 127, 0.9640275800758169 / 127):
        check(Call(x=x, kappa=1.0, eps=0.0, **ones), Target(scale=scale))


@every_tier
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_ties_go_to_even(dtype: torch.dtype, device: str) -> None:
    """y = +-1 exactly, over scales that leave halves: rounded to even before the zero point is added."""
    if dtype == torch.float32 and device == "cpu" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("float32 rows are worked in float64, where their tanh is not quite 1")
    x = torch.tensor([[1e4, -1e4, 0.0]], dtype=dtype, device=device)
    weight = torch.tensor([2.5, 1.5, 1.0], device=device)
    call = Call(x=x, lam=torch.tensor([1e6], device=device), weight=weight)
    for zero in (0, 1, -2):
        assert Target(torch.int8, zero, 1.0).run(call).y.tolist() == [[2 + zero, -2 + zero, zero]]
    eighths = replace(call, weight=torch.tensor([1.0625, 1.1875, 1.0], device=device))  # halfway between eighths
    assert Target(F8, 0, 1.0).run(eighths).y.float().tolist() == [[1.0, -1.25, 0.0]]


@every_tier
@pytest.mark.parametrize("form", FORMS)
def test_nan_and_infinity_stay_in_their_row(form: str, device: str) -> None:
    """q of a NaN is zero_point, NaN in float8; other rows keep their bits. A zero row is zero_point."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for target in (Target(zero_point=5), Target(torch.uint8, 128), Target(F8, 0, 1 / 448)):
            good = make_call(form, (5, 77), dtype, device)
            for column, value in ((0, float("nan")), (76, float("nan")), (17, float("inf"))):
                bad = replace(good, x=good.x.clone())
                bad.x[2, column] = value
                out, expected = check(bad, target), target.run(good)
                others = [0, 1, 3, 4]
                assert same_bits(out.y.view(torch.uint8)[others], expected.y.view(torch.uint8)[others])
            zero = replace(good, x=torch.zeros_like(good.x), residual=None if not good.adds else 0 * good.residual)
            assert (check(zero, target).y.float() == target.zero_point).all()


@every_tier
def test_gains_that_are_not_finite(device: str) -> None:
    """A NaN times anything is zero_point, infinity saturates; neither changes another column."""
    call = make_call("forward", (4, 40), device=device)
    weight = call.weight.clone()
    weight[3], weight[5] = float("nan"), float("-inf")
    for target in (Target(), Target(F8, 0, 1 / 448)):
        check(replace(call, weight=weight), target)


LAYOUTS = {
    "offset": lambda t: torch.cat([t.new_zeros(3), t.flatten()])[3:].view(t.shape),
    "row stride": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda t: t[:1].expand(t.shape),
}


@every_tier
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_layouts(form: str, layout: str, device: str) -> None:
    """Strided and unaligned inputs of any rank: the bits of contiguous ones."""
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((6, 50), (2, 3, 65)):
            call = make_call(form, shape, dtype, device)
            rows = {"x": call.x} | ({"residual": call.residual} if call.adds else {})
            moved = {name: LAYOUTS[layout](t) for name, t in rows.items()}
            dense = {name: t.contiguous() for name, t in moved.items()}
            for target in (Target(torch.uint8, 128), Target(F8, 0, 1 / 448)):
                a, b = target.run(replace(call, **moved)), target.run(replace(call, **dense))
                assert all(map(same_bits, a, b)) and a.y.is_contiguous()


@pytest.mark.parametrize("form", FORMS)
def test_empty(form: str, device: str) -> None:
    for shape in ((0, 8), (3, 0), (2, 0, 4)):
        out = Target().run(make_call(form, shape, device=device))
        assert out.y.shape == shape and out.y.dtype == torch.int8


@every_tier
@pytest.mark.parametrize("form", FORMS)
def test_batches_and_threads(form: str, device: str) -> None:
    """A row has the same bits alone, in any batch, with any number of threads, always; inputs are not written."""
    for dtype in (torch.float32, torch.bfloat16):
        call = make_call(form, (300, 260), dtype, device)
        before = [t.clone() for t in call.differentiable().values()]
        for target in (Target(), Target(F8, 0, 1 / 448)):
            torch.set_num_threads(1)
            whole = target.run(call)
            torch.set_num_threads(3)
            assert all(map(same_bits, whole, target.run(call)))
            for i in (0, 7, 299):
                row = {name: getattr(call, name)[i : i + 1] for name in ("x", "residual", "variance")
                       if getattr(call, name) is not None}  # fmt: skip
                alone = target.run(replace(call, **row))
                assert all(a is None or same_bits(a[i : i + 1], b) for a, b in zip(whole, alone))
        assert all(map(same_bits, before, call.differentiable().values()))


def test_large_tensors_prefetch(device: str) -> None:
    """Beyond the size at which the CPU loops begin to prefetch."""
    for form in ("forward", "add_forward_approx"):
        check(make_call(form, (700, 1100), torch.float32, device), Target())
