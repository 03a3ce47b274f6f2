"""The documents of examples/pretrain_hf.py: which files its places stand for, and which part of a row is read."""

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path
from typing import Any

import pytest

from hf_runs import no_network  # noqa: F401 (a fixture)

import pretrain_hf
import pyarrow
import pyarrow.parquet
from pretraining_hf.documents import Source
from pretraining_hf.presets import PRESETS

COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress,
            ".zst": lambda data: b"".join(pyarrow.compress(data[part], "zstd", asbytes=True)  # two frames
                                          for part in (slice(9), slice(9, None)))}  # fmt: skip


def write(path: Path, rows: list[Any]) -> Path:
    """The rows in a file of the kind that its name says. Parquet: two rows in a group."""
    path.parent.mkdir(parents=True, exist_ok=True)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1] == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
        return path
    text = json.dumps(rows, indent=1) if suffixes[0] == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(COMPRESS[suffixes[1] if suffixes[1:] else ""](text.encode()))
    return path


def texts_at(*places: Any) -> list[str]:
    return sorted(Source([str(place) for place in places]).texts())


def reason(*places: Any, **options: Any) -> str:
    """Why the places are refused: one line."""
    with pytest.raises(SystemExit) as error:
        list(Source([str(place) for place in places], **options).texts())
    message = str(error.value)
    assert message and "\n" not in message
    return message


# ---- places


def test_each_real_file_once(tmp_path: Path) -> None:
    """Linked folders and files are read, as are capital endings; loops end; second names of a file add nothing."""
    names = ["a.jsonl", "B.JSONL", "sub/C.Json", "sub.jsonl/d.jsonl.Gz", "e.JSONL.ZST", "f.jsonl.XZ", "g.Jsonl.bz2"]
    real, data = tmp_path / "real", tmp_path / "data"
    for name in names:
        write(real / name, [{"text": name}])
    write(tmp_path / "elsewhere" / "h.jsonl", [{"text": "h"}])
    data.mkdir()
    (data / "linked").symlink_to(real)
    (data / "once-more").symlink_to(real / "sub")
    (data / "h.jsonl").symlink_to(tmp_path / "elsewhere" / "h.jsonl")
    (data / "a-second-name.jsonl").hardlink_to(real / "a.jsonl")
    (real / "loop").symlink_to(data)
    (real / "self").symlink_to(real)
    assert texts_at(data) == texts_at(data, real, data / "h.jsonl") == texts_at(f"{data}/*") == sorted([*names, "h"])


def test_nothing_is_left_out_silently(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A folder's other files are named; empty ones harm nothing; what cannot be looked at ends the run."""
    for number in range(300):
        write(tmp_path / "data" / f"{number}.jsonl", [{"text": f"document {number}"}] if number % 100 else [])
    for name in ("README.md", "part.csv", "part.jsonl.zip"):
        (tmp_path / "data" / name).write_text("text,\n")
    arguments = pretrain_hf.parse_arguments(["--data", str(tmp_path / "data")], "a\n\nb")
    source, _, _ = pretrain_hf.documents(arguments, PRESETS["tiny"])
    assert len(list(source.texts())) == 297
    assert "3 file(s): README.md, part.csv, part.jsonl.zip" in capsys.readouterr().out

    data = tmp_path / "other"
    write(data / "a.jsonl", [{"text": "a"}])
    (data / "b.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    assert reason(data) == f"{data / 'b.jsonl'}: expected a file, got a broken link"
    (data / "b.jsonl").unlink()
    (data / "b.txt").write_text("b")
    assert reason(data) == f"expected files of one kind, got {data / 'a.jsonl'}, {data / 'b.txt'}"
    (data / "b.txt").unlink()
    (data / "c.parquet").touch()
    assert f"{data / 'c.parquet'}: cannot be read: " in reason(data / "c.parquet")


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends the run. (Permissions do not keep root out: the system call is made to fail.)"""
    write(tmp_path / "a.jsonl", [{"text": "a"}])
    closed = write(tmp_path / "closed" / "b.jsonl", [{"text": "b"}]).parent
    scandir = os.scandir

    def refuse(place: Any) -> Any:
        if Path(place) == closed:
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refuse)
    assert reason(tmp_path) == f"{closed}: cannot be read: Permission denied"


def test_paths_and_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that exists is no pattern, whatever its name; elsewhere a pattern is one, behind folders that exist."""
    monkeypatch.chdir(tmp_path)
    names = ["a[1]/x.jsonl", "a1/x.jsonl", "b*.jsonl", "b1.jsonl", "c?.jsonl", "c1.jsonl", "[!d].jsonl", "e/::f.jsonl"]
    for name in names:
        write(Path(name), [{"text": name}])
    for place, expected in {
        **{name: [name] for name in names}, "a[1]": [names[0]], "a[1]/*.jsonl": [names[0]], "a[2]": [],
        "a?/x.jsonl": [names[1]], "[bc]1.jsonl": ["b1.jsonl", "c1.jsonl"], "*.parquet": [], "*/x.jsonl": names[:2],
        "*": names,
    }.items():  # fmt: skip
        for given in (place, str(tmp_path / place)):
            if expected:
                assert texts_at(given) == sorted(expected), given
            else:
                assert reason(given) == f"{given}: no such file or folder, and as a pattern it matches nothing"
    assert "** is no pattern here" in reason("**/x.jsonl")


# ---- rows


OTHERS = [{"n": 1, "m": None}, {"n": "one", "m": {"a": 1}}, {"l": [1]}, {"n": {"a": [1]}, "m": {"b": "c"}}, {"n": None}]


@pytest.mark.parametrize("name", [*(f"{{}}.jsonl{ending}" for ending in COMPRESS), "{}.json", "{}.json.gz"])
@pytest.mark.parametrize("order", [1, -1])
def test_other_fields_of_json(order: int, name: str, tmp_path: Path) -> None:
    """They may come, go, be null and change their type, between files and, in the last one, within."""
    others = [*([other] * 3 for other in OTHERS[::order]), OTHERS]
    for part, rows in enumerate(others):
        write(tmp_path / name.format(part), [{**row, "text": f"{part} {i}"} for i, row in enumerate(rows)])
    assert texts_at(tmp_path) == [f"{part} {i}" for part, rows in enumerate(others) for i in range(len(rows))]


def test_other_fields_of_parquet(tmp_path: Path) -> None:
    for part, other in enumerate(OTHERS):
        write(tmp_path / f"{part}.parquet", [{**other, "text": f"{part} {i}"} for i in range(5)])
    assert texts_at(tmp_path) == sorted(f"{part} {i}" for part in range(5) for i in range(5))


@pytest.mark.parametrize("bad", [{"text": None}, {}, {"text": 7}, {"text": ["a"]}, {"text": {"a": "b"}}], ids=str)
@pytest.mark.parametrize("name", ["b.jsonl", "b.jsonl.gz", "b.jsonl.zst", "b.json", "b.parquet"])
def test_a_row_without_text(name: str, bad: dict[str, Any], tmp_path: Path) -> None:
    """It is named by file and line, item or row, wherever it stands, and whatever is in front of it."""
    good = [{"text": f"document {i}", "n": i} for i in range(3)]
    first = tmp_path / f"a{name[1:]}"
    path = tmp_path / name
    write(first, good)
    is_parquet = path.suffix == ".parquet"
    if is_parquet and bad.get("text") is not None:
        write(path, [bad] * 4)  # a column has one type
        place = "row group 0, row 0"
    elif is_parquet and not bad:
        write(path, [{"n": 1}])
        assert reason(tmp_path) == f"{path}: cannot be read: there is no field 'text' (--field); there are n"
        return
    else:
        write(path, [*good, bad, *good])
        place = {"jsonl": "line 4", "json": "item 4", "parquet": "row group 1, row 1"}[name.split(".")[1]]
    expected = f"{path}, {place}: expected a string in the field 'text' (--field), got {bad.get('text')!r}"
    assert reason(tmp_path).startswith(expected)


def test_a_line_that_is_none(tmp_path: Path) -> None:
    """No JSON, no object, no Unicode; a file that ends too early. Blank lines, a byte order mark, CRLF are harmless."""
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"text": "one\u2028"}\r\n\r\n  \n{"text": "\\ud83d\\ude00"}'.encode())
    assert texts_at(path) == sorted(["one\u2028", "\U0001f600"])
    for line, part in ((b"{\n", "got b'{\\n': "), (b'"text"\n', "expected a JSON object, got 'text'"),
                       (b'{"text": "\\ud83d"}\n', "expected Unicode in the field 'text'"),
                       (b'{"text": "\xff"}\n', "can't decode byte 0xff")):  # fmt: skip
        path.write_bytes(b'{"text": "one"}\n\n' + line)
        message = reason(path)
        assert message.startswith(f"{path}, line 3: ") and part in message
    for ending in (".gz", ".xz", ".bz2", ".zst"):
        path = write(tmp_path / f"b.jsonl{ending}", [{"text": str(i)} for i in range(999)])
        path.write_bytes(path.read_bytes()[:-20])
        assert reason(path).startswith(f"{path}: cannot be read: "), ending


def test_plain_text(tmp_path: Path) -> None:
    """Blank lines separate, however many; a line of spaces is no blank one."""
    path = tmp_path / "a.TXT.gz"
    path.write_bytes(gzip.compress("\n\none\r\n \ntwo\n\n\n\nthree\n\n".encode()))
    assert list(Source([str(path)]).texts()) == ["one\n \ntwo", "three"]
