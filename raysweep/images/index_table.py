"""The table of an image index, in the types that need the least memory: a process keeps it for the whole sweep."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from raysweep.images.splits import SPLITS
from raysweep.images.tables import Row

HASH_TYPE = pa.binary(hashlib.sha256().digest_size)


def make_table(rows: Sequence[Row], hashes: Mapping[int, str], labels: np.ndarray, splits: Sequence[str]) -> pa.Table:
    """Returns `ImageIndex.table`.

    Args:
        rows: The good rows.
        hashes: Content hash of each good row in hex, by row id.
        labels: Number of the class of each good row, int32.
        splits: Split of each good row, one of `SPLITS`.
    """
    paths = pa.array([row.path for row in rows], pa.string())
    in_files = any(row.position >= 0 for row in rows)
    inline = [row.inline for row in rows]
    numbers = pa.array([SPLITS.index(split) for split in splits], pa.int8())
    columns = {
        "row_id": pa.array(hashes, pa.int64()),
        "path": paths.dictionary_encode() if in_files else paths,
        "position": pa.array([row.position for row in rows], pa.int32()),
        "image": pa.nulls(len(rows)) if inline.count(None) == len(rows) else pa.array(inline, pa.large_binary()),
        "label": pa.array(labels),
        "split": pa.DictionaryArray.from_arrays(numbers, pa.array(SPLITS, pa.string())),
        "content_hash": pa.array(map(bytes.fromhex, hashes.values()), HASH_TYPE, size=len(hashes)),
    }
    return pa.table(columns)
