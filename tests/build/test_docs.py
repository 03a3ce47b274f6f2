"""What the pages say: tests that exist, tables, links that lead somewhere. Their blocks are run in the rooms of their subjects."""

import re

from support.paths import ROOT

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
