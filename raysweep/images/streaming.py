"""Pixels without a cache: every epoch decodes its images again, shortly before the training loop needs them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from raysweep.errors import DataError
from raysweep.images.blocks import dataset_of_blocks, list_blocks, map_blocks, rows_of, tensor_column, tensors
from raysweep.images.pass_tasks import IndexReference
from raysweep.images.pixels import Geometry, decode_rows

DECODING_CPUS = 1  # training runs must leave these free
BLOCK_ROWS, BLOCK_BYTES = 64, 2**24  # the most that one task decodes
READ_AHEAD_BYTES = 2**28  # pixels that wait for one training worker, or half of the object store if that is less


@dataclass(frozen=True, slots=True)
class StreamJob:
    """What every decoding task of one reading is told.

    Attributes:
        index: The images.
        row_ids: Object reference of the row ids to decode, int64, in their order.
        geometry: Shape and preparation of the pixels.
    """

    index: IndexReference
    row_ids: Any
    geometry: Geometry


@dataclass(frozen=True, eq=False, slots=True)
class StreamedPixels:
    """Rows of an index that are decoded each time they are read. It has the methods of `PixelRows`, and needs Ray.

    Attributes:
        index: The images, from `passes.put_index`.
        row_ids: int64 `(num_rows,)`, the rows.
        geometry: Shape and preparation of the pixels.
    """

    index: IndexReference
    row_ids: np.ndarray
    geometry: Geometry

    def read(self, batches: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yields the pixels of each batch of row numbers, as `PixelRows.read` does.

        While the caller works on a batch, Ray Data decodes the rows of later ones.

        Raises:
            DataError: an image can no longer be decoded.
        """
        # A row may occur twice in a batch, for example when images are mixed. It is decoded once.
        distinct = [np.unique(rows.numpy(), return_inverse=True) for rows in batches]
        order = np.concatenate([np.empty(0, np.int64), *(rows for rows, _ in distinct)])
        decoded = rebatch(self._decode(order), [len(rows) for rows, _ in distinct], self.geometry.shape)
        for pixels, (_, places) in zip(decoded, distinct, strict=True):
            yield pixels[torch.from_numpy(places)]

    def _decode(self, order: np.ndarray) -> Iterator[np.ndarray]:
        """Yields the pixels of rows in the given order, in blocks uint8 `(n, height, width, 3)`."""
        import ray
        from ray.data import ExecutionResources

        job = StreamJob(self.index, ray.put(self.row_ids[order]), self.geometry)
        size = max(1, min(BLOCK_ROWS, BLOCK_BYTES // math.prod(self.geometry.shape)))
        # A task returns only one block. If it returned two, it would keep its CPU until the second was taken, and
        # another worker of the same training step may need that CPU.
        dataset = map_blocks(dataset_of_blocks(list_blocks(len(order), size)), partial(_decode_block, job=job))
        dataset.context.enable_progress_bars = False
        dataset.context.execution_options.preserve_order = True
        dataset.context.execution_options.resource_limits = ExecutionResources(object_store_memory=READ_AHEAD_BYTES)
        for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            errors = block["error"].drop_null()
            if len(errors):
                raise DataError(f"{errors[0].as_py()}; it could be decoded when the sweep began")
            yield tensors(block, "pixels")


def _decode_block(block: pa.Table, job: StreamJob) -> pa.Table:
    """Decodes a block of rows.

    Returns:
        A table with the columns `error`, null for good rows, and `pixels`.
    """
    import ray

    table, row_ids = ray.get(job.index.rows), ray.get(job.row_ids)[rows_of(block)]
    # Row ids ascend, because they are positions in the listing of the source.
    rows = table.take(np.searchsorted(table["row_id"].to_numpy(), row_ids))
    index = job.index
    errors, pixels = decode_rows(rows, index.image_column, [job.geometry], 1, index.decode_options)
    messages = [error and f"{path}: {error}" for error, path in zip(errors, rows["path"].to_pylist(), strict=True)]
    return pa.table({"error": pa.array(messages, pa.string()), "pixels": tensor_column(pixels[job.geometry])})


def rebatch(blocks: Iterator[np.ndarray], sizes: Sequence[int], shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
    """Joins and splits blocks of rows into tensors uint8 `(size, *shape)` of the given sizes."""
    block = np.empty((0, *shape), np.uint8)
    for size in sizes:
        batch, done = torch.empty((size, *shape), dtype=torch.uint8), 0
        while done < size:
            if len(block) == 0:
                block = next(blocks)
            taken, block = block[: size - done], block[size - done :]
            batch.numpy()[done : done + len(taken)] = taken
            done += len(taken)
        yield batch
