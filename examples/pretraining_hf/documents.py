"""Documents from files, a hub, or Python's own sources. Of a file's rows only one field is read.

A generator here reads the files behind a stream of `datasets`. The loaders of `datasets` take a path with brackets for
a pattern, refuse files whose other fields have other types, read `.zst` only with another package, and name neither
the file nor the line of a row without text.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import json
import lzma
import reprlib
from itertools import groupby, islice
from pathlib import Path
from typing import Any, BinaryIO, Iterator

import datasets
import pyarrow
import pyarrow.parquet

from pretraining.data import _standard_library as standard_library
from pretraining.distributed import first_line

from .places import each_once, exists, files_at, is_pattern, kind_of


class Source:
    """Where documents come from: files of one kind, folders of such, a data set on a hub, or Python's own sources.

    Attributes:
        files: what is read.
        unread: other files in the folders.
    """

    def __init__(self, places: list[str], field: str = "text", config: str | None = None, split: str = "train") -> None:
        """places: none of them means Python's own sources."""
        self.field, self.config, self.split = field, config, split
        self.files: list[Path] = []
        self.unread: list[Path] = []
        self.hub, self.kind = "", "" if places else "python"
        missing = [place for place in places if not (exists(place) or is_pattern(place))]
        if missing and len(places) == 1 and missing[0].count("/") <= 1 and not kind_of(Path(missing[0])):
            self.hub, self.kind = missing[0], "hub"
        elif missing:
            raise SystemExit(f"{missing[0]}: no such file or folder, and no name of a data set")
        elif places:
            found = [files_at(place) for place in places]
            self.files = each_once([file for files, _ in found for file in files])
            self.unread = [file for _, unread in found for file in unread]
            kinds = {kind_of(file): file for file in reversed(self.files)}
            if len(kinds) > 1:
                raise SystemExit(f"expected files of one kind, got {', '.join(map(str, sorted(kinds.values())))}")
            self.kind = next(iter(kinds))

    def open(self) -> datasets.IterableDataset:
        """All rows, streamed."""
        if self.kind == "python":
            return datasets.IterableDataset.from_generator(_python_sources)
        if self.kind == "hub":
            with self._one_line():
                return datasets.load_dataset(self.hub, self.config, split=self.split, streaming=True)
        options = {"files": [str(file) for file in self.files], "kind": self.kind, "field": self.field}
        return datasets.IterableDataset.from_generator(rows_of, gen_kwargs=options)

    def read(self, rows: Iterator[dict[str, Any]], count: int) -> list[str]:
        """The texts of so many of an opened source's rows, fewer at its end."""
        with self._one_line():
            block = list(islice(rows, count))
        if self.files:
            return [text_of(row["row"], self.field, f"{row['file']}, {row['place']}") for row in block]
        return [text_of(row, self.field, self.name) for row in block]

    def texts(self) -> Iterator[str]:
        """All of them, from the beginning."""
        rows = iter(self.open())
        while block := self.read(rows, 256):
            yield from block

    @contextlib.contextmanager
    def _one_line(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # an unreachable hub raises anything
            raise SystemExit(f"{self.name} cannot be read: {first_line(error)}") from error

    @property
    def name(self) -> str:
        if self.hub:
            return ":".join(filter(None, (self.hub, self.config, self.split)))
        return _names(self.files) or "Python's own sources"

    @property
    def note(self) -> str:
        """Names what the folders have beside documents; empty: nothing."""
        return f"not read, by their endings: {len(self.unread)} file(s): {_names(self.unread)}" if self.unread else ""

    def identity(self) -> list[Any]:
        """What a resumed run must find again."""
        return [self.kind, self.name, self.field, [[file.name, file.stat().st_size] for file in self.files]]


def _names(files: list[Path]) -> str:
    return ", ".join(file.name for file in files[:3]) + ", .." * (len(files) > 3)


def text_of(row: Any, field: str, place: str) -> str:
    """The text in a row, or in a line of JSON.

    Raises:
        SystemExit: there is none. The line names the place.
    """
    try:
        row = json.loads(row) if isinstance(row, bytes) else row
    except (ValueError, RecursionError) as error:
        raise SystemExit(f"{place}: expected a JSON object, got {reprlib.repr(row)}: {first_line(error)}") from error
    if not isinstance(row, dict):
        raise SystemExit(f"{place}: expected a JSON object, got {reprlib.repr(row)}")
    text = row.get(field)
    if not isinstance(text, str):
        raise SystemExit(f"{place}: expected a string in the field {field!r} (--field), got {reprlib.repr(text)}; "
                         f"there are {', '.join(row)}")  # fmt: skip
    try:
        text.encode()
    except UnicodeEncodeError as error:  # no tokenizer takes it
        raise SystemExit(f"{place}: expected Unicode in the field {field!r}, got {error.reason}") from error
    return text


# ---- files


def rows_of(files: list[str], kind: str, field: str) -> Iterator[dict[str, Any]]:
    """Every row of the files: its file, its place in the file, and the row, as `text_of` takes it."""
    for file in files:
        try:
            with opened(Path(file)) as stream:
                for place, row in _READERS[kind](stream, field):
                    yield {"file": file, "place": place, "row": row}
        except Exception as error:  # a damaged file raises anything
            raise SystemExit(f"{file}: cannot be read: {first_line(error)}") from error


def opened(file: Path) -> BinaryIO:
    """What a file has, decompressed."""
    suffix = file.suffix.lower()
    if suffix == ".zst":  # all of its frames
        return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))
    return {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}.get(suffix, open)(file, "rb")


def _json_rows(stream: BinaryIO, field: str) -> Iterator[tuple[str, Any]]:
    """A row per line, not parsed yet; or the items of one list, where a bare string is a text."""
    is_first = True
    for number, line in enumerate(stream, 1):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if not line.strip():
            continue
        if is_first and line.lstrip().startswith(b"["):
            for item_number, item in enumerate(json.loads(line + stream.read()), 1):
                yield f"item {item_number}", {field: item} if isinstance(item, str) else item
            return
        is_first = False
        yield f"line {number}", line


def _parquet_rows(stream: BinaryIO, field: str) -> Iterator[tuple[str, Any]]:
    table = pyarrow.parquet.ParquetFile(stream)
    names = table.schema_arrow.names
    if field not in names:
        raise ValueError(f"there is no field {field!r} (--field); there are {', '.join(names)}")
    for group in range(table.num_row_groups):
        number = 0
        for batch in table.iter_batches(1024, row_groups=[group], columns=[field]):
            for value in batch.column(field).to_pylist():
                yield f"row group {group}, row {number}", {field: value}
                number += 1


def _text_rows(stream: BinaryIO, field: str) -> Iterator[tuple[str, Any]]:
    """Documents that blank lines separate."""
    lines = io.TextIOWrapper(stream, encoding="utf-8-sig")
    documents = ("".join(lines) for blank, lines in groupby(lines, lambda line: line == "\n") if not blank)
    for number, document in enumerate(documents, 1):
        yield f"document {number}", {field: document.rstrip("\n")}


_READERS = {"json": _json_rows, "parquet": _parquet_rows, "text": _text_rows}


def _python_sources() -> Iterator[dict[str, str]]:
    for source in standard_library():
        yield {"text": source.decode("utf-8", "replace")}
