"""bhyt.torchtitan in torchtitan's own Trainer, on processes of a CPU: what it computes, saves and loads.

Float64; a run of several processes has the loss and all gradients of one process. On torch before 2.14, whose FSDP2
does not know spmd_types, torchtitan's `partial_dtensor` is tried.
"""

import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchtitan")
import titan  # noqa: E402
from titan import launch  # noqa: E402, F401  (a fixture)

DEGREE = "parallelism.{}_parallel_degree".format
TP, PP = {DEGREE("tensor"): 2}, {DEGREE("pipeline"): 2, "parallelism.pipeline_parallel_schedule": "1F1B"}
HSDP = {"parallelism.data_parallel_replicate_degree": 2, "parallelism.data_parallel_shard_degree": 2}
COMPILED = {"compile.enable": True, "compile.components": ["model"]}  # Dynamo computes the loss in float32
AC = "activation_checkpoint"
RUNS = {  # processes, those that share the batch, arguments
    "fsdp": (2, 2, {}),
    "tp with sp": (2, 1, TP),
    "tp without sp": (2, 1, {**TP, "parallelism.enable_sequence_parallel": False}),
    "pp": (2, 1, PP),
    "fsdp and tp": (4, 2, TP),
    "hsdp": (4, 4, HSDP),
    "pp and tp": (4, 1, {**PP, **TP}),
    "full ac": (1, 1, {AC: "full"}),
    "selective ac": (1, 1, {AC: "selective"}),
    "full ac, fsdp and tp": (4, 2, {**TP, AC: "full"}),
    "compiled": (1, 1, COMPILED),
    "compiled, selective ac, tp": (2, 1, {**TP, **COMPILED, AC: "selective"}),
}


@pytest.fixture(scope="module")
def folder(launch: titan.Launcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process's weights to begin with, and its first step in folder/one."""
    path = tmp_path_factory.mktemp("torchtitan")
    launch(1, titan.seed, path)
    launch(1, titan.first_step, path, path / "one", {})
    return path


NEED_2_14 = ("pp", "pp and tp", "compiled, selective ac, tp")


def marked(name: str) -> object:
    if name not in NEED_2_14:
        return pytest.param(name)
    old = pytest.mark.skipif(titan.BACKEND != "spmd_types", reason="torchtitan runs it with torch 2.14 or newer")
    return pytest.param(name, marks=[pytest.mark.release, old])


@pytest.mark.slow
@pytest.mark.parametrize("name", map(marked, RUNS))
def test_first_step(name: str, launch: titan.Launcher, folder: Path) -> None:
    """Loss and all gradients are those of one process: to 1e-12."""
    processes, shares, arguments = RUNS[name]
    size = {"training.local_batch_size": titan.SEQUENCES // shares}
    launch(processes, titan.first_step, folder, folder / name, {**size, **arguments})
    (expected,) = titan.read(folder / "one", 1)
    found = set()
    for seen in titan.read(folder / name, processes):
        found |= seen.keys()
        for tensor, value in seen.items():
            assert expected[tensor].norm() > 0, f"{tensor} is zero: nothing is tested"
            assert (value - expected[tensor]).norm() <= 1e-12 * expected[tensor].norm(), tensor
    assert found == expected.keys() and sum(tensor.endswith("norm.lam") for tensor in found) == 6


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ({}, TP), ids=("fsdp", "tp"))
def test_resume(arguments: titan.Arguments, launch: titan.Launcher, folder: Path, tmp_path: Path) -> None:
    """Ten steps, and ten that were stopped after five and gone on with from torchtitan's checkpoint: the same bits of
    weights, offsets and optimizer state. Offsets are refreshed after steps 3, 6 and 9 of both."""
    size = titan.SEQUENCES if arguments else titan.SEQUENCES // 2
    common = {**arguments, "training.steps": 10, "training.local_batch_size": size, "checkpoint.interval": 5}
    for run in ("whole", "resumed"):
        if run == "resumed":
            shutil.copytree(tmp_path / "whole/checkpoint/step-5", tmp_path / "resumed/checkpoint/step-5")
        given = {**common, "dump_folder": str(tmp_path / run)}
        launch(2, titan.train, folder, tmp_path / f"{run}.results", given, {"every": 3})
    for whole, resumed in zip(titan.read(tmp_path / "whole.results", 2), titan.read(tmp_path / "resumed.results", 2)):
        assert whole.keys() == resumed.keys() and any(name.startswith("state.layers.0.ffn_norm.lam") for name in whole)
        for name, value in whole.items():
            assert torch.equal(value, resumed[name]), name
        assert sum(bool((whole[f"layers.{i}.ffn_norm.variance_offset"] > 0).all()) for i in range(3)) == 3
