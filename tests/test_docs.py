"""docs/users.md names tests that exist. The blocks of docs/deploy.md are run by test_deploy.py."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_users_page() -> None:
    """Rows 1 to 30, each with tests that exist."""
    page = (ROOT / "docs" / "users.md").read_text()
    rows = {int(n): tests for n, tests in re.findall(r"^\| (\d+) \|.*\| (.*) \|$", page, re.MULTILINE)}
    assert list(rows) == list(range(1, 31))
    for n, tests in rows.items():
        file = ""
        for name in re.findall(r"`([^`]+)`", tests):
            file, _, test = name.partition("::") if not name.startswith("::") else (file, "", name[2:])
            code = (ROOT / "tests" / file).read_text()
            assert not test or f"def {test}(" in code, f"row {n}: {file}::{test}"
        assert file, f"row {n} names no test"
