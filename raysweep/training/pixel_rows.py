"""Pixels of a split, on disk or in memory, from which the training loop reads its batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

BATCHES_AHEAD = 2


class PixelRows(Protocol):
    """Rows of uint8 pixels `(height, width, 3)`, numbered from 0."""

    def read(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yields the pixels of each batch of row numbers, int64 `(n,)`, as uint8 `(n, height, width, 3)`.

        The order is that of `batches`. An implementation may read the next batch ahead.
        """
        ...


@dataclass(frozen=True)
class PixelSet:
    """One split: its pixels, and its labels, int64 `(num_rows,)` in host memory."""

    pixels: PixelRows
    labels: Tensor


@dataclass(frozen=True)
class ResidentPixels:
    """Pixels in the memory of one device: uint8 `(num_rows, height, width, 3)`."""

    tensor: Tensor

    def read(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """See `PixelRows.read`; the batches are on the device of the pixels."""
        return (self.tensor[rows.to(self.tensor.device, non_blocking=True)] for rows in batches)


def read_ahead(pixels: Iterator[Tensor], device: torch.device) -> Generator[Tensor]:
    """Yields batches on a device; meanwhile a thread reads the next batches and pins their memory.

    On a CPU a thread saves no time, so each batch is read when it is needed.
    """
    if device.type == "cpu":
        yield from pixels
        return

    def fetch() -> Tensor | None:
        batch = next(pixels, None)
        return batch if batch is None or batch.device == device else batch.pin_memory()

    with ThreadPoolExecutor(1) as reader:
        waiting = deque(reader.submit(fetch) for _ in range(BATCHES_AHEAD))
        while (batch := waiting.popleft().result()) is not None:
            waiting.append(reader.submit(fetch))
            yield batch.to(device, non_blocking=True)
