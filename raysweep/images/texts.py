"""Many texts, such as the paths of millions of images, in little more memory than their characters need."""

import mmap
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

TEXTS_PER_CHUNK = 2**14


class Texts(Sequence[str]):
    """A sequence of texts that grows at its end. A text becomes a Python object only while it is looked at.

    A text needs its characters in UTF-8 and 4 bytes; where most texts of a chunk are alike, it needs only 4 bytes.
    Names of files that are not UTF-8 (lone surrogates) are kept too.
    """

    __slots__ = ("_chunks", "_ends", "_recent")

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._chunks: list[pa.Array] = []  # of binary, or of a dictionary of binary
        self._ends: list[int] = []  # number of texts up to the end of each chunk
        self._recent: list[str] = []  # not in a chunk yet
        self.extend(texts)

    def append(self, text: str) -> None:
        """Adds a text."""
        self._recent.append(text)
        if len(self._recent) == TEXTS_PER_CHUNK:
            self.pack()

    def extend(self, texts: Iterable[str]) -> None:
        """Adds texts."""
        for text in texts:
            self.append(text)

    def pack(self) -> None:
        """Packs what was added last too. Until more is added, several threads may then read the texts."""
        if self._recent:
            encoded = list(map(_encode, self._recent))
            ends = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
            buffers = [None, _own_memory(ends.tobytes()), _own_memory(b"".join(encoded))]
            chunk = pa.Array.from_buffers(pa.binary(), len(encoded), buffers)
            is_repetitive = len(set(self._recent)) <= len(self._recent) // 4
            self._add_chunk(chunk.dictionary_encode() if is_repetitive else chunk)
            self._recent = []

    def _add_chunk(self, chunk: pa.Array) -> None:
        self._chunks.append(chunk)
        self._ends.append(len(chunk) + (self._ends[-1] if self._ends else 0))

    def __len__(self) -> int:
        return (self._ends[-1] if self._ends else 0) + len(self._recent)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[place] for place in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        place = bisect_right(self._ends, number)
        start = self._ends[place - 1] if place else 0
        if place == len(self._chunks):
            return self._recent[number - start]
        return _decode(self._chunks[place][number - start].as_py())

    def __iter__(self) -> Iterator[str]:
        for chunk in self._chunks:
            if pa.types.is_dictionary(chunk.type):
                words = [_decode(word) for word in chunk.dictionary.to_pylist()]
                yield from (words[place] for place in chunk.indices.to_pylist())
            else:
                yield from map(_decode, chunk.to_pylist())
        yield from self._recent

    def sort(self) -> None:
        """Sorts the texts, as `sorted` does."""
        self.pack()
        whole = pa.chunked_array([_plain(chunk) for chunk in self._chunks], pa.binary())
        order = pc.sort_indices(whole)
        self._chunks, self._ends = [], []
        for start in range(0, len(order), TEXTS_PER_CHUNK):
            self.extend(map(_decode, whole.take(order[start : start + TEXTS_PER_CHUNK]).to_pylist()))
        del whole, order
        pa.default_memory_pool().release_unused()

    def keep(self, is_kept: np.ndarray) -> None:
        """Takes out the texts that are not kept, given a bool for each text."""
        self.pack()
        chunks, starts = self._chunks, [0, *self._ends]
        self._chunks, self._ends = [], []
        for number in range(len(chunks)):
            self._add_chunk(chunks[number].filter(pa.array(is_kept[starts[number] : starts[number + 1]])))
            chunks[number] = None  # so that no text is kept twice

    def to_arrow(self, start: int = 0, stop: int | None = None) -> pa.ChunkedArray:
        """Returns texts as a column of strings, or of a dictionary if some chunks are one. Copies nothing if it can.

        Raises:
            pa.ArrowInvalid: a text is not UTF-8.
        """
        self.pack()
        stop = len(self) if stop is None else stop
        chunks = [
            chunk[max(0, start - end + len(chunk)) : max(0, stop - end + len(chunk))]
            for chunk, end in zip(self._chunks, self._ends, strict=True)
            if end > start and end - len(chunk) < stop
        ]
        if any(pa.types.is_dictionary(chunk.type) for chunk in chunks):
            kind = pa.dictionary(pa.int32(), pa.string())
            codes = [chunk if pa.types.is_dictionary(chunk.type) else chunk.dictionary_encode() for chunk in chunks]
            return pa.chunked_array([code.cast(kind) for code in codes], kind).unify_dictionaries()
        return pa.chunked_array([chunk.cast(pa.string()) for chunk in chunks], pa.string())


def _own_memory(data: bytes) -> pa.Buffer:
    """Returns a copy in memory that the system gets back at once when it is freed, which Arrow and malloc keep."""
    memory = mmap.mmap(-1, max(1, len(data)), access=mmap.ACCESS_COPY)
    memory[: len(data)] = data
    return pa.py_buffer(memory)[: len(data)]


def _plain(chunk: pa.Array) -> pa.Array:
    return chunk.dictionary_decode() if pa.types.is_dictionary(chunk.type) else chunk


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _decode(text: bytes) -> str:
    return text.decode("utf-8", "surrogatepass")


def hashes_of(texts: Iterable[str]) -> np.ndarray:
    """Returns an int64 for each text, `(num_texts,)`, for this process. Two texts share one by a chance of 2^-64."""
    return np.fromiter(map(hash, texts), np.int64, len(texts) if isinstance(texts, Sequence) else -1)


class Lookup:
    """Finds texts in a sequence, as a dict from texts to positions does, in 16 bytes a text.

    Args:
        texts: The sequence, which must not change any more.
        key: What each text is found by.
    """

    def __init__(self, texts: Sequence[str], key: Callable[[str], str] = str) -> None:
        self._texts, self._key = texts, key
        hashes = hashes_of(map(key, texts))
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]

    def find(self, text: str) -> int:
        """Returns the position of the last text with this key; -1 if there is none."""
        wanted = hash(text)
        place = int(np.searchsorted(self._hashes, wanted, "right")) - 1
        while place >= 0 and self._hashes[place] == wanted:
            position = int(self._order[place])
            if self._key(self._texts[position]) == text:
                return position
            place -= 1
        return -1

    def __contains__(self, text: str) -> bool:
        return self.find(text) >= 0
