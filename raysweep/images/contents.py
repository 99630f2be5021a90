"""Which rows have the same encoded image, and which rows belong together for that or another reason."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

HASH_BYTES = 32  # of SHA-256
ROWS_AT_ONCE = 2**13


@dataclass(frozen=True)
class Contents:
    """The encoded images of rows.

    Attributes:
        hashes: uint8 `(rows, 32)`, the SHA-256 of each row's encoded image.
    """

    hashes: np.ndarray

    @property
    def order(self) -> np.ndarray:
        """The rows sorted by their hashes, rows with the same hash in their own order; int32 or int64 `(rows,)`.

        It is computed each time, because its memory is needed for other things in between.
        """
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
        order = self.order
        numbers = np.zeros(len(order), np.int32)
        numbers[self._firsts(order)[1:]] = 1
        numbers[order] = np.cumsum(numbers, dtype=np.int32)
        return numbers

    def _firsts(self, order: np.ndarray) -> np.ndarray:
        """Returns the places in `order` at which another hash begins."""
        is_first = np.ones(len(order), np.bool_)
        for start in range(1, len(order), ROWS_AT_ONCE):  # because the hashes are most of what is in memory
            rows = order[start - 1 : start + ROWS_AT_ONCE]
            is_first[start : start + ROWS_AT_ONCE] = (self.hashes[rows[1:]] != self.hashes[rows[:-1]]).any(axis=1)
        return np.flatnonzero(is_first)

    def together(self) -> "Together":
        """Returns the rows with the same image as groups, named by their hash in hex."""
        order = self.order
        representatives = order[self._firsts(order)]
        return Together(self.numbers, lambda number: self.hashes[representatives[number]].tobytes().hex())

    def differing(self, values: np.ndarray) -> tuple[int, np.ndarray]:
        """Finds images that several rows have whose values differ.

        Returns:
            The number of such images, and the rows of the one whose first row comes first (none if there is none).
        """
        if int(self.numbers.max(initial=-1)) + 1 == len(self.numbers):
            return 0, np.empty(0, np.int64)
        order = self.order
        starts, by_content = self._firsts(order), values[order]
        differs = np.minimum.reduceat(by_content, starts) != np.maximum.reduceat(by_content, starts)
        images = np.flatnonzero(differs)
        if not len(images):
            return 0, order[:0]
        first = images[order[starts[images]].argmin()]
        return len(images), order[starts[first] : starts[first + 1] if first + 1 < len(starts) else None]

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


def contents_of(hashes: Iterable[bytes]) -> Contents:
    """Returns the contents of rows whose hashes are given as bytes."""
    return Contents(np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, HASH_BYTES))
