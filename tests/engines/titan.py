"""Runs of torchtitan's Trainer in processes of a CPU, for the tests beside: small configs, and what a step computes."""

import contextlib
import dataclasses
import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest
import torch
import torch._dynamo.utils
import torch.multiprocessing
from titan_models import FAMILIES, VOCABULARY
from torch import Tensor

LENGTH, SEQUENCES = 16, 4
BACKEND = "spmd_types" if hasattr(torch.distributed, "set_timeout") else "partial_dtensor"  # torch 2.14, or older
Arguments = Dict[str, Any]


class Launcher:
    """A process that has imported torchtitan, as patched for CPUs, and forks those that train."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()

    def __call__(self, processes: int, job: Callable[..., None], *arguments: Any) -> None:
        """job(*arguments) in each of so many processes, in torchrun's environment; what it raises fails the test."""
        self._pipe.send((processes, job, arguments))
        error = self._pipe.recv()
        if error:
            raise AssertionError(error)

    def close(self) -> None:
        self._pipe.close()
        self._process.join()


@pytest.fixture(scope="module")
def launch() -> Iterator[Launcher]:
    """Runs of jobs; one launcher for the tests of a file."""
    launcher = Launcher()
    yield launcher
    launcher.close()


def _serve(pipe: Any) -> None:
    import torchtitan_on_cpu  # noqa: F401

    import bhyt.torchtitan  # noqa: F401

    with contextlib.suppress(EOFError):
        while True:
            processes, job, arguments = pipe.recv()
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port = free.getsockname()[1]
            try:
                given = (processes, port, job, arguments)
                torch.multiprocessing.start_processes(_rank, given, nprocs=processes, start_method="fork")
                pipe.send("")
            except Exception as error:
                pipe.send(str(error) or repr(error))


def _rank(rank: int, processes: int, port: int, job: Callable[..., None], arguments: Tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes),
        MASTER_ADDR="localhost", MASTER_PORT=str(port),
    )  # fmt: skip
    torch.set_num_threads(1)
    job(*arguments)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def small(folder: Path, arguments: Arguments, **options: Any) -> Any:
    """A converted config of three small blocks with grouped queries, in float64; arguments: "parallelism.x": value, and
    "family": that of `FAMILIES`.

    All runs in a folder begin with the same weights, those of `seed`.
    """
    import torchtitan_on_cpu
    from torchtitan.components.loss import CrossEntropyLoss
    from torchtitan.config import ParallelismConfig
    from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
    from torchtitan.models.llama3 import config_registry

    import bhyt.torchtitan

    if arguments.get("training.dtype", "float64") == "float64":
        torchtitan_on_cpu.in_float64()
    family = FAMILIES[arguments.get("family", "llama3")]
    config = config_registry.llama3_debugmodel()
    config.model_spec = dataclasses.replace(family.spec(), model=family.model())
    config.loss = CrossEntropyLoss.Config(global_vocab_size=VOCABULARY)
    config.dataloader = _batches().Config()
    config.parallelism = ParallelismConfig()
    config.activation_checkpoint = None
    settings = {
        "training.seq_len": LENGTH, "training.local_batch_size": SEQUENCES, "training.steps": 1,
        "training.max_norm": 1e9,
        "training.dtype": "float64", "training.mixed_precision_param": arguments.get("training.dtype", "float64"),
        "training.mixed_precision_reduce": arguments.get("training.dtype", "float64"),
        "training.disable_cuda_graphs": True, "parallelism.spmd_backend": BACKEND,
        "optimizer.implementation": "for-loop", "validator.enable": False, "checkpoint.enable": True,
        "checkpoint.initial_load_path": str(folder / "seed/checkpoint/step-0"), "dump_folder": str(folder / "run"),
        "debug.seed": 1, "debug.enable_structured_logging": False, "tokenizer": _no_tokenizer().Config(),
    }  # fmt: skip
    policies = {"full": FullAC.Config, "selective": SelectiveAC.Config}
    for name, value in {**settings, **arguments}.items():
        if name == "family":
            continue
        value = policies[value]() if name == "activation_checkpoint" else value
        *path, last = name.split(".")
        part = config
        for attribute in path:
            part = getattr(part, attribute)
        assert hasattr(part, last), name
        setattr(part, last, value)
    return bhyt.torchtitan.convert(config, **options)


def _batches() -> Any:
    """A data loader whose global batches are the same however many processes share them."""
    from torchtitan.components.dataloader import BaseDataLoader

    class Batches(BaseDataLoader):
        @dataclasses.dataclass(kw_only=True, slots=True)
        class Config(BaseDataLoader.Config):
            pass

        def __init__(self, config: Any, *, dp_world_size: int, dp_rank: int, local_batch_size: int, **_: Any) -> None:
            self.shape, self.calls = (dp_world_size, dp_rank, local_batch_size), 0

        def __iter__(self) -> Iterator[Tuple[Dict[str, Tensor], Tensor]]:
            world, rank, size = self.shape
            while True:
                first = (self.calls * world + rank) * size
                rows = torch.stack([_sequence(first + i) for i in range(size)])
                self.calls += 1
                yield {"input": rows[:, :-1]}, rows[:, 1:]

        def state_dict(self) -> Dict[str, Any]:
            return {"calls": self.calls}

        def load_state_dict(self, state: Dict[str, Any]) -> None:
            self.calls = state["calls"]

    return Batches


def _sequence(number: int) -> Tensor:
    return torch.randint(VOCABULARY, (LENGTH + 1,), generator=torch.Generator().manual_seed(number))


TOKENS = torch.stack([_sequence(1000 + i)[:-1] for i in range(4)])


def _no_tokenizer() -> Any:
    from torchtitan.config import Configurable

    class NoTokenizer(Configurable):
        @dataclasses.dataclass(kw_only=True, slots=True)
        class Config(Configurable.Config):
            pass

        def __init__(self, config: Any, **_: Any) -> None:
            pass

    return NoTokenizer


def seed(folder: Path) -> None:
    """Write the weights that all runs in the folder begin with; gains and lam that are not all alike."""
    arguments = {"checkpoint.create_seed_checkpoint": True, "checkpoint.initial_load_path": None}
    trainer = small(folder, {**arguments, "dump_folder": str(folder / "seed")}).build()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in trainer.model_parts[0].named_parameters():
            if parameter.dim() == 1:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype))
    trainer.checkpointer.save(curr_step=0, last_step=True)
    trainer.close()


def first_step(folder: Path, results: Path, arguments: Arguments) -> None:
    """Loss and gradients of a run's first step, in results/RANK.pt."""
    trainer = small(folder, arguments).build()
    trainer.checkpointer.load()
    seen: Dict[str, Tensor] = {}

    def log(step: int, loss: float, *_: Any, **__: Any) -> None:
        seen["loss"] = torch.tensor(loss, dtype=torch.float64)

    def look(*_: Any) -> None:
        for part in trainer.model_parts:
            for name, parameter in part.named_parameters():
                seen[name.replace("_checkpoint_wrapped_module.", "")] = whole(parameter.grad).clone()

    trainer.metrics_processor.log = log
    trainer.optimizers.register_step_pre_hook(look)
    trainer.step = 1
    trainer.train_step(trainer.batch_generator(trainer.dataloader))
    if not trainer.parallel_dims.pp_enabled or trainer.pp_has_last_stage:
        assert seen["loss"] > 0
    else:
        del seen["loss"]
    names = [name for part in trainer.model_parts for name, _ in part.named_parameters()]
    assert any("_checkpoint_wrapped_module" in name for name in names) == ("activation_checkpoint" in arguments)
    assert bool(torch._dynamo.utils.counters["stats"]["unique_graphs"]) == ("compile.enable" in arguments)
    write(seen, results)
    trainer.close()


def train(folder: Path, results: Path, arguments: Arguments, options: Arguments) -> None:
    """A run to its end; weights, offsets, optimizer state and the logits of four sequences, in results/RANK.pt."""
    trainer = small(folder, arguments, **options).build()
    trainer.train()
    seen = {name: whole(tensor) for part in trainer.model_parts for name, tensor in part.state_dict().items()}
    states = trainer.optimizers.state_dict()
    seen.update((name, whole(value)) for name, value in states.items() if isinstance(value, Tensor))
    seen["logits"] = trainer.model_parts[0](TOKENS)
    write(seen, results)
    trainer.close()


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def write(seen: Dict[str, Tensor], results: Path) -> None:
    results.mkdir(parents=True, exist_ok=True)
    seen = {name: whole(tensor.detach()).clone() for name, tensor in seen.items()}
    torch.save(seen, results / f"{torch.distributed.get_rank()}.pt")


def read(results: Path, processes: int) -> List[Dict[str, Tensor]]:
    return [torch.load(results / f"{rank}.pt") for rank in range(processes)]
