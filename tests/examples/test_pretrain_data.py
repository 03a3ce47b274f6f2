"""The data of examples/pretrain_hf.py: packing, streams and where they go on, what is held out."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_runs import corpus, no_network  # noqa: F401 (fixtures)

import datasets
import pretrain_hf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AddedToken, ByT5Tokenizer, PreTrainedTokenizerFast

from pretraining.distributed import World
from pretraining_hf import data as data_module
from pretraining_hf.data import (
    HeldOut,
    Sequences,
    Stream,
    evaluation,
    example,
    load_tokenizer,
    pack,
    tokens_of,
    train_tokenizer,
)
from pretraining_hf.documents import Source
from pretraining_hf.folder import checked_tokenizer
from pretraining_hf.presets import PRESETS
from pretraining_hf.train import load_position


@pytest.fixture(scope="module")
def tokenizer(corpus: Path) -> Any:
    return train_tokenizer(Source([str(corpus)]).texts(), 384)


def test_packing(tokenizer: Any) -> None:
    """Documents with the end token behind each, in order; cut where a sequence is full; nothing lost, nothing added."""
    texts = ["one two", "three", "", "four five six"]
    end, tokens = tokenizer.eos_token_id, tokens_of(texts, tokenizer)
    assert tokens.tolist() == [id for text in texts for id in [*tokenizer.encode(text, add_special_tokens=False), end]]
    assert (tokens == end).sum() == 4 and tokens_of([], tokenizer).size == 0
    for seq_len in (2, 5, len(tokens), len(tokens) + 1):
        sequences, left = pack(tokens, seq_len)
        assert sequences.shape == (len(tokens) // seq_len, seq_len) and len(left) == len(tokens) % seq_len
        assert np.array_equal(np.concatenate((sequences.ravel(), left)), tokens)
    row = example(pack(np.arange(10), 5)[0][1])
    assert row["input_ids"].tolist() == row["labels"].tolist() == [5, 6, 7, 8, 9] and row["labels"].dtype == torch.int64


def tokenizer_of(kind: str, tokenizer: Any, folder: Path) -> str:
    """A folder with a user's tokenizer."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    if kind == "another end":  # which the file calls an ordinary added token
        backend.add_tokens(["<end>"])
        made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", bos_token="<begin>")
    elif kind == "more special tokens":
        made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="[PAD]",
                                       extra_special_tokens=["<|user|>", "<image>"])  # fmt: skip
        made.add_tokens([AddedToken("<|reserved|>", special=True), AddedToken("<tool>", special=False), "  "])
    elif kind == "not fast":
        made = ByT5Tokenizer(extra_ids=3)
    else:
        words = {"<unk>": 0, "</s>": 1, "a": 2, "b": 3}
        unigram = models.Unigram([(word, -5.0 if word in "ab" else 0.0) for word in words], unk_id=0)
        backend = Tokenizer(unigram if kind == "unigram" else models.WordLevel(words, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    made.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["trained", "another end", "more special tokens", "not fast"])
def test_special_tokens_in_text_are_text(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    """Of any tokenizer, to train on and to evaluate on: a document ends where it ends, and its tokens give it back;
    ordinary added tokens stay what they are, and the folder that is saved again reads special tokens as before."""
    place = tokenizer_of(kind, tokenizer, tmp_path / "user") if kind != "trained" else str(tmp_path / "user")
    if kind == "trained":
        tokenizer.save_pretrained(place)
    loaded = load_tokenizer(place)
    assert loaded.is_fast == (kind != "not fast")
    added = loaded.added_tokens_decoder.values()
    special = {*loaded.all_special_tokens, *(str(token) for token in added if token.special)}
    spelled = [text for token in sorted(special) for text in (token, f"one{token}two", f" {token} {token}")]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in spelled))
    end = loaded.eos_token_id
    texts = list(Source([str(path)]).texts())
    trained_on = taken(Stream(Source([str(path)]), 0, 1, loaded, len(tokens_of(texts, loaded)), HeldOut()), 1)[0]
    evaluated = evaluation(texts, loaded, len(trained_on), 1)[0]["input_ids"].tolist()
    numbers = set(loaded.convert_tokens_to_ids(sorted(special))) - {end}
    for tokens in (trained_on, evaluated):
        ends = [i for i, token in enumerate(tokens) if token == end]
        documents = [loaded.decode(tokens[i + 1 : j]) for i, j in zip([-1, *ends], ends)]
        assert sorted(documents) == sorted(spelled) and not numbers.intersection(tokens)
    if kind == "more special tokens":
        ordinary = loaded.convert_tokens_to_ids(["<tool>", "  "])
        assert tokens_of(["<tool>  "], loaded).tolist() == [*ordinary, end]
    loaded.save_pretrained(tmp_path / "again")
    assert load_tokenizer(str(tmp_path / "again"))(f"a{loaded.eos_token}")["input_ids"].count(end) >= 1


@pytest.mark.parametrize("kind", ["unigram", "words"])
def test_tokenizers_that_cannot_tell(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    """A tokenizer whose model has a special token as a word of text is refused in one line."""
    place = tokenizer_of(kind, tokenizer, tmp_path / "user")
    with pytest.raises(SystemExit, match="takes '</s>' in a text for its special token") as error:
        load_tokenizer(place)
    assert "\n" not in str(error.value) and str(error.value).startswith(place)


def test_ids_beyond_the_embedding(tokenizer: Any, tmp_path: Path) -> None:
    """What counts is the largest id, of added tokens too, not how many there are: one line, before a model is built."""
    count = len(tokenizer)
    holes = json.loads(tokenizer.backend_tokenizer.to_str())
    holes["model"]["vocab"]["zz"] = 999
    for name, backend, largest in (("holes", Tokenizer.from_str(json.dumps(holes)), 999),
                                   ("added", tokenizer.backend_tokenizer, count)):  # fmt: skip
        made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
        if name == "added":
            made.add_tokens(["<tool>"])
        place = str(tmp_path / name)
        made.save_pretrained(place)
        assert len(made) == count + 1 and max(made.get_vocab().values()) == largest
        expected = f"--vocab-size: expected at least the {count + 1} tokens of {place}, whose largest id is {largest}"
        with pytest.raises(SystemExit) as error:
            checked_tokenizer(place, largest)
        assert str(error.value) == f"{expected}, got {largest}"
        assert len(checked_tokenizer(place, largest + 1)) == count + 1


def write(folder: Path, kind: str, texts: list[str]) -> list[str]:
    """The texts in two files."""
    half = len(texts) // 2
    for name, part in (("a", texts[:half]), ("b", texts[half:])):
        path = folder / f"{name}.{kind}"
        if kind == "txt":
            path.write_text("\n\n".join(part) + "\n")
        else:
            table = datasets.Dataset.from_dict({"text": part, "number": list(range(len(part)))})
            table.to_parquet(path) if kind == "parquet" else table.to_json(path)
    return [str(folder)]


def taken(stream: Stream, count: int) -> list[list[int]]:
    return [next(stream).tolist() for _ in range(count)]


@pytest.mark.parametrize("kind, streams", (("jsonl", 2), ("jsonl", 3), ("parquet", 3), ("txt", 1)))
def test_streams(kind: str, streams: int, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each epoch of all streams together has every document that is not held out once, in an order of its own; a stream
    goes on from any of its positions, whether files are shared out whole or not, across blocks and epochs."""
    monkeypatch.setattr(data_module, "BLOCK", 7)
    texts = [f"document {i} has {i * i} words" for i in range(60)]
    held_out = HeldOut(texts=texts[::10])
    source = Source(write(tmp_path, kind, texts))
    assert sorted(source.texts()) == sorted(texts)
    made = [Stream(source, j, streams, tokenizer, 16, held_out, seed=5) for j in range(streams)]
    epochs: list[list[str]] = [[], []]
    for j, stream in enumerate(made):
        expected = taken(stream, 150)
        documents = tokenizer.decode(list(itertools.chain(*expected))).split("<|endoftext|>")
        count = len(set(documents[:-1]))  # the last one is cut
        first, second = documents[:count], documents[count : 2 * count]
        assert len(documents) > 2 * count and first != second
        epochs[0] += first
        epochs[1] += second
        for at in (0, 1, 2, 13, 77, 149):
            again = Stream(source, j, streams, tokenizer, 16, held_out, seed=5)
            taken(again, at)
            position = json.loads(json.dumps(again.state_dict()))
            other = Stream(source, j, streams, tokenizer, 16, held_out, seed=5)
            other.load_state_dict(position)
            assert taken(other, 150 - at) == expected[at:], at
    rest = [text for text in texts if text not in texts[::10]]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(rest)


def test_held_out_text_is_not_trained_on(tmp_path: Path) -> None:
    """A share of the documents, by their text, so that copies go with it; or given texts."""
    texts = [f"document {i}" for i in range(4000)]
    held_out = HeldOut(0.1)
    chosen = {text for text in texts if text in held_out}
    assert 320 < len(chosen) < 480  # four standard deviations
    assert {text for text in texts[::-1] if text in HeldOut(0.1)} == chosen
    assert {text for text in texts if text in HeldOut(0.05)} < chosen
    given = HeldOut(texts=texts[:3])
    assert [text for text in texts if text in given] == texts[:3]

    path, other = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    other.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[100:103]))
    for options, expected in (([], None), (["--eval-data", str(other)], texts[100:103])):
        arguments = pretrain_hf.parse_arguments(
            ["--data", str(path), "--eval-split", "train", *options], pretrain_hf.__doc__
        )
        source, held_out, to_evaluate = pretrain_hf.documents(arguments, PRESETS["tiny"])
        to_evaluate, trained_on = list(to_evaluate), [text for text in source.texts() if text not in held_out]
        assert set(to_evaluate).isdisjoint(trained_on) and sorted([*to_evaluate, *trained_on]) == sorted(texts)
        assert to_evaluate if expected is None else to_evaluate == expected


def test_more_processes_go_on(corpus: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Two processes get the streams that one process had, each its own, where it was."""
    streams = [Stream(Source([str(corpus)]), number, 2, tokenizer, 48, HeldOut()) for number in (0, 1)]
    for stream, count in zip(streams, (5, 9)):
        taken(stream, count)
    (tmp_path / "data.json").write_text(json.dumps(Sequences(streams).state_dict()))
    for rank in (0, 1):
        mine = Sequences([Stream(Source([str(corpus)]), rank, 2, tokenizer, 48, HeldOut())])
        load_position(tmp_path, mine, World(rank, 2))
        assert taken(mine.streams[0], 8) == taken(streams[rank], 8)


def test_begin(corpus: Path, tokenizer: Any, tmp_path: Path) -> None:
    """A stream that has begun is where it was, and goes on with the same sequences. One that has nothing to train on,
    or a row that cannot be read, ends there in one line."""
    one, other = (Stream(Source([str(corpus)]), 1, 2, tokenizer, 48, HeldOut()) for _ in range(2))
    for _ in range(2):
        before = one.state_dict()
        Sequences([one]).begin()
        assert one.state_dict() == before == other.state_dict()
        assert taken(one, 7) == taken(other, 7)

    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    for number in (0, 1):
        with pytest.raises(SystemExit, match=f"stream {number + 1} of 2 has no document to train on"):
            Stream(Source([str(path)]), number, 2, tokenizer, 48, HeldOut(texts="ab")).begin()
    path.write_text('{"text": "a"}\n{"text": 1}\n')
    with pytest.raises(SystemExit, match="line 2: expected a string in the field 'text'"):
        Stream(Source([str(path)]), 0, 1, tokenizer, 48, HeldOut()).begin()
