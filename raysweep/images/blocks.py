"""Blocks of rows in Ray Data: which rows a task works on, and how arrays travel in table columns."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    import ray.data

SMALLEST_BLOCK = 8  # rows: a batch of an encoder on a CPU
MAX_RETRIES = 3  # of a task or actor whose process was killed; Ray Data's own default is without end


def map_blocks(dataset: ray.data.Dataset, function: Callable[..., Any], **options: Any) -> ray.data.Dataset:
    """Applies a function from an Arrow table to an Arrow table to one block at a time; nothing runs yet.

    Args:
        dataset: The blocks.
        function: The function, or the class of an actor whose instances are such functions.
        options: Further arguments of Ray Data's `map_batches`, or others than these.
    """
    from ray.data import ActorPoolStrategy

    in_actors = isinstance(options.get("compute"), ActorPoolStrategy)
    # A call of an actor is repeated until the actor is there again or dead: until Ray notices that a node is lost, each
    # repetition fails at once.
    retries = {"max_restarts": MAX_RETRIES, "max_task_retries": -1} if in_actors else {"max_retries": MAX_RETRIES}
    whole_blocks = {"batch_size": None, "batch_format": "pyarrow", "zero_copy_batch": True}
    with warnings.catch_warnings():
        # Ray Data calls these options deprecated, and has no others for the number of retries.
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
        return dataset.map_batches(function, **{**whole_blocks, **retries, **options})


def list_blocks(num_rows: int, size: int, num_takers: int = 1) -> list[dict[str, int]]:
    """Splits rows into blocks of `size` rows; the last ones are smaller, so that all processes end at the same time.

    Args:
        num_rows: Number of rows.
        size: Rows of a block.
        num_takers: Processes that take blocks one after another. Each block has at most a share of the rows that are
            left when it begins (guided self-scheduling, Polychronopoulos & Kuck 1987).
    """
    blocks, start = [], 0
    while start < num_rows:
        share = -(-(num_rows - start) // (2 * num_takers)) if num_takers > 1 else size
        blocks.append({"start": start, "size": min(size, max(SMALLEST_BLOCK, share), num_rows - start)})
        start += blocks[-1]["size"]
    return blocks


def dataset_of_blocks(blocks: Sequence[Mapping[str, int]]) -> ray.data.Dataset:
    """Returns a Ray Dataset with one item for each block of `list_blocks`; nothing runs yet.

    An item only says where its rows are in a table, which all processes of a node share. If the items were tables, Ray
    would start a task for each of them to learn its schema.
    """
    import ray.data

    return ray.data.from_items(list(blocks), override_num_blocks=len(blocks))


def rows_of(block: pa.Table) -> slice:
    """Returns the rows that a task works on, from the item that Ray Data gave it."""
    start = block["start"][0].as_py()
    return slice(start, start + block["size"][0].as_py())


def tensor_column(values: np.ndarray) -> pa.FixedShapeTensorArray:
    """Wraps an array `(n, ...)` as a column of n tensors, without a copy; n must be at least 1."""
    return pa.FixedShapeTensorArray.from_numpy_ndarray(values)


def tensors(table: pa.Table, column: str) -> np.ndarray:
    """Returns a column that `tensor_column` made as an array `(n, ...)`."""
    values: np.ndarray = table[column].combine_chunks().to_numpy_ndarray()
    return values
