"""The processes that torchrun starts, and the signals that end them. Rank 0 writes and speaks; all of them compute."""

from __future__ import annotations

import contextlib
import inspect
import os
import signal
from dataclasses import dataclass
from typing import Any, Callable, Iterator, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Processes that hold the same weights, and of each batch a part. One process is a world too."""

    rank: int = 0
    size: int = 1

    @property
    def writes(self) -> bool:
        return self.rank == 0

    def part(self, batch: Tensor) -> Tensor:
        """[B, ...] -> [B / size, ...], this process's part; B must be a multiple of size."""
        return batch.chunk(self.size)[self.rank]

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model, whose gradients become means over the world in backward.

        Buffers are left alone: BHyT's offsets follow from the weights, in every process alike.
        """
        if self.size == 1:
            return model
        renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # in torch 2.13
        return DistributedDataParallel(model, **{"forward_sync_buffers" if renamed else "broadcast_buffers": False})

    def sum(self, number: float) -> float:
        return self._reduce(number, dist.ReduceOp.SUM)

    def largest(self, number: int) -> int:
        return int(self._reduce(number, dist.ReduceOp.MAX))

    def _reduce(self, number: float, op: Any) -> float:
        """On the host, for which the device need not be waited for."""
        if self.size == 1:
            return number
        value = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(value, op)
        return value.item()

    def together(self, work: Callable[[], T]) -> T:
        """Does it in every process; where it ends one of them, all end with what that one has to say."""
        result, reason = _attempt(work)
        reasons: list[str | None] = [reason] * self.size
        if self.size > 1:
            dist.all_gather_object(reasons, reason)
        for reason in reasons:
            if reason is not None:
                raise SystemExit(reason)
        return result

    def from_writer(self, work: Callable[[], T]) -> T:
        """Does it in the process that writes, for all: they get its result, or end as it does."""
        outcome = list(_attempt(work)) if self.writes else [None, None]
        if self.size > 1:
            dist.broadcast_object_list(outcome)
        result, reason = outcome
        if reason is not None:
            raise SystemExit(reason)
        return result


def _attempt(work: Callable[[], Any]) -> tuple[Any, str | None]:
    """(result, None), or (None, why there is none)."""
    try:
        return work(), None
    except (SystemExit, OSError) as error:
        return None, str(error)


def world_of_environment() -> World:
    """What torchrun says in the environment."""
    return World(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


@contextlib.contextmanager
def connected(world: World, device: str) -> Iterator[None]:
    """The default process group: gloo for what is on the host, NCCL for what is on a GPU."""
    if world.size == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.device(device).type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend)
    except (RuntimeError, ValueError) as error:
        raise SystemExit(f"the {world.size} processes do not find each other: {first_line(error)}") from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def device_of_process(device: str, world: World) -> str:
    """Every process its own GPU; any other device is shared.

    Raises:
        SystemExit: there is none.
    """
    if torch.device(device) == torch.device("cuda") and world.size > 1:
        device = f"cuda:{os.environ.get('LOCAL_RANK', world.rank)}"
    try:
        torch.ones(1, device=device).item()
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SystemExit(f"--device {device}: {first_line(error)}") from error
    return device


def is_lost_process(error: BaseException) -> bool:
    """Whether a collective failed because of another process, whose own end tells why."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class Signals:
    """`with Signals(world) as signals`: SIGINT and SIGTERM end nothing, and signals.received is the one that came.

    A process of its own ends at once when it comes again; under torchrun the launcher insists with SIGKILL.
    """

    def __init__(self, world: World) -> None:
        self.received = 0
        self._alone = world.size == 1

    def __enter__(self) -> Signals:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self.received = number
        if self._alone:
            signal.signal(number, signal.SIG_DFL)
