"""What the model of a study says of each test image: the file that a worker writes in the study's folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raysweep.storage.copies import publish, replacing


@dataclass(frozen=True, eq=False, slots=True)
class TestRows:
    """Test images and what a model says of them.

    Attributes:
        ids: int64 `(num_rows,)`, row ids.
        labels: int64 `(num_rows,)`, indices into the classes.
        predicted: int64 `(num_rows,)`, the predicted classes.
        probabilities: float32 `(num_rows, num_classes)`.
    """

    __test__ = False  # not a test class, despite its name

    ids: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    probabilities: np.ndarray


def write_test_rows(path: Path, rows: TestRows) -> None:
    """Writes a Parquet file atomically, and uploads it if it is a copy of an object in a bucket."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    width = rows.probabilities.shape[1]
    flat = pa.array(np.ascontiguousarray(rows.probabilities).reshape(-1))
    columns = {
        "row_id": rows.ids,
        "label": rows.labels,
        "prediction": rows.predicted,
        "probabilities": pa.FixedSizeListArray.from_arrays(flat, width),
    }
    with replacing(path) as temporary:
        pq.write_table(pa.table(columns), temporary, compression="zstd")
    publish(path)


def read_test_rows(path: Path) -> TestRows:
    """Reads a file from `write_test_rows`.

    Raises:
        OSError, pyarrow.ArrowException: there is no such file, or it is damaged.
    """
    import pyarrow.parquet as pq

    table = pq.read_table(path, memory_map=False).combine_chunks()
    probabilities = table["probabilities"].combine_chunks()
    values = probabilities.flatten().to_numpy().reshape(len(table), -1)
    ids, labels, predicted = (table[name].to_numpy() for name in ("row_id", "label", "prediction"))
    return TestRows(ids, labels, predicted, values)
