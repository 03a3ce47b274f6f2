"""Documents from files or a hub, which of them are held out, the tokenizer, and sequences packed from them.

The text is split into a fixed number of streams: stream j has the documents j, j + n, .. (or whole files, where there
are enough), and packs them on its own. A step takes equally many sequences from every stream, so that its batch does
not depend on how many processes share the streams, each document is tokenised by one process only, and where a run
stands is one position per stream.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pretraining.data import _standard_library as standard_library
from pretraining.distributed import first_line

BLOCK = 256  # documents that a stream reads, shuffles and tokenises at a time
END = "<|endoftext|>"
_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
_COMPRESSED = (".gz", ".zst", ".xz", ".bz2")


# ---- documents


class Source:
    """Where documents come from: files of one kind, folders of such, a data set on a hub, or Python's own sources."""

    def __init__(self, places: list[str], field: str = "text", config: str | None = None, split: str = "train") -> None:
        """places: none of them means Python's own sources."""
        self.field, self.config, self.split = field, config, split
        self.files, self.hub = [], ""
        self.kind = "python" if not places else ""
        missing = [place for place in places if not Path(place).exists()]
        if missing and len(places) == 1 and missing[0].count("/") <= 1 and not _kind(Path(missing[0])):
            self.hub, self.kind = missing[0], "hub"
        elif missing:
            raise SystemExit(f"{missing[0]}: no such file or folder, and no name of a data set")
        elif places:
            self.files = [file for place in places for file in _files(Path(place))]
            kinds = sorted({_kind(file) for file in self.files})
            if len(kinds) > 1:
                raise SystemExit(f"--data: expected files of one kind, got {', '.join(kinds)}")
            self.kind = kinds[0]

    def open(self) -> datasets.IterableDataset:
        """All documents, streamed; a plain text file's are separated by blank lines."""
        if self.kind == "python":
            return datasets.IterableDataset.from_generator(_python_sources)
        if self.kind == "hub":
            with self._one_line():
                return datasets.load_dataset(self.hub, self.config, split=self.split, streaming=True)
        options = {"sample_by": "paragraph"} if self.kind == "text" else {}
        files = [str(file) for file in self.files]
        with self._one_line():
            return datasets.load_dataset(self.kind, data_files=files, split="train", streaming=True, **options)

    def read(self, rows: Iterator[dict[str, Any]], count: int) -> list[str]:
        """The texts of so many of an opened source's rows, fewer at its end."""
        with self._one_line():
            block = list(islice(rows, count))
        for row in block:
            if not isinstance(row.get(self.field), str):
                raise SystemExit(f"{self.name}: expected a string in the field {self.field!r} (--field), got "
                                 f"{row.get(self.field)!r}; there are {', '.join(row)}")  # fmt: skip
        texts = [row[self.field] for row in block]
        return [text.rstrip("\n") for text in texts] if self.kind == "text" else texts  # a file ends with a newline

    def texts(self) -> Iterator[str]:
        """All of them, from the beginning."""
        rows = iter(self.open())
        while block := self.read(rows, BLOCK):
            yield from block

    @contextlib.contextmanager
    def _one_line(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # what a damaged file or an unreachable hub raises is anything
            raise SystemExit(f"{self.name} cannot be read: {first_line(error)}") from error

    @property
    def name(self) -> str:
        if self.hub:
            return ":".join(filter(None, (self.hub, self.config, self.split)))
        return (
            ", ".join(file.name for file in self.files[:3]) + ", .." * (len(self.files) > 3) or "Python's own sources"
        )

    def identity(self) -> list[Any]:
        """What a resumed run must find again."""
        return [self.kind, self.name, self.field, [[file.name, file.stat().st_size] for file in self.files]]


def _kind(file: Path) -> str:
    """The loader for a file's suffix, or nothing."""
    suffixes = [suffix for suffix in file.suffixes if suffix not in _COMPRESSED]
    return _KINDS.get(suffixes[-1], "") if suffixes else ""


def _files(place: Path) -> list[Path]:
    if place.is_dir():
        found = sorted(file for file in place.rglob("*") if file.is_file() and _kind(file))
    else:
        found = [place] if _kind(place) else []
    if not found:
        raise SystemExit(f"{place}: expected {', '.join(_KINDS)}, or a folder with such files")
    return found


def _python_sources() -> Iterator[dict[str, str]]:
    for source in standard_library():
        yield {"text": source.decode("utf-8", "replace")}


# ---- what is held out


class HeldOut:
    """Which documents are not trained on, decided by their text alone: its copies are not either."""

    def __init__(self, share: float = 0.0, texts: Iterable[str] = ()) -> None:
        """share: of all documents. texts: further ones."""
        self._below = int(share * 2**64)
        self._prints = {fingerprint(text) for text in texts}

    def __contains__(self, text: str) -> bool:
        value = fingerprint(text)
        return value < self._below or value in self._prints


def fingerprint(text: str) -> int:
    """64 bits of it, evenly distributed."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


# ---- tokens


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every text has tokens, and they give it back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, clean_up_tokenization_spaces=False)


def load_tokenizer(place: str) -> PreTrainedTokenizerFast:
    """From a folder or a hub; it needs an end-of-sequence token, which packing puts behind every document."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"{place}: cannot be loaded as a tokenizer: {first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise SystemExit(f"{place}: the tokenizer has no end-of-sequence token, which separates documents")
    return tokenizer


def tokens_of(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """[N] int32: the documents one after another, each with the end-of-sequence token behind it, nothing else added."""
    if not texts:
        return np.empty(0, np.int32)
    ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return np.concatenate([np.asarray([*document, tokenizer.eos_token_id], np.int32) for document in ids])


def pack(tokens: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """[N] -> whole sequences [N // seq_len, seq_len], cut wherever one is full, and what is left over."""
    whole = len(tokens) // seq_len * seq_len
    return tokens[:whole].reshape(-1, seq_len), tokens[whole:]


# ---- sequences to train on


class Stream:
    """Stream `number` of `count`: endless sequences, [seq_len] int32; can be put back where it was."""

    def __init__(
        self, source: Source, number: int, count: int, tokenizer: Any, seq_len: int, held_out: HeldOut, seed: int = 0
    ) -> None:
        self._source, self._number, self._count = source, number, count
        self._tokenizer, self._seq_len, self._held_out, self._seed = tokenizer, seq_len, held_out, seed
        self._reader = ThreadPoolExecutor(1)
        self.load_state_dict({"epoch": 0, "block": 0, "documents": None, "rest": [], "taken": 0})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rest, self._taken = np.asarray(state["rest"], np.int32), state["taken"]
        self._blocks = self._read(state["epoch"], state["block"], state["documents"])
        self._next: Future | None = None  # the block behind the current one, read while that one is trained on
        self._sequences: np.ndarray | None = None  # of the current block, with the rest of the one before

    def state_dict(self) -> dict[str, Any]:
        """Where the current block begins, what was left over in front of it, and the sequences taken since."""
        if self._sequences is None:
            self._advance(self._rest, self._taken)
        return {**self._begin, "rest": self._rest.tolist(), "taken": self._taken}

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        if self._sequences is None:
            self._advance(self._rest, self._taken)
        while self._taken == len(self._sequences):
            self._advance(self._left, 0)
        self._taken += 1
        return self._sequences[self._taken - 1]

    def _advance(self, rest: np.ndarray, taken: int) -> None:
        self._begin, tokens = (self._next or self._reader.submit(next, self._blocks)).result()
        self._next = self._reader.submit(next, self._blocks)
        self._rest, self._taken = rest, taken
        self._sequences, self._left = pack(np.concatenate((rest, tokens)), self._seq_len)

    @property
    def epoch(self) -> int:
        """How often the current block has been read before."""
        return self._begin["epoch"] if self._sequences is not None else 0

    def _read(self, epoch: int, block: int, documents: Any) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        """(where it begins, its tokens) of block after block."""
        while True:
            dataset = split_dataset_by_node(self._source.open(), self._number, self._count)
            if documents is not None:
                dataset.load_state_dict(documents)
            rows, found = iter(dataset), block > 0
            while True:
                begin = {"epoch": epoch, "block": block, "documents": copy.deepcopy(documents)}
                read = self._source.read(rows, BLOCK)
                if not read:
                    break
                documents, block = dataset.state_dict(), block + 1
                texts = [text for text in read if text and text not in self._held_out]
                found = found or bool(texts)
                order = np.random.default_rng((self._seed, self._number, epoch, block)).permutation(len(texts))
                yield begin, tokens_of([texts[i] for i in order], self._tokenizer)
            if not found:
                raise SystemExit(f"{self._source.name}: stream {self._number + 1} of {self._count} has no document to "
                                 "train on; give more text, or fewer --streams")  # fmt: skip
            epoch, block, documents = epoch + 1, 0, None


class Sequences(torch.utils.data.IterableDataset):
    """What one process trains on: a sequence from each of its streams in turn."""

    def __init__(self, streams: list[Stream], on_epoch: Callable[[int], None] = lambda epoch: None) -> None:
        """on_epoch: told when the text begins anew."""
        self.streams, self._on_epoch, self._epoch = streams, on_epoch, 0
        self.ended = False  # nothing more is trained on

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        while not self.ended:
            for stream in self.streams:
                yield example(next(stream))
                if stream.epoch > self._epoch:
                    self._epoch = stream.epoch
                    self._on_epoch(self._epoch)

    def state_dict(self) -> list[dict[str, Any]]:
        return [stream.state_dict() for stream in self.streams]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for stream, state in zip(self.streams, states, strict=True):
            stream.load_state_dict(state)
        self._epoch = max(state["epoch"] for state in states)


def example(sequence: np.ndarray) -> dict[str, torch.Tensor]:
    """As the models of `transformers` take it: they shift the labels themselves."""
    ids = torch.from_numpy(sequence.astype(np.int64))
    return {"input_ids": ids, "labels": ids}


def evaluation(texts: Iterable[str], tokenizer: Any, seq_len: int, count: int) -> list[dict[str, torch.Tensor]]:
    """At most `count` packed sequences from the first of the texts."""
    texts, tokens = iter(texts), np.empty(0, np.int32)
    while len(tokens) < count * seq_len and (block := list(islice(texts, BLOCK))):
        tokens = np.concatenate((tokens, tokens_of(block, tokenizer)))
    return [example(sequence) for sequence in pack(tokens, seq_len)[0][:count]]


def whole_batches(held_out: list[Any], streams: int) -> list[Any]:
    """As many as all processes have equally many of, whatever their number."""
    count = len(held_out) // streams * streams
    if not count:
        raise SystemExit(f"too little held-out text: {len(held_out)} sequences for {streams} streams; give more "
                         "text, a larger --held-out or a smaller --seq-len")  # fmt: skip
    return held_out[:count]
