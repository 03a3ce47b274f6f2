"""The page of the repository is made of the results in it."""

import json
import lzma
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

import page as study_page
import results as store
from conftest import ROOT
from matplotlib.figure import Figure

FILE = ROOT / "research" / "study" / "results" / "cpu.jsonl.xz"


def test_results_are_as_merge_writes_them() -> None:
    """One line per run, in order."""
    found = store.read_results(FILE)
    assert lzma.decompress(FILE.read_bytes()).decode().splitlines() == [json.dumps(run) for run in found.values()]


@pytest.mark.slow
def test_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a page without any table or figure come its words, tables and links again. All figures are drawn. One is
    saved, which takes longest."""
    drawn, save = [], study_page.save

    def save_one(figure: Figure, path: Path) -> bool:
        drawn.append(path.name)
        return save(figure, path) if path.name == "study-search.png" else figure is not None

    monkeypatch.setattr(study_page, "save", save_one)
    page = (ROOT / "research" / "study.md").read_text()
    (tmp_path / "study.md").write_text(study_page.MARKED.sub(lambda match: match[1] + match[3], page))
    assert study_page.main(["--page", str(tmp_path / "study.md")]) == 0
    assert (tmp_path / "study.md").read_text() == page
    assert sorted(drawn) == sorted(path.name for path in (ROOT / "research" / "figures").iterdir())
    assert (tmp_path / "figures" / "study-search.png").read_bytes().startswith(b"\x89PNG")
