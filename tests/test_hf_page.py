"""The blocks of docs/huggingface.md, in order, in one folder."""

from pathlib import Path

import pytest

from pages import blocks, run_bash
from test_hf_loading import save_tokenizer


@pytest.mark.slow
def test_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python blocks share their names, as on the page; a tokenizer lies beside the saved model."""
    for package in ("lm_eval", "trl", "peft", "datasets", "accelerate"):
        pytest.importorskip(package)
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
