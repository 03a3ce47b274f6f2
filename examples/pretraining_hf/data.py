"""Which documents are held out, the tokenizer, and sequences packed from documents.

The text is split into a fixed number of streams: stream j has the documents j, j + n, .. (or whole files, where there
are enough), and packs them on its own. A step takes equally many sequences from every stream, so that its batch does
not depend on how many processes share the streams, each document is tokenised by one process only, and where a run
stands is one position per stream.

`datasets` splits the rows into streams (`split_dataset_by_node`) and keeps the place of a stream in the text
(`IterableDataset.state_dict`). It does not shuffle and tokenise here, since two guarantees would be lost:

* `IterableDataset.shuffle` forgets its buffer when it resumes, so the documents in it would never be trained on. A
  block that is shuffled as a whole is made again, from the place where it begins.
* `IterableDataset.map` runs in front of the split, so each process would tokenise the documents of all streams.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from typing import Any, Callable, Iterable, Iterator

import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pretraining.distributed import first_line

from .documents import Source

BLOCK = 256  # documents that a stream reads, shuffles and tokenises at a time
END = "<|endoftext|>"
SPLITTING = (PreTrainedTokenizer, PreTrainedTokenizerFast)  # mistral-common's take text for text without being told


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


def load_tokenizer(place: str) -> PreTrainedTokenizerBase:
    """From a folder or a hub. Packing puts its end-of-sequence token behind every document.

    Raises:
        SystemExit: it has no such token, or takes text for one of its special tokens.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"{place}: cannot be loaded as a tokenizer: {first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise SystemExit(f"{place}: the tokenizer has no end-of-sequence token, which separates documents")
    if isinstance(tokenizer, SPLITTING):
        tokenizer.add_tokens(tokenizer.all_special_tokens, special_tokens=True)  # its file may call them ordinary ones
    for token in sorted(special_tokens(tokenizer)):
        number, texts = tokenizer.convert_tokens_to_ids(token), [token, f"a{token}b", f"a {token} b"]
        if any(number in ids for ids in token_ids(texts, tokenizer)):
            raise SystemExit(f"{place}: the tokenizer takes {token!r} in a text for its special token, which ends or "
                             "marks documents; give another tokenizer")  # fmt: skip
    return tokenizer


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """All of them, but the one for unknown text, which text may have."""
    tokens = set(tokenizer.all_special_tokens)
    if isinstance(tokenizer, SPLITTING):
        tokens |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tokens - ({tokenizer.unk_token} - {tokenizer.eos_token})


def token_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Of each text, with nothing added; special tokens that a text spells are text."""
    options = dict(add_special_tokens=False, return_attention_mask=False, verbose=False)
    if isinstance(tokenizer, SPLITTING):
        options["split_special_tokens"] = True
    return tokenizer(texts, **options)["input_ids"]


def tokens_of(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """[N] int32: the documents one after another, each with the end-of-sequence token behind it, nothing else added."""
    if not texts:
        return np.empty(0, np.int32)
    end = tokenizer.eos_token_id
    return np.concatenate([np.asarray([*document, end], np.int32) for document in token_ids(texts, tokenizer)])


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
        self.load_state_dict({"epoch": 0, "block": 0, "documents": None, "rest": [], "taken": 0})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state, self._sequences = state, self._packed(**state)

    def state_dict(self) -> dict[str, Any]:
        """Where the current block begins, what was left over in front of it, and the sequences taken since."""
        return {**self._state, "rest": np.asarray(self._state["rest"]).tolist()}

    @property
    def epoch(self) -> int:
        """How often the current block has been read before."""
        return self._state["epoch"]

    def begin(self) -> None:
        """Make the next sequence already, so that a text that cannot be read ends the run here."""
        self._sequences = chain([next(self._sequences)], self._sequences)

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        self._state, sequence = next(self._sequences)
        return sequence

    def _packed(self, rest: Any, taken: int, **place: Any) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        """(the state behind it, a sequence), one after another."""
        rest = np.asarray(rest, np.int32)
        for begin, tokens in ahead(self._blocks(**place)):
            sequences, left = pack(np.concatenate((rest, tokens)), self._seq_len)
            for i in range(taken, len(sequences)):
                yield {**begin, "rest": rest, "taken": i + 1}, sequences[i]
            rest, taken = left, 0

    def _blocks(self, epoch: int, block: int, documents: Any) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        """(where it begins, its tokens) of block after block."""
        while True:
            dataset = split_dataset_by_node(self._source.open(), self._number, self._count)
            if documents is not None:
                dataset.load_state_dict(documents)
            rows, found = iter(dataset), block > 0
            while read := self._source.read(rows, BLOCK):
                texts = [text for text in read if text and text not in self._held_out]
                found = found or bool(texts)
                order = np.random.default_rng((self._seed, self._number, epoch, block + 1)).permutation(len(texts))
                begin = {"epoch": epoch, "block": block, "documents": documents}
                yield begin, tokens_of([texts[i] for i in order], self._tokenizer)
                documents, block = dataset.state_dict(), block + 1
            if not found:
                raise SystemExit(f"{self._source.name}: stream {self._number + 1} of {self._count} has no document to "
                                 "train on; give more text, or fewer --streams")  # fmt: skip
            epoch, block, documents = epoch + 1, 0, None


def ahead(items: Iterator[Any]) -> Iterator[Any]:
    """Endless items; a thread makes the next one while the current one is used."""
    reader = ThreadPoolExecutor(1)
    coming = reader.submit(next, items)
    while True:
        item = coming.result()
        coming = reader.submit(next, items)
        yield item


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

    def begin(self) -> None:
        """See `Stream.begin`."""
        for stream in self.streams:
            stream.begin()

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
