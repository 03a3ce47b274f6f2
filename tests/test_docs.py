"""What the pages say: tests that exist, blocks that run, links that lead somewhere; and the types, which are documentation
too. The blocks of docs/deploy.md are run by test_deploy.py, those of docs/huggingface.md by test_hf_page.py, those of
docs/quantization.md by test_quantization.py, those of docs/serving.md by engines/test_vllm.py."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pages import blocks

ROOT = Path(__file__).resolve().parent.parent

FOLDERS = ("", "docs", "benchmarks", "research", "tests")
PAGES = [page for folder in FOLDERS for page in sorted((ROOT / folder).glob("*.md"))]


def test_users_page() -> None:
    """Rows 1 to 68, each with tests that exist and a thread."""
    page = (ROOT / "docs" / "users.md").read_text()
    rows = re.findall(r"^\| (\d+) \| [^|]+ \| ([^|]+) \| [^|]+ \| ([^|]+) \|$", page, re.MULTILINE)
    assert [int(n) for n, _, _ in rows] == list(range(1, 69))
    for n, threads, tests in rows:
        assert re.fullmatch(r"[\w-]+/[\w-]+#\d+(, ([\w-]+/[\w-]+)?#\d+)*", threads), f"row {n}: {threads}"
        file = ""
        for name in re.findall(r"`([^`]+)`", tests):
            file, _, test = name.partition("::") if not name.startswith("::") else (file, "", name[2:])
            code = (ROOT / "tests" / file).read_text()
            assert not test or f"def {test}(" in code, f"row {n}: {file}::{test}"
        assert file, f"row {n} names no test"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python of README.md and docs/usage.md, each page's blocks one after another."""
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    for page in ("README.md", "docs/usage.md"):
        python = [code for language, _, code in blocks(page) if language == "python"]
        assert len(python) == 2, page
        names: dict = {}
        for code in python:
            exec(compile(code, page, "exec"), names)
    assert (tmp_path / "folder" / "config.json").exists()


def test_tables() -> None:
    """Every row of every table of every page has as many cells as its header: other rows shift, or lose cells."""
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for table in re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE):
            header, *rows = (len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines())
            assert rows and set(rows) == {header}, f"{page.name}: {table.splitlines()[0]}"


def test_links() -> None:
    """Every relative link of every page leads to a file, and to a heading if it names one. An sdist has neither research
    nor results."""
    absent = {folder for folder in (ROOT / "research", ROOT / "benchmarks" / "results") if not folder.exists()}
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", page.read_text()):
            name, _, anchor = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            if absent & {file, *file.parents}:
                continue
            assert file.exists(), f"{page.name}: {target}"
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE) if anchor else []
            slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert not anchor or anchor in slugs, f"{page.name}: {target}"


def test_types() -> None:
    """mypy --strict finds nothing in the package, which ships its types."""
    pytest.importorskip("mypy")
    run = subprocess.run([sys.executable, "-m", "mypy", "--strict"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
