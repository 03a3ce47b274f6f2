"""What every table of readme_table.py is made of: numbers, cells, captions."""

from typing import Any, Mapping, Sequence

import staleness

Result = Mapping[str, Any]


def number(value: float) -> str:
    """About three figures: 1.23, 12.3, 123."""
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """A Markdown table; the first `left` columns are aligned left, the others right."""
    assert all(len(row) == len(header) for row in rows), f"rows that do not fit the header {header}"
    rules = ["---" if column < left else "---:" for column in range(len(header))]
    return ["| " + " | ".join(cells) + " |" for cells in (header, rules, *rows)]


def caption(result: Result) -> str:
    """Where, with what and when; and whether the code has changed since."""
    env = result["environment"]
    gpu = env.get("gpu") or env.get("device")
    state = " with local changes" if env["dirty"] else ""
    cache = f"{env['last_level_cache'] / 2**20:.0f} MiB last-level cache"
    machine = f"{gpu + ', ' if gpu else ''}{env['cpu']}, {env['threads']} threads, {env['tier']}, {cache}"
    commit = f"commit {env['commit']}{state}, " if env["commit"] else ""
    software = f"torch {env['torch']}, Python {env['python']}; {commit}{env['date'][:10]}."
    return f"{machine};\n{software}{staleness.note(result)}"
