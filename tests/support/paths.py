"""Folders of the repository."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS, BENCHMARKS, EXAMPLES = ROOT / "tests", ROOT / "benchmarks", ROOT / "examples"
