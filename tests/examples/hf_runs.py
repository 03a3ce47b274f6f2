"""Short runs of examples/pretrain_hf.py, and the text that they read. Skips without the packages, and knows the
folder."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

from support.packages import needs
from support.paths import EXAMPLES, ROOT

for package in ("accelerate", "datasets", "tensorboard", "tqdm", "transformers"):
    needs(package)

sys.path.insert(0, str(EXAMPLES))

import pretrain_hf  # noqa: E402
import transformers  # noqa: E402

import bhyt  # noqa: E402
from pretraining_hf import documents as documents_module  # noqa: E402

TINY = (
    "--steps 9 --batch 8 --seq-len 48 --warmup 2 --vocab-size 512 --eval-sequences 16 --streams 2 --refresh 2 "
    "--log-every 1 --eval-every 3 --save-every 3 --keep 9 --cpu"
).split()


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 documents: of the C4 sample, or, where it is not, of Python's own sources."""
    sample = ROOT.parent / "shared" / "data" / "c4_en_valid_1k.jsonl"
    if sample.exists():
        lines = sample.read_text().splitlines()[:400]
    else:
        rows = itertools.islice(documents_module._python_sources(), 400)
        lines = [json.dumps({"text": row["text"][:2000]}) for row in rows]
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def run(corpus: Path, out: Path, *more: str) -> int:
    return pretrain_hf.main([*TINY, "--data", str(corpus), "--out", str(out), *more])


def history(out: Path) -> list[tuple[int, str, float]]:
    """(step, what, how much) of all losses and learning rates."""
    logs = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [
        (log["step"], name, log[name]) for log in logs for name in ("loss", "learning_rate", "eval_loss") if name in log
    ]


def assert_same_losses(actual: Path, expected: Path, tolerance: float) -> None:
    assert [entry[:2] for entry in history(actual)] == [entry[:2] for entry in history(expected)]
    for (step, name, one), (_, _, other) in zip(history(actual), history(expected)):
        assert abs(one - other) <= tolerance, (step, name, one, other)


@pytest.fixture(scope="session")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, all steps without a pause. Its training and evaluation build no cache."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.models.llama.modeling_llama, "DynamicCache", None)
        assert run(corpus, out) == 0
    return out


def sites_of(model: torch.nn.Module) -> list[type]:
    return [type(module) for module in model.modules() if isinstance(module, (bhyt.BHyT, bhyt.BHyTApprox))]
