"""torch.library.opcheck of all six ops: schema, autograd registration, fake tensors, AOT with dynamic shapes.
USERS row 22. The four quantised ones: test_quantized.py."""

from dataclasses import replace
from typing import List, Tuple

import pytest
import torch

from support.cases import FORMS, Call, make_call, make_upstream

MIXES: List[Tuple[Tuple[int, ...], torch.dtype, torch.dtype]] = [
    ((4, 16), torch.float32, torch.float32),
    ((2, 3, 5), torch.bfloat16, torch.float32),
    ((7,), torch.float64, torch.float64),
    ((1, 8), torch.float16, torch.float16),
]


def calls(form: str, device: str) -> List[Call]:
    """Shapes and dtypes, with and without gain and offset, contiguous and not."""
    made = [make_call(form, shape, dtype, device, stream=stream) for shape, dtype, stream in MIXES]
    plain = replace(make_call(form, (3, 9), device=device), weight=None, offset=None)
    strided = make_call(form, (6, 10), device=device)
    return [*made, plain, replace(strided, x=strided.x.t().contiguous().t())]


@pytest.mark.parametrize("form", FORMS)
def test_forwards(form: str, device: str) -> None:
    """The four forward ops pass every test of opcheck, with and without gradients. USERS row 22."""
    op = getattr(torch.ops.bhyt, form).default
    for call in calls(form, device):
        torch.library.opcheck(op, tuple(call.requiring_grad().arguments()))
        torch.library.opcheck(op, tuple(call.arguments()))


@pytest.mark.parametrize("form", FORMS)
def test_backwards(form: str, device: str) -> None:
    """The two backward ops pass every test of opcheck, under every kind of mask. USERS row 22."""
    for call in calls(form, device):
        out, upstream = call.run(), make_upstream(call)
        row = out.sum if call.adds else call.x
        rest = (call.weight, call.lam, call.kappa, call.eps)
        if call.exact:
            op = torch.ops.bhyt.backward.default
            arguments = (upstream.y, upstream.variance, upstream.sum, row, out.variance, *rest)
            masks = [[True] * 3, [True, False, False], [False, True, True]]
        else:
            op = torch.ops.bhyt.backward_approx.default
            arguments = (upstream.y, upstream.sum, row, call.variance, call.offset, *rest)
            masks = [[True] * 4, [True, False, False, False], [False, True, True, True]]
        for mask in masks:
            torch.library.opcheck(op, (*arguments, mask))
