"""Which files the places of --data and --eval-data stand for: each real file once, and none left out unsaid."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Iterator

KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
COMPRESSED = (".gz", ".zst", ".xz", ".bz2")


def kind_of(file: Path) -> str:
    """How a file is read, by its ending, small or capital; nothing: it is not."""
    name = Path(file.name.lower())
    return KINDS.get(Path(name.stem).suffix if name.suffix in COMPRESSED else name.suffix, "")


def exists(place: str) -> bool:
    return os.path.lexists(place)


def is_pattern(place: str) -> bool:
    """A place with *, ? or [ is a path where there is such a path, and a pattern where there is none."""
    return not exists(place) and any(character in place for character in "*?[")


def files_at(place: str) -> tuple[list[Path], list[Path]]:
    """(files to read, further ones that a folder or a pattern has), each sorted.

    Raises:
        SystemExit: there is nothing to read, or something cannot be looked at.
    """
    matches = _matches(Path(place)) if is_pattern(place) else [Path(place)]
    if not matches:
        raise SystemExit(f"{place}: no such file or folder, and as a pattern it matches nothing")
    found = sorted({entry for match in matches for entry in _entries(match)})
    files = [entry for entry in found if kind_of(entry)]
    for file in files:
        if not file.is_file():
            raise SystemExit(f"{file}: expected a file, got {'a broken link' if file.is_symlink() else 'none'}")
    if not files:
        raise SystemExit(f"{place}: expected {', '.join(KINDS)}, or a folder with such files")
    return files, [entry for entry in found if not kind_of(entry)]


def each_once(files: list[Path]) -> list[Path]:
    """Without the further names, by links, of the same file."""
    first: dict[tuple[int, int], Path] = {}
    for file in files:
        status = file.stat()
        first.setdefault((status.st_dev, status.st_ino), file)
    return list(first.values())


def _matches(pattern: Path) -> list[Path]:
    """Only the part behind the last folder that exists is a pattern."""
    folder = next(parent for parent in pattern.parents if parent.is_dir())
    if "**" in pattern.parts:  # links may lead in circles
        raise SystemExit(f"{pattern}: ** is no pattern here: name the folder, which is read with all that is below it")
    return [folder / match for match in glob.glob(str(pattern.relative_to(folder)), root_dir=folder)]


def _entries(place: Path) -> Iterator[Path]:
    """The place itself, or what is below a folder: linked folders are entered, each real one once."""
    if not place.is_dir():
        yield place
        return
    entered = set()
    for folder, folders, names in os.walk(place, onerror=_refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders.sort()
        yield from (Path(folder, name) for name in names)


def _refuse(error: OSError) -> None:
    raise SystemExit(f"{error.filename}: cannot be read: {error.strerror}") from error
