"""Features that do not fit into a worker's memory: half floats in a flat file, read by row numbers as from a tensor."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from raysweep.errors import DataError
from raysweep.storage.copies import replacing

DTYPE = np.dtype("<f2")
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class DiskRows:
    """A matrix of half floats in a file, row by row. Indexing returns rows as a tensor on `device`.

    The file is read, not memory-mapped: mapped pages count as memory of the process, and Ray ends workers that use too
    much. Every read opens the file (microseconds), so that an instance can be pickled, forked, and used by several
    threads at once.

    Attributes:
        path: The file.
        shape: (num_rows, num_features).
        device: The device of the tensors that indexing returns.
    """

    path: Path
    shape: tuple[int, int]
    device: torch.device = CPU

    @classmethod
    def create(
        cls, path: Path, num_rows: int, num_features: int, blocks: Iterable[tuple[np.ndarray, np.ndarray]]
    ) -> DiskRows:
        """Writes a file, completely or not at all.

        Args:
            path: The file; an existing one is replaced.
            num_rows: Rows of the matrix.
            num_features: Columns of the matrix.
            blocks: Pairs of row numbers, int64 `(n,)`, and the values of these rows, float16 `(n, num_features)`.
                Together the blocks contain every row once.

        Raises:
            DataError: the blocks do not contain every row.
        """
        missing = np.ones(num_rows, dtype=bool)
        with replacing(path) as temporary:
            with open(temporary, "wb", buffering=0) as file:
                for places, rows in blocks:
                    assert rows.shape == (len(places), num_features), f"{rows.shape} for {len(places)} places"
                    missing[places] = False
                    _write(file.fileno(), places, np.ascontiguousarray(rows, dtype=DTYPE))
            if missing.any():
                raise DataError(f"{path}: {missing.sum()} of {num_rows} rows were never written")
        return cls.open(path, num_features)

    @classmethod
    def open(cls, path: Path, num_features: int) -> DiskRows:
        """Opens a file that `create` wrote.

        Raises:
            DataError: the file does not exist, or its size is not a multiple of the size of a row.
        """
        if not path.is_file():
            raise DataError(f"{path}: no such file of features")
        size, row_bytes = path.stat().st_size, num_features * DTYPE.itemsize
        if size % row_bytes:
            raise DataError(
                f"{path}: {size} bytes are not whole rows of {num_features} half floats ({row_bytes} bytes)"
            )
        return cls(path, (size // row_bytes, num_features))

    def to(self, device: torch.device | str) -> DiskRows:
        """Returns the same rows, which indexing will read to `device`."""
        return DiskRows(self.path, self.shape, torch.device(device))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Reads rows by their numbers, an int64 tensor; returns float16 `(*rows.shape, num_features)`.

        Raises:
            DataError: the file has become shorter.
            IndexError: a number is negative or too large.
        """
        # Each row is read once, in the order of the file. Then the rows are put into the order of the argument.
        numbers, places = np.unique(rows.cpu().numpy().ravel(), return_inverse=True)
        if len(numbers) and not 0 <= numbers[0] <= numbers[-1] < len(self):
            raise IndexError(f"rows {numbers[0]} to {numbers[-1]} of {len(self)}")
        values = np.empty((len(numbers), self.shape[1]), DTYPE)
        with open(self.path, "rb", buffering=0) as file:
            self._fill(values, numbers, file.fileno())
        found = torch.from_numpy(values)
        if not np.array_equal(places, np.arange(len(numbers))):
            found = found[torch.from_numpy(places)]
        return found.view(*rows.shape, self.shape[1]).to(self.device)

    def _fill(self, values: np.ndarray, numbers: np.ndarray, descriptor: int) -> None:
        """Reads rows with ascending numbers. Consecutive rows are read at once."""
        row_bytes = self.shape[1] * DTYPE.itemsize
        whole, offsets = values.reshape(-1).data.cast("B"), (numbers * row_bytes).tolist()
        for start, stop in runs(numbers):
            if not read_into(descriptor, whole[start * row_bytes : stop * row_bytes], offsets[start]):
                raise DataError(f"{self.path}: ends before row {numbers[stop - 1] + 1} of {len(self)}")


def runs(*numbers: np.ndarray) -> list[tuple[int, int]]:
    """Returns (start, stop) of each longest stretch in which all arrays, each `(n,)`, increase by one at every step."""
    if len(numbers[0]) == 0:
        return []
    is_break = np.any([np.diff(array) != 1 for array in numbers], axis=0)
    breaks = (np.flatnonzero(is_break) + 1).tolist()
    return list(zip([0, *breaks], [*breaks, len(numbers[0])], strict=True))


def read_into(descriptor: int, buffer: memoryview, offset: int) -> bool:
    """Fills a buffer with bytes of a file, from `offset` on; returns False if the file ends too early."""
    while buffer:
        count = os.preadv(descriptor, [buffer], offset)
        if count == 0:
            return False
        buffer, offset = buffer[count:], offset + count
    return True


def _write(descriptor: int, places: np.ndarray, rows: np.ndarray) -> None:
    order = np.argsort(places)
    places, rows = places[order], rows[order]
    for start, stop in runs(places):
        buffer, offset = rows[start:stop].data.cast("B"), int(places[start]) * rows.itemsize * rows.shape[1]
        while buffer:
            count = os.pwrite(descriptor, buffer, offset)
            buffer, offset = buffer[count:], offset + count
