"""What users of comparable projects reported of compilers, and what held here when it was tried: rows 63 and 64 of
docs/users.md."""

import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn

import bhyt
from support.checks import same_bits


def block(x: Tensor, site: nn.Module, last: nn.Module) -> Tensor:
    y, stream = last.forward_add(site(x), x)
    return y * stream


@pytest.mark.slow
def test_cpp_wrapper() -> None:
    """Inductor's C++ calls the ops, whose optional tensors are left out: the bits of eager mode. USERS row 63."""
    x, modules = torch.randn(6, 16), (bhyt.BHyT(16), bhyt.BHyT(16))
    expected = block(x, *modules)
    with torch._inductor.config.patch(cpp_wrapper=True, fx_graph_cache=False):
        compiled = torch.compile(block, fullgraph=True)(x, *modules)
    assert same_bits(compiled, expected)
    grads = [torch.autograd.grad(y.sum(), modules[0].weight)[0] for y in (compiled, expected)]
    assert same_bits(*grads)


def test_sizes_that_data_decides() -> None:
    """A number of rows that only the data tells, in one graph: outputs and gradients of eager mode. USERS row 64."""
    modules = bhyt.BHyT(16), bhyt.BHyT(16)

    def chosen(x: Tensor, mask: Tensor) -> Tensor:
        return block(x[mask], *modules)

    compiled = torch.compile(chosen, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for rows in (5, 0, 1, 8):
            x, mask = torch.randn(8, 16, requires_grad=True), torch.arange(8) < rows
            actual, expected = compiled(x, mask), chosen(x, mask)
            assert same_bits(actual, expected)
            (grad,), (expected_grad,) = (torch.autograd.grad(y.square().sum(), x) for y in (actual, expected))
            assert same_bits(grad, expected_grad)
