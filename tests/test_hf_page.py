"""The blocks of docs/huggingface.md, in order, in one folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from test_hf_loading import save_tokenizer

PAGE = Path(__file__).parent.parent / "docs" / "huggingface.md"


@pytest.mark.slow
def test_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python blocks share their names, as on the page; a tokenizer lies beside the saved model."""
    for package in ("lm_eval", "trl", "peft", "datasets", "accelerate"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
    save_tokenizer(tmp_path / "model")
    blocks = re.findall(r"^```(python|bash)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 7, "the page has lost its blocks"
    names: dict = {}
    for language, code in blocks:
        if language == "python":
            exec(compile(code, str(PAGE), "exec"), names)
        else:
            run = subprocess.run(["bash", "-euo", "pipefail", "-c", code], capture_output=True, text=True)
            assert run.returncode == 0, f"{code}\n{run.stdout}\n{run.stderr}"
            assert "trust_remote_code" not in code or "BHyTLlamaForCausalLM" in run.stdout or "lm_eval" in code
    assert type(names["loaded"]).__name__ == "BHyTLlamaForCausalLM"
