"""The blocks of docs/huggingface.md, README.md, docs/quickstart.md, docs/usage.md and docs/diagnostics.md, in order, in
one folder each."""

from pathlib import Path

import pytest

from support.pages import blocks, run_bash
from support.hf_models import save_tokenizer
from support.packages import needs


@pytest.mark.slow
def test_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python blocks share their names, as on the page; a tokenizer lies beside the saved model."""
    for package in ("lm_eval", "trl", "peft", "datasets", "accelerate"):
        needs(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    save_tokenizer(tmp_path / "model")
    page = blocks("docs/huggingface.md")
    assert len(page) == 7, "the page has lost its blocks"
    names: dict = {}
    for language, _, code in page:
        if language == "python":
            exec(compile(code, "huggingface.md", "exec"), names)
        else:
            printed = run_bash(code, tmp_path)
            assert "trust_remote_code" not in code or "BHyTLlamaForCausalLM" in printed or "lm_eval" in code
    assert type(names["loaded"]).__name__ == "BHyTLlamaForCausalLM"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python of README.md, docs/quickstart.md, docs/usage.md and docs/diagnostics.md, each page's blocks one after
    another."""
    monkeypatch.chdir(tmp_path)
    for page, number in (("README.md", 2), ("docs/quickstart.md", 4), ("docs/usage.md", 2), ("docs/diagnostics.md", 1)):
        python = [code for language, _, code in blocks(page) if language == "python"]
        assert len(python) == number, page
        names: dict = {}
        for code in python:
            exec(compile(code, page, "exec"), names)
    assert (tmp_path / "folder" / "config.json").exists()
