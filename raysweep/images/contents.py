"""Which rows have the same encoded image, and which rows belong together for that or another reason."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

HASH_BYTES = 32  # of SHA-256


@dataclass(frozen=True)
class Contents:
    """The encoded images of rows.

    Attributes:
        hashes: uint8 `(rows, 32)`, the SHA-256 of each row's encoded image.
    """

    hashes: np.ndarray

    @cached_property
    def order(self) -> np.ndarray:
        """The rows sorted by their hashes, rows with the same hash in their own order; int32 or int64 `(rows,)`."""
        words = self.hashes.view(">u8")
        order = np.argsort(words[:, 0].astype(np.uint64), kind="stable")
        first = words[order, 0]
        places = np.flatnonzero(first[1:] == first[:-1])  # copies, and in 1 of 2^64 cases others
        if (self.hashes[order[places]] != self.hashes[order[places + 1]]).any():
            order = np.lexsort([words[:, column].astype(np.uint64) for column in (3, 2, 1, 0)])
        return order.astype(np.int32) if len(order) < 2**31 else order

    @cached_property
    def numbers(self) -> np.ndarray:
        """The number of each row's hash among the distinct hashes, in the order of the hashes; int32 `(rows,)`."""
        numbers = np.zeros(len(self.order), np.int32)
        if len(numbers):
            numbers[self.order[self._firsts]] = 1
            numbers[self.order] = np.cumsum(numbers[self.order]) - 1
        return numbers

    @property
    def _firsts(self) -> np.ndarray:
        """The places in `order` at which another hash begins."""
        is_first = np.ones(len(self.order), np.bool_)
        for start in range(1, len(self.order), 2**16):  # in parts, because the hashes are most of what is in memory
            rows = self.order[start - 1 : start + 2**16]
            is_first[start : start + 2**16] = (self.hashes[rows[1:]] != self.hashes[rows[:-1]]).any(axis=1)
        return np.flatnonzero(is_first)

    def together(self) -> "Together":
        """Returns the rows with the same image as groups, named by their hash in hex."""
        representatives = self.order[self._firsts]
        return Together(self.numbers, lambda number: self.hashes[representatives[number]].tobytes().hex())

    def differing(self, values: np.ndarray) -> tuple[int, np.ndarray]:
        """Finds images that several rows have whose values differ.

        Returns:
            The number of such images, and the rows of the one whose first row comes first (none if there is none).
        """
        starts = self._firsts
        by_content = values[self.order]
        differs = np.minimum.reduceat(by_content, starts) != np.maximum.reduceat(by_content, starts)
        images = np.flatnonzero(differs)
        if not len(images):
            return 0, self.order[:0]
        first = images[self.order[starts[images]].argmin()]
        return len(images), self.order[starts[first] : starts[first + 1] if first + 1 < len(starts) else None]

    def to_arrow(self) -> pa.Array:
        """Returns the hashes as a column, without a copy."""
        kind = pa.binary(HASH_BYTES)
        return pa.FixedSizeBinaryArray.from_buffers(kind, len(self.hashes), [None, pa.py_buffer(self.hashes)])


@dataclass(frozen=True, slots=True)
class Together:
    """Rows that stay in one split, as groups.

    Attributes:
        numbers: int32 `(rows,)`, the group of each row.
        name_of: Returns the name of a group. Names depend on contents alone, not on the order of the rows.
    """

    numbers: np.ndarray
    name_of: Callable[[int], str]

    @classmethod
    def of(cls, names: Sequence[str]) -> "Together":
        """Returns groups that are given as a name for each row."""
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        known = list(numbers)
        return cls(np.array([numbers[name] for name in names], np.int32), known.__getitem__)

    def among(self, rows: np.ndarray) -> "Together":
        """Returns the groups of some rows, given by their numbers or as a mask."""
        return Together(self.numbers[rows], self.name_of)


def contents_of(hashes: Iterable[bytes]) -> Contents:
    """Returns the contents of rows whose hashes are given as bytes."""
    return Contents(np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, HASH_BYTES))
