"""The rows of a source as they are listed, in columns: millions of them need little more memory than their paths."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from raysweep.images.texts import Texts


def image_name(path: str, position: int) -> str:
    """Returns how a person is told of an image: its path, and its row where the path is that of a Parquet file."""
    return path if position < 0 else f"{path} row {position}"


class Row(NamedTuple):
    """One image as its source lists it.

    Attributes:
        path: Absolute path or URI of the image, or of the Parquet file that contains it. For a row with a problem, the
            place where the row was found.
        label: The value in the source.
        split: The value in the source; None where it has none.
        position: Number of the row in the Parquet file; -1 where `path` is the image itself.
        inline: The encoded image, for sources that are generated in memory.
        problem: The reason why the row is bad, if that is known before the image is read.
        group: The value in the source of the column that `data.group` names.
    """

    path: str
    label: Any
    split: Any = None
    position: int = -1
    inline: bytes | None = None
    problem: str | None = None
    group: Any = None

    @property
    def source(self) -> str:
        """Where the row was found, for messages."""
        return image_name(self.path, self.position)


class Values(Sequence[Any]):
    """A column of any values, of which many are the same. Each distinct value is kept once, and 4 bytes a row.

    As long as all values are the same, a row needs no memory.

    Attributes:
        distinct: The distinct values, each with its type, in the order in which they came.
    """

    __slots__ = ("_known", "_length", "_numbers", "distinct")

    def __init__(self, values: Iterable[Any] = ()) -> None:
        self.distinct: list[Any] = []
        self._known: dict[tuple[type, Any], int] = {}
        self._length = 0
        self._numbers = array("i")  # empty as long as all are 0
        self.extend(values)

    def append(self, value: Any) -> None:
        """Adds a value."""
        number = self._number_of(value)
        if number and not self._numbers:
            self._numbers = array("i", bytes(4 * self._length))
        if len(self.distinct) > 1:
            self._numbers.append(number)
        self._length += 1

    def extend(self, values: Iterable[Any]) -> None:
        """Adds values."""
        for value in values:
            self.append(value)

    def _number_of(self, value: Any) -> int:
        key = type(value), value
        try:
            number = self._known.setdefault(key, len(self.distinct))
        except TypeError:  # lists and dicts in JSON Lines, which are no labels
            number = len(self.distinct)
        if number == len(self.distinct):
            self.distinct.append(value)
        return number

    @property
    def numbers(self) -> np.ndarray:
        """The number of each row's value among the distinct ones, int32 `(rows,)`; it is not to be kept."""
        if not self._numbers:
            return np.broadcast_to(np.int32(0), self._length)
        return np.frombuffer(self._numbers, np.int32)

    def counts(self, rows: np.ndarray | None = None) -> dict[int, int]:
        """Returns how many rows have each distinct value, among all rows or those of a mask; without zeros."""
        counts = np.bincount(self.numbers if rows is None else self.numbers[rows])
        return {int(number): int(counts[number]) for number in np.flatnonzero(counts)}

    def keep(self, is_kept: np.ndarray) -> None:
        """Takes out the rows that are not kept."""
        if self._numbers:
            self._numbers = array("i", self.numbers[is_kept].tobytes())
        self._length = int(is_kept.sum())

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[place] for place in range(*number.indices(len(self)))]
        return self.distinct[self._numbers[number] if self._numbers else 0]

    def __iter__(self) -> Iterator[Any]:
        if not self._numbers:
            return repeat(self.distinct[0], self._length) if self._length else iter(())
        return map(self.distinct.__getitem__, self._numbers)


class Rows(Sequence[Row]):
    """A sequence of rows that grows at its end. A row becomes a `Row` only while it is looked at.

    Attributes:
        paths, labels, splits, groups: What `Row` has in the singular.
    """

    __slots__ = ("_images", "_length", "_positions", "_problems", "groups", "labels", "paths", "splits")

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self.paths = Texts()
        self.labels, self.splits, self.groups = Values(), Values(), Values()
        self._positions = array("i")  # empty as long as all are -1
        self._length = 0
        self._images: dict[int, bytes] = {}  # of few rows or none, by their numbers
        self._problems: dict[int, str] = {}
        self.extend(rows)

    def append(self, row: Row) -> None:
        """Adds a row."""
        number, self._length = self._length, self._length + 1
        self.paths.append(row.path)
        self.labels.append(row.label)
        self.splits.append(row.split)
        self.groups.append(row.group)
        if row.position >= 0 and not self._positions:
            self._positions = array("i", [-1]) * number
        if row.position >= 0 or self._positions:
            self._positions.append(row.position)
        if row.inline is not None:
            self._images[number] = row.inline
        if row.problem is not None:
            self._problems[number] = row.problem

    def extend(self, rows: Iterable[Row]) -> None:
        """Adds rows."""
        for row in rows:
            self.append(row)

    @property
    def positions(self) -> np.ndarray:
        """The position of each row in its Parquet file or -1, int32 `(rows,)`; it is not to be kept."""
        if not self._positions:
            return np.broadcast_to(np.int32(-1), self._length)
        return np.frombuffer(self._positions, np.int32)

    @property
    def usable(self) -> np.ndarray:
        """Which rows have no problem, bool `(rows,)`."""
        usable = np.ones(len(self), np.bool_)
        usable[list(self._problems)] = False
        return usable

    @property
    def problems(self) -> dict[int, str]:
        """The problems of the rows that have one, by their numbers."""
        return self._problems

    @property
    def named_files(self) -> np.ndarray:
        """Which rows are files whose paths they name, bool `(rows,)`."""
        named = self.positions < 0
        named[list(self._images)] = False
        return named

    def keep(self, is_kept: np.ndarray) -> None:
        """Takes out the rows that are not kept, given a bool for each row."""
        numbers = np.cumsum(is_kept) - 1
        for values in (self.paths, self.labels, self.splits, self.groups):
            values.keep(is_kept)
        if self._positions:
            self._positions = array("i", self.positions[is_kept].tobytes())
        self._length = int(is_kept.sum())
        self._images = {int(numbers[row]): image for row, image in self._images.items() if is_kept[row]}
        self._problems = {int(numbers[row]): problem for row, problem in self._problems.items() if is_kept[row]}

    def to_arrow(self, start: int, stop: int) -> pa.Table:
        """Returns the path, position and encoded image (or null) of rows, to read them."""
        images = [self._images.get(number) for number in range(start, stop)] if self._images else None
        columns = {
            "path": self.paths.to_arrow(start, stop),
            "position": pa.array(np.ascontiguousarray(self.positions[start:stop])),
            "image": pa.nulls(stop - start) if images is None else pa.array(images, pa.large_binary()),
        }
        return pa.table(columns)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[place] for place in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        return Row(
            self.paths[number],
            self.labels[number],
            self.splits[number],
            self._positions[number] if self._positions else -1,
            self._images.get(number),
            self._problems.get(number),
            self.groups[number],
        )

    def __iter__(self) -> Iterator[Row]:
        images, problems = (
            map(kept.get, range(len(self))) if kept else repeat(None) for kept in (self._images, self._problems)
        )
        positions = self._positions or repeat(-1)
        return map(Row, self.paths, self.labels, self.splits, positions, images, problems, self.groups)


@dataclass
class Listing:
    """All rows of a source.

    Attributes:
        rows: The rows, good and bad.
        image_column: Column of the images in Parquet files; None where there are none.
        warnings: What a user should know about the source.
        tables: Paths or URIs of the tables that the rows were read from, where the source is a folder.
        row_groups: For each Parquet file of images, by its path, the first rows of its row groups.
    """

    rows: Rows = field(default_factory=Rows)
    image_column: str | None = None
    warnings: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    row_groups: dict[str, frozenset[int]] = field(default_factory=dict)
