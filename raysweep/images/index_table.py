"""The table of an image index, in the types that need the least memory: a process keeps it for the whole sweep."""

import numpy as np
import pyarrow as pa

from raysweep.images.contents import Contents
from raysweep.images.listed_rows import Rows
from raysweep.images.splits import SPLITS


def make_table(
    rows: Rows, row_ids: np.ndarray, contents: Contents, labels: np.ndarray, splits: np.ndarray
) -> pa.Table:  # fmt: skip
    """Returns `ImageIndex.table`. Its columns share the memory of the arguments.

    Args:
        rows: The good rows.
        row_ids: Row id of each good row, int64.
        contents: The encoded image of each good row.
        labels: Number of the class of each good row, int32.
        splits: Split of each good row, int8, its number in `SPLITS`.
    """
    table = rows.to_arrow(0, len(rows))
    paths = table["path"]
    is_dictionary, in_files = pa.types.is_dictionary(paths.type), bool((rows.positions >= 0).any())
    if in_files and not is_dictionary:
        paths = paths.dictionary_encode()
    elif is_dictionary and not in_files:
        paths = paths.cast(pa.string())
    columns = {
        "row_id": pa.array(row_ids),
        "path": paths,
        "position": table["position"],
        "image": table["image"],
        "label": pa.array(labels),
        "split": pa.DictionaryArray.from_arrays(pa.array(splits), pa.array(SPLITS, pa.string())),
        "content_hash": contents.to_arrow(),
    }
    return pa.table(columns)
