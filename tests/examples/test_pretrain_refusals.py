"""What examples/pretrain.py refuses, each in one line."""

from __future__ import annotations

import sys

import pytest
import torch

from support.packages import needs
from support.pretrain_forks import EXAMPLES
from test_pretrain import losses, no_picture, refusal  # noqa: F401 (a fixture)

needs("matplotlib")
needs("tqdm")

sys.path.insert(0, str(EXAMPLES))

import pretrain  # noqa: E402
from pretraining.files import locked  # noqa: E402


def test_nothing_is_written_over_unasked(tmp_path, tiny):
    pretrain.main([*tiny, "--out", str(tmp_path), "--norm", "bhyt", "rmsnorm", "--steps", "2"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert "bhyt.jsonl is there: --resume goes on, --overwrite" in refusal(*tiny, "--out", tmp_path)
    assert "bhyt.jsonl is there" in refusal(*tiny, "--out", tmp_path, "--norm", "layernorm")  # nor is its picture
    with locked(tmp_path):
        for flag in ("--resume", "--overwrite"):
            assert "another process writes here" in refusal(*tiny, "--out", tmp_path, flag)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    pretrain.main([*tiny, "--out", str(tmp_path), "--overwrite", "--stop-at", "1"])
    assert losses(tmp_path).keys() == {("valid", 0), ("train", 1)}
    assert (tmp_path / "rmsnorm.pt").read_bytes() == before["rmsnorm.pt"]

    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text("{}")
    exporting = [*tiny, "--out", tmp_path / "other", "--export", tmp_path / "export"]
    assert "config.json is there" in refusal(*exporting)


@pytest.mark.parametrize("arguments, words", [
    ("--heads 0", "heads must be at least 1, got 0"),
    ("--dim 30", "dim must be a multiple of 2 * heads = 8, got 30"),
    ("--layers -1", "layers must be at least 1, got -1"),
    ("--seq-len 100000", "a sequence needs 100001"),
    ("--steps 0", "steps must be at least 1, got 0"),
    ("--stop-at 0", "stop-at must be at least 1, got 0"),
    ("--samples -1", "samples must be at least 0, got -1"),
    ("--warmup -1", "warmup must be at least 0 and below 2^31, got -1"),
    ("--seed -1", "seed must be at least 0 and below 2^31, got -1"),
    ("--lr nan", "lr must be positive, got nan"),
    ("--clip 0", "clip must be positive"),
    ("--accumulate 3", "batch must be a multiple of 1 processes * accumulate 3, got 8"),
    ("--text missing.txt", "text cannot be read: [Errno 2] No such file or directory: 'missing.txt'"),
    ("--device banana", "--device banana: "),
    ("--device meta", "--device meta: "),
    ("--export folder --norm dyt", "--export: transformers has no model with dyt"),
    ("--out /dev/null", "/dev/null"),
], ids=lambda value: value.split()[0] if value.startswith("--") else "")  # fmt: skip
def test_bad_arguments_are_one_line(tmp_path, tiny, arguments, words):
    out = [] if "--out" in arguments else ["--out", tmp_path / "out"]
    assert words in refusal(*tiny, *out, *arguments.split()) and not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_line(tmp_path, tiny):
    assert "--device cuda: " in refusal(*tiny, "--out", tmp_path, "--device", "cuda")


@pytest.mark.parametrize("arguments, words", [
    ("--steps many", "argument --steps: invalid int value: 'many'"),
    ("--norm nothing", "argument --norm: invalid choice: 'nothing'"),
    ("--resume --overwrite", "argument --overwrite: not allowed with argument --resume"),
    ("--speed 3", "unrecognized arguments: --speed 3"),
])  # fmt: skip
def test_what_cannot_be_parsed_is_one_line(capsys, monkeypatch, arguments, words):
    """Of the process that speaks, however many there are."""
    for rank, lines in ("0", 1), ("1", 0):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit, match="2"):
            pretrain.main(arguments.split())
        error = capsys.readouterr().err
        assert error.count("\n") == lines and (words in error) == bool(lines)


def test_a_batch_that_the_processes_cannot_share(tmp_path, tiny, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "batch must be a multiple of 3 processes * accumulate 1, got 8" in refusal(*tiny, "--out", tmp_path)
