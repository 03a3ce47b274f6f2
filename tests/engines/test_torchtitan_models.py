"""bhyt.torchtitan: what is converted and refused, offsets and weight decay, and folders of bhyt.hf both ways."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchtitan")
import titan  # noqa: E402
from titan import launch  # noqa: E402, F401  (a fixture)
import titan_jobs as jobs  # noqa: E402

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(launch: titan.Launcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("torchtitan")
    launch(1, titan.seed, path)
    return path


IN_ONE_PROCESS = (
    jobs.refresh_and_decay,
    jobs.refusals,
    jobs.gains_at_the_start,
    jobs.export_rounded_weights,
    jobs.against_hf_offsets,
)


@pytest.mark.parametrize("job", IN_ONE_PROCESS, ids=lambda job: job.__name__)
def test_in_one_process(job: Any, launch: titan.Launcher, folder: Path) -> None:
    """See the job's docstring."""
    launch(1, job, folder)


def test_config_functions(launch: titan.Launcher) -> None:
    """See the job's docstring."""
    launch(1, jobs.config_functions)


@pytest.mark.slow
@pytest.mark.parametrize("family, files", (("llama3", 1), ("llama3", 2), ("qwen3", 1), ("qwen3_moe", 1)))
def test_export(family: str, files: int, launch: titan.Launcher, folder: Path, tmp_path: Path) -> None:
    """Trained for two steps by FSDP2 on two processes and exported by torchtitan, in one file or in several, as the
    base's index says: AutoModelForCausalLM loads the folder, offsets included, and has the same logits."""
    arguments = {
        **jobs.FLOAT32, "family": family, "training.steps": 2, "training.local_batch_size": 2,
        "checkpoint.last_save_in_hf": True, "checkpoint.last_save_model_only": True,
        "checkpoint.initial_load_path": None, "dump_folder": str(tmp_path),
    }  # fmt: skip
    if files == 2:
        write_index(tmp_path / "assets")
        arguments["hf_assets_path"] = str(tmp_path / "assets")
    launch(2, titan.train, folder, tmp_path / "trained", arguments, {"exact_layers": 1, "every": 1})
    export = tmp_path / "checkpoint/step-2"
    shutil.rmtree(export / "sharded", ignore_errors=True)
    assert len(list(export.glob("*.safetensors"))) == files
    launch(1, jobs.save_config, export, family)
    launch(1, jobs.logits_of_export, export, tmp_path / "loaded")
    trained, (loaded,) = titan.read(tmp_path / "trained", 2)[0], titan.read(tmp_path / "loaded", 1)
    scale = trained["logits"].abs().max()  # torchtitan computes experts in bfloat16, whatever the model is
    assert (trained["logits"] - loaded["logits"]).abs().max() <= (2**-8 * scale if family == "qwen3_moe" else 1e-5)
    assert trained["logits"].std() > 0.1
    for i in range(3):
        ours, theirs = f"layers.{i}.ffn_norm", f"model.layers.{i}.post_attention_layernorm"
        assert torch.equal(trained[f"{ours}.lam"], loaded[f"{theirs}.lam"])
        assert (f"{theirs}.variance_offset" in loaded) == (i > 0)
        if i:
            offset = loaded[f"{theirs}.variance_offset"]
            assert torch.equal(trained[f"{ours}.variance_offset"], offset) and offset.shape == (1,) and offset > 0


def write_index(assets: Path) -> None:
    """That of a plain Llama in two files: without lam and offsets."""
    parts = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    parts += ["input_layernorm", "post_attention_layernorm"]
    names = {"model.embed_tokens.weight": 1, "model.norm.weight": 2, "lm_head.weight": 2}
    names.update((f"model.layers.{i}.{part}.weight", 1 if i == 0 else 2) for i in range(3) for part in parts)
    weight_map = {name: f"model-{file:05d}-of-00002.safetensors" for name, file in names.items()}
    assets.mkdir()
    (assets / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.slow
def test_initial_checkpoint(launch: titan.Launcher, tmp_path: Path) -> None:
    """A folder of bhyt.hf is what torchtitan begins with, offsets included, on one process and sharded: the same
    logits; and one of a model that computes something else is refused."""
    launch(1, jobs.save_hf_model, tmp_path / "model", tmp_path / "hf")
    (expected,) = titan.read(tmp_path / "hf", 1)
    tp = {"parallelism.tensor_parallel_degree": 2, "parallelism.enable_sequence_parallel": False}
    for processes, arguments in ((1, {}), (2, {}), (2, tp)):
        results = tmp_path / f"loaded{processes}{len(arguments)}"
        launch(processes, jobs.load_hf_model, tmp_path / "model", results, arguments)
        for loaded in titan.read(results, processes):
            assert loaded["layers.1.ffn_norm.variance_offset"].item() == 0.125
            if not arguments:
                assert (loaded["logits"] - expected["logits"]).abs().max() <= 1e-5
    assert expected["logits"].std() > 0.1
    launch(1, jobs.refuse_other_folders, tmp_path / "model")


@pytest.mark.slow
@pytest.mark.parametrize("processes", (1, pytest.param(2, marks=pytest.mark.release)))
def test_launcher(processes: int, tmp_path: Path) -> None:
    """docs/pretraining.md's command for the debug model, with smaller numbers, trains ten steps; the loss falls; a
    second command goes on from the checkpoint."""
    write_assets(tmp_path)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
        str(HERE / "torchtitan_on_cpu.py"), "--module", "bhyt.torchtitan", "--config", "llama3_debugmodel",
        f"--hf-assets-path={tmp_path}", f"--dataloader.dataset-path={tmp_path / 'data'}",
        f"--dump-folder={tmp_path / 'out'}",
        "--training.disable-cuda-graphs", "--optimizer.implementation=for-loop", "--training.seq-len=64",
        f"--parallelism.spmd-backend={titan.BACKEND}", "--checkpoint.enable",
        f"--training.local-batch-size={4 // processes}", "--validator.no-enable",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    for steps, first in ((10, 1), (12, 11)):
        arguments = [*command, f"--training.steps={steps}"]
        done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
        log = done.stdout + done.stderr
        assert done.returncode == 0, log[-4000:]
        losses = losses_of(log)
        assert sorted(losses) == list(range(first, steps + 1)), log[-4000:]
        assert first > 1 or losses[10] < losses[1] - 0.2


def losses_of(log: str) -> dict:
    """step -> loss, as torchtitan prints them."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", log)
    return {int(step): float(loss) for step, loss in re.findall(r"step:\s+(\d+)\s+loss:\s+([\d.]+)", plain)}


def write_assets(folder: Path) -> None:
    """A tokenizer of bytes and some text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    (folder / "data").mkdir()
    lines = [json.dumps({"text": f"{i} times {j} is {i * j}, and so on. " * 4}) for i in range(30) for j in range(30)]
    (folder / "data/text.jsonl").write_text("\n".join(lines))
