"""Pixels that are cached nowhere: every epoch decodes its images anew, a little ahead of the training loop."""

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
from raysweep.images.passes import WHOLE_BLOCKS, fixed_lists, lists
from raysweep.images.pixels import Geometry, decode_rows

DECODING_CPUS = 1  # that training runs must leave free
BLOCK_ROWS, BLOCK_BYTES = 64, 2**24  # that a task decodes, at the most
READ_AHEAD_BYTES = 2**28  # of pixels that wait for a training worker, or half of the object store if that is less


@dataclass(frozen=True, eq=False)
class StreamedPixels:
    """Rows of an index whose pixels are decoded whenever they are asked for: `PixelRows`, inside of Ray.

    Attributes:
        stream: from `passes.put_index`.
        row_ids: int64 `(num_rows,)`, of the rows.
        geometry: of the pixels.
    """

    stream: dict[str, Any]
    row_ids: np.ndarray
    geometry: Geometry

    def read(self, batches: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """As `PixelRows.read`; Ray Data decodes the rows of later batches while earlier ones are worked on.

        Raises:
            DataError: an image can no longer be decoded.
        """
        # Rows that stand twice in a batch, as those that are mixed with others do, are decoded once.
        distinct = [np.unique(rows.numpy(), return_inverse=True) for rows in batches]
        order = np.concatenate([np.empty(0, np.int64), *(rows for rows, _ in distinct)])
        decoded = rebatch(self._decode(order), [len(rows) for rows, _ in distinct], self.geometry.shape)
        for pixels, (_, places) in zip(decoded, distinct, strict=True):
            yield pixels[torch.from_numpy(places)]

    def _decode(self, order: np.ndarray) -> Iterator[np.ndarray]:
        """Yields the pixels of rows in their order, in blocks uint8 `(n, height, width, 3)`."""
        import ray.data
        from ray.data import ExecutionResources

        job = self.stream | {"row_ids": ray.put(self.row_ids[order]), "geometry": self.geometry}
        size = max(1, min(BLOCK_ROWS, BLOCK_BYTES // math.prod(self.geometry.shape)))
        blocks = [{"start": start, "size": size} for start in range(0, len(order), size)]
        dataset = ray.data.from_items(blocks, override_num_blocks=len(blocks))
        # A task gives one block only: one that waited for its second to be taken would keep its CPU, for which another
        # worker of the same step may wait in turn.
        dataset = dataset.map_batches(partial(_decode_block, job=job), **WHOLE_BLOCKS)
        dataset.context.enable_progress_bars = False
        dataset.context.execution_options.preserve_order = True
        dataset.context.execution_options.resource_limits = ExecutionResources(object_store_memory=READ_AHEAD_BYTES)
        for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            errors = block["error"].drop_null()
            if len(errors):
                raise DataError(f"{errors[0].as_py()}; it could be decoded when the sweep began")
            yield lists(block, "pixels", self.geometry.shape)


def _decode_block(block: pa.Table, job: dict[str, Any]) -> pa.Table:
    """Decodes a block of rows.

    Returns:
        For every row `error`, null where there is none, and `pixels`.
    """
    import ray

    table, start = ray.get(job["rows"]), block["start"][0].as_py()
    row_ids = ray.get(job["row_ids"])[start : start + block["size"][0].as_py()]
    # Row ids ascend, since they are places in the source's listing.
    rows = table.take(np.searchsorted(table["row_id"].to_numpy(), row_ids))
    geometry = job["geometry"]
    errors, pixels = decode_rows(rows, job["image_column"], [geometry], num_threads=1)
    told = [error and f"{path}: {error}" for error, path in zip(errors, rows["path"].to_pylist(), strict=True)]
    return pa.table({"error": pa.array(told, pa.string()), "pixels": fixed_lists(pixels[geometry])})


def rebatch(blocks: Iterator[np.ndarray], sizes: Sequence[int], shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
    """Cuts blocks of rows anew, into tensors uint8 `(size, *shape)` of the sizes given."""
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
