"""Tests that run in several processes, and what they assert of tensors that are spread over them.

`@processes(n)` in front of a test runs its body in each of n ranks of a gloo group.
"""

import datetime
import faulthandler
import importlib
import multiprocessing
from pathlib import Path
from typing import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

COLLECTIVE = datetime.timedelta(seconds=60)  # after which one that not every rank joins raises
# What takes seconds to import is imported once, by the process that the ranks are forked from.
multiprocessing.set_forkserver_preload(
    [
        "pytest",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "torch.fx.experimental.symbolic_shapes",
        "transformers.models.llama.modeling_llama",
    ]
)


def processes(count: int) -> Callable[[Callable[[], None]], Callable[[Path], None]]:
    """The body takes no arguments and finds the default process group; what it raises in a rank fails the test."""

    def decorate(body: Callable[[], None]) -> Callable[[Path], None]:
        def test(tmp_path: Path) -> None:
            arguments = count, body.__module__, body.__name__, tmp_path / "store"
            torch.multiprocessing.start_processes(_rank, arguments, nprocs=count, start_method="forkserver")

        test.__name__, test.__doc__, test.__module__ = body.__name__, body.__doc__, body.__module__
        test.body = body
        return test

    return decorate


def _rank(rank: int, count: int, module: str, test: str, store: Path) -> None:
    faulthandler.dump_traceback_later(4 * COLLECTIVE.total_seconds(), exit=True)  # another kind of hang
    torch.set_num_threads(1)
    torch.manual_seed(20260119)
    # A file: no port to collide on.
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=COLLECTIVE)
    getattr(importlib.import_module(module), test).body()
    dist.barrier()
    dist.destroy_process_group()


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def assert_same(actual: Tensor, expected: Tensor, what: str) -> None:
    actual, expected = whole(actual.detach()), whole(expected.detach())
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, what
    assert expected.norm() > 0, f"{what} is zero: nothing is tested"
    assert (actual - expected).norm() <= 1e-12 * expected.norm(), what


def assert_same_gradients(model: nn.Module, reference: nn.Module) -> None:
    parameters = dict(model.named_parameters())
    assert len(parameters) == len(list(reference.parameters()))
    for (name, parameter), other in zip(parameters.items(), reference.parameters()):
        assert_same(parameter.grad, other.grad, name)
