"""The pages: tests that they name, tables, lines, the site. Their blocks are run in the rooms of their subjects."""

import ast
import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.packages import needs
from support.paths import ROOT

FOLDERS = ("", "docs", "docs/api", "benchmarks", "research", "tests")
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


def test_schemas() -> None:
    """docs/ops.md has every schema that the library registers, word for word, but the overloads without defaults."""
    source = (ROOT / "csrc" / "ops" / "schemas.cpp").read_text()
    literals = re.search(r"kSchemas\[\] = \{(.*?)\};", source, re.DOTALL)
    assert literals
    schemas = re.sub(r'"\s+"', "", literals[1])
    page = " ".join((ROOT / "docs" / "ops.md").read_text().split())
    found = [schema for schema in re.findall(r'"([^"]+)"', schemas) if ".explicit" not in schema]
    assert len(found) == 14
    for schema in found:
        assert schema in page, schema


def test_examples() -> None:
    """The examples of the package's docstrings print what they say."""
    tried = 0
    for name in ("compiling", "diagnostics", "folding", "functional", "gain", "modules", "optim"):
        failed, attempted = doctest.testmod(importlib.import_module(f"bhyt.{name}"))
        assert not failed, name
        tried += attempted
    assert tried > 25


def test_docstrings() -> None:
    """Every public module, class, function and method of the package has a docstring that is one literal, which tools
    that do not run the code read too."""
    for path in sorted((ROOT / "bhyt").rglob("*.py")):
        if path.name.startswith("_") and path.name not in ("__init__.py", "__main__.py"):
            continue
        nodes = [ast.parse(path.read_text())]
        while nodes:
            node = nodes.pop()
            assert ast.get_docstring(node), f"{path.relative_to(ROOT)}: {getattr(node, 'name', 'the module')}"
            kinds = (ast.ClassDef, ast.FunctionDef)
            members = [] if isinstance(node, ast.FunctionDef) else [n for n in node.body if isinstance(n, kinds)]
            nodes += [member for member in members if not member.name.startswith("_")]


def lacks(function: ast.FunctionDef, text: str) -> set[str]:
    """The parameters, results and errors of a function that its docstring does not describe."""
    given = function.args
    names = {a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)} - {"self", "cls"}
    names |= {f"*{given.vararg.arg}"} if given.vararg else set()
    names |= {f"**{given.kwarg.arg}"} if given.kwarg else set()
    raised = {
        node.exc.func.id
        for node in ast.walk(function)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name)
    }
    lacking = {name for name in names | raised if not re.search(rf"^ +{re.escape(name)}: \S", text, re.MULTILINE)}
    silent = function.returns is None or ast.unparse(function.returns) in ("None", "Iterator[None]")
    if names and not silent and not re.search(r"^(Returns|Yields):$", text, re.MULTILINE):
        lacking.add("Returns")  # without parameters one line says it
    return lacking


def test_docstrings_are_whole() -> None:
    """The docstring of every public function and method says what each parameter is, what is returned and which errors
    it raises. That of a class does so for its construction."""
    checked = 0
    for folder in ("", "hf", "hf/families", "quantization"):
        for path in sorted((ROOT / "bhyt" / folder).glob("*.py")):
            module = ast.parse(path.read_text())
            classes = [n for n in module.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")]
            for owner in (module, *classes):
                for function in owner.body:
                    constructs = isinstance(function, ast.FunctionDef) and function.name == "__init__"
                    if isinstance(function, ast.FunctionDef) and (constructs or not function.name.startswith("_")):
                        lacking = lacks(function, ast.get_docstring(owner if constructs else function) or "")
                        assert not lacking, f"{path.relative_to(ROOT)}: {function.name}: {sorted(lacking)}"
                        checked += 1
    assert checked > 100


def test_api_pages() -> None:
    """The pages of the API have every name of each `__all__`. The classes of one family stand for all families."""
    pages = "\n".join(page.read_text() for page in sorted((ROOT / "docs" / "api").glob("*.md")))
    shown = set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))
    for package in ("bhyt", "bhyt.hf", "bhyt.quantization", "bhyt.parallel"):
        path = ROOT.joinpath(*package.split("."))
        tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
        (names,) = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
        for name in ast.literal_eval(names):
            of_a_family = package == "bhyt.hf" and name.startswith("BHyT") and "bhyt.hf.families.llama" in shown
            by_its_parts = any(other.startswith(f"{package}.{name}.") for other in shown)
            as_text = name.isupper() and f"`{package}.{name}`" in pages
            assert {package, f"{package}.{name}"} & shown or of_a_family or by_its_parts or as_text, f"{package}.{name}"


def test_lines() -> None:
    """Lines of pages have at most 120 characters outside tables, blocks of code and what scripts wrote."""
    for page in PAGES:
        text = re.sub(r"^```.*?^```$|<!-- \w+:\S+ -->.*?<!-- /\S+ -->", "", page.read_text(), flags=re.M | re.S)
        for line in text.splitlines():
            assert len(line) <= 120 or line.startswith(("|", "    ")), f"{page.name}: {line}"


def test_lines_of_code() -> None:
    """Lines of code have at most 120 characters."""
    kinds = {".py", ".cpp", ".h", ".cu", ".cuh", ".sh", ".toml"}
    for folder in ("csrc", "bhyt", "examples", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in kinds:
                long = [line for line in path.read_text().splitlines() if len(line) > 120]
                assert not long, f"{path.relative_to(ROOT)}: {long[0]}"


def test_names() -> None:
    """No script reads a name that it does not define; mypy looks at the package alone."""
    needs("pyflakes", "test")
    names = ("bhyt", "benchmarks", "docs", "examples", "research", "tests")
    folders = [name for name in names if (ROOT / name).exists()]
    done = subprocess.run([sys.executable, "-m", "pyflakes", *folders], cwd=ROOT, capture_output=True, text=True)
    undefined = [line for line in done.stdout.splitlines() if "undefined" in line or "referenced before" in line]
    assert done.returncode in (0, 1) and not done.stderr and not undefined, done.stderr + "\n".join(undefined)


def test_measured_tables() -> None:
    """Every table of measurements is what its result file says, and says so when the code has changed since."""
    if not (ROOT / "benchmarks" / "results").exists():
        pytest.skip("an sdist has no results")
    command = [sys.executable, str(ROOT / "benchmarks" / "readme_table.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_site(tmp_path: Path) -> None:
    """The site builds strictly: every link of every page leads to a page and a heading, and every docstring is read."""
    needs("mkdocs", "docs")
    if not (ROOT / "research").exists():
        pytest.skip("an sdist has no research")
    # Not --quiet: --strict then counts no warnings.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "forward_approx" in (tmp_path / "api" / "functional.html").read_text()
