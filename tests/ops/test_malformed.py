"""Malformed calls by the thousand.

    python -m ops.test_malformed 17 18    makes number 17 alone, in the folder tests
"""

import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from support import truth
from support.cases import DTYPES, FORMS, Call, make_call, make_upstream
from support.checks import same_bits
from support.paths import TESTS

LONG = "BHYT_EXAMPLES" in os.environ
EXAMPLES = int(os.environ.get("BHYT_EXAMPLES", "300"))
OPS = (*FORMS, "backward", "backward_approx")
# What docs/ops.md forbids of any tensor, and of the numbers: the error is ours and names the argument.
FORBIDDEN: Dict[str, Callable[[Tensor], Any]] = {
    **{
        str(dtype): lambda t, dtype=dtype: t.to(dtype)
        for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e5m2)
    },
    "conjugate": lambda t: t.to(torch.complex64).conj(),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "two more columns": lambda t: t.new_ones(*t.shape[:-1], t.shape[-1] + 2 if t.dim() else 3),
    "no element": lambda t: t.new_empty(0),
    "meta": lambda t: t.to("meta"),
}
# What is refused somewhere, by bhyt or by torch, or else is taken and must come out right.
UNUSUAL: Dict[str, Callable[[Tensor], Any]] = {
    **{str(dtype): lambda t, dtype=dtype: t.to(dtype) for dtype in DTYPES},
    "one more dimension": lambda t: t.unsqueeze(0),
    "one dimension less": lambda t: t[0].clone() if t.dim() else t.reshape(1),
    "one row": lambda t: t[:1] if t.dim() else t,
    "transposed": lambda t: t.mT if t.dim() > 1 else t,
    "by columns": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "expanded": lambda t: t[..., :1].expand(t.shape) if t.dim() else t,
    "coo": lambda t: t.to_sparse(),
    "csr": lambda t: t.to_sparse_csr() if t.dim() == 2 else t.to_sparse(),
    "mkldnn": lambda t: t.float().to_mkldnn() if t.dim() and torch.backends.mkldnn.is_available() else t,
    "nested": lambda t: torch.nested.nested_tensor([t]),
    "jagged": lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged) if t.dim() else t,
    "negative bit": lambda t: torch._neg_view(-t),
    "zero": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "inference": lambda t: torch.inference_mode()(t.clone)(),
    "leaf": lambda t: t.clone().requires_grad_(),
    "view of a leaf": lambda t: t.clone().requires_grad_().view(t.shape),
    "parameter": torch.nn.Parameter,
    "None": lambda t: None,
    "list": lambda t: t.tolist(),
    "text": lambda t: "x",
    "number": lambda t: 2.0,
    "class": lambda t: Tensor,
}
NAN, INF = float("nan"), float("inf")
FORBIDDEN_NUMBERS = {"kappa": (0.0, -10.0, NAN, -INF), "eps": (-1e-6, NAN, -INF)}
UNUSUAL_VALUES = {
    "kappa": (INF, 1e-30, 1e30, 3, True, torch.tensor(10.0), "x", None, 1j),
    "eps": (INF, 1e30, 0, 1, torch.tensor(1e-3), "x", None, [1e-6]),
    "output_mask": ([], [True], [False] * 3, [True] * 4, [True] * 5, True, None, "abc", [1, 0, 1], [None] * 3),
}


def valid_arguments(op: str, chance: random.Random) -> Dict[str, Any]:
    """Arguments of `op` by name, all right."""
    dtype = chance.choice(DTYPES)
    form = op.replace("backward", "forward")
    call = make_call(form, (4, 6), dtype, stream=torch.float64 if chance.random() < 0.2 and "add" in op else None)
    upstream = make_upstream(call)
    variance = truth.mean_square(call.x).to(call.accumulate) if call.exact else call.variance
    named = {
        **{name: getattr(call, name) for name in ("x", "residual", "weight", "lam", "kappa", "eps")},
        "variance": variance,
        "variance_offset": call.offset,
        "grad_y": upstream.y,
        "grad_variance": upstream.variance,
        "grad_sum": torch.ones_like(call.x),
        "output_mask": [True] * (3 if call.exact else 4),
    }
    return {argument.name: named[argument.name] for argument in getattr(torch.ops.bhyt, op).default._schema.arguments}


def kinds_of(name: str, value: Any) -> Dict[str, Tuple[bool, Callable[[Any], Any]]]:
    """What may be done to an argument, by name: whether it is forbidden, and the function that does it."""
    if isinstance(value, Tensor):
        kinds = (FORBIDDEN, UNUSUAL)
    else:
        values = (FORBIDDEN_NUMBERS.get(name, ()), UNUSUAL_VALUES[name])
        kinds = [{repr(v): lambda _, v=v: v for v in some} for some in values]
    return {kind: (some is kinds[0], do) for some in kinds for kind, do in some.items()}


# Every op, every argument, everything that may be done to it.
SINGLE = [
    (op, name, kind)
    for op in OPS
    for name, value in valid_arguments(op, random.Random(0)).items()
    for kind in kinds_of(name, value)
]


def malformed(number: int) -> Tuple[str, Dict[str, Any], Dict[str, str], bool]:
    """(op, arguments, what was done to which, whether all of that is forbidden) of one call: first every single
    change there is, then random pairs."""
    chance = random.Random(number)
    torch.manual_seed(number)
    if number < len(SINGLE):
        op, name, kind = SINGLE[number]
        arguments, done = valid_arguments(op, chance), {name: kind}
    else:
        op = chance.choice(OPS)
        arguments = valid_arguments(op, chance)
        done = {n: chance.choice(list(kinds_of(n, arguments[n]))) for n in chance.sample(list(arguments), 2)}
    forbidden = len(set(done.values())) == len(done)  # two arguments changed alike may fit each other
    for name, kind in done.items():
        forbids, do = kinds_of(name, arguments[name])[kind]
        forbidden = forbidden and forbids
        arguments[name] = do(arguments[name])
    return op, arguments, done, forbidden


def content(t: Tensor) -> List[Tensor]:
    """Copies of all memory of a tensor of any kind."""
    if t.is_meta or t._is_zerotensor():
        return []
    if t.is_nested:
        return [part for one in t.unbind() for part in content(one)]
    if t.layout == torch.sparse_coo:
        return [t._indices().clone(), t._values().clone()]
    if t.layout == torch.sparse_csr:
        return [t.crow_indices().clone(), t.col_indices().clone(), t.values().clone()]
    if t.is_mkldnn:
        return [t.to_dense()]
    return [torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()).clone()]


def plain(t: Any) -> Any:
    """The dense tensor of the same values, or the number."""
    if not isinstance(t, Tensor):
        return t
    if t._is_zerotensor():
        return torch.zeros(t.shape, dtype=t.dtype)
    dense = t.detach() if t.layout == torch.strided else t.detach().to_dense()
    return dense.resolve_neg()


def true_results(op: str, given: Dict[str, Any]) -> List[Optional[Tensor]]:
    """What `op` must return for plain arguments, in float64."""
    get = given.get
    call = Call(given["x"], given["lam"], get("weight"), get("residual"), get("variance"), get("variance_offset"))
    call = replace(call, kappa=float(given["kappa"]), eps=float(given["eps"]))
    if "backward" not in op:
        return [t for t in truth.outputs(call) if t is not None]
    # The exact site's derivative holds at the variance given: the approximate one's, and what goes through v.
    grads = truth.gradients(call, given["grad_y"], get("grad_sum"))
    if op == "backward":
        through_v = grads["variance"] + (0 if get("grad_variance") is None else given["grad_variance"].double())
        grads["x"] = grads["x"] + 2 * call.x.double() * through_v / call.x.shape[-1]
    names = ("x", "weight", "lam") if op == "backward" else ("x", "variance", "weight", "lam")
    mask = given["output_mask"] if isinstance(given["output_mask"], list) else [given["output_mask"]] * len(names)
    return [grads.get(name) if wanted else None for name, wanted in zip(names, mask)]


def assert_right(results: Sequence[Optional[Tensor]], true: Sequence[Optional[Tensor]]) -> None:
    """Within 32 epsilons (float32's at best) of a tensor's norm: no kernel's accuracy, but nothing silently wrong."""
    assert len(results) == len(true)
    for result, expected in zip(results, true):
        assert (result is None) == (expected is None)
        if result is None or result.is_meta:
            continue
        kind = torch.finfo(result.dtype)
        near = 32 * max(kind.eps, torch.finfo(torch.float32).eps) * expected.double().norm().nan_to_num().item()
        wide = {"rtol": 0, "atol": near + kind.tiny, "equal_nan": True}
        torch.testing.assert_close(plain(result).double(), expected.double(), **wide)


def try_malformed(number: int) -> bool:
    """Makes the call and checks it; whether it was refused."""
    op, arguments, done, forbidden = malformed(number)
    print(number, op, done, flush=True)
    tensors = [t for t in arguments.values() if isinstance(t, Tensor)]
    before = [content(t) for t in tensors]
    refused = None
    try:
        results = getattr(torch.ops.bhyt, op)(**arguments)
        results = results if isinstance(results, tuple) else (results,)
        if results[0] is not None and results[0].requires_grad:
            results[0].sum().backward()
    except (TypeError, ValueError, RuntimeError) as error:  # NotImplementedError is a RuntimeError
        refused = str(error)
    for a, b in zip(before, map(content, tensors)):
        assert all(map(same_bits, a, b)), "an input was changed"
    if forbidden:
        rows = {"x", "residual", "grad_y"} & set(done)  # others are held against these
        ours = re.match(r"bhyt: (\w+): expected .*, got ", str(refused))
        assert ours and (rows or ours[1] in done), refused
    if refused is None and not (op.startswith("backward") and arguments["kappa"] == INF):
        assert_right(results, true_results(op, {name: plain(t) for name, t in arguments.items()}))
    return refused is not None


def test_malformed_calls() -> None:
    """Thousands of calls of the four forwards and two backwards with one or two arguments wrong or unusual. Each call
    raises, naming the argument where docs/ops.md forbids its value, or is right. No input changes, and no call ends the
    process. USERS rows 6 and 17."""
    count = 10 * EXAMPLES
    start = random.SystemRandom().randrange(10**9) if LONG else 0
    command = [sys.executable, "-W", "ignore", "-m", "ops.test_malformed", str(start), str(start + count)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=3600, cwd=TESTS)
    lines = run.stdout.splitlines()
    assert run.returncode == 0, f"exit status {run.returncode} in call: {lines[-1:]}\n{run.stderr[-3000:]}"
    assert len(lines) == count + 1
    assert 0.1 * count < int(lines[-1].split()[0]) < 0.9 * count, "neither refused nor taken ones are rare"


if __name__ == "__main__":
    print(sum(map(try_malformed, range(int(sys.argv[1]), int(sys.argv[2])))), "refused")
