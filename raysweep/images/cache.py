"""What feature and pixel caches share: one Ray Data pass over the images into Parquet, keyed by a signature.

A cache is a folder of Parquet files and a `manifest.json`. The manifest is written last: a folder without one was
never finished and is written again. Labels and splits are not in it, so relabelling costs no pass.
"""

from __future__ import annotations

import fcntl
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raysweep.encoders.preprocess import Preprocessing
from raysweep.errors import DataError
from raysweep.images.decode import decode_image
from raysweep.images.sources import BadRow, ImageIndex, read_image_bytes
from raysweep.paths import read_json, write_json

if TYPE_CHECKING:
    import ray.data

ROWS_PER_FILE = 64
MIN_FILES, MAX_FILES = 8, 2_000  # at the least, so that progress shows with few images too
MAX_ROWS_PER_FILE = 512

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Cache:
    """A finished cache.

    Attributes:
        folder: where its Parquet files lie.
        num_rows: images in it.
        bad_rows: images that could be listed but not decoded.
        seconds: wall time of the pass that wrote it.
        peak_memory_bytes: largest resident set of a process of that pass; `peak_gpu_memory_bytes` likewise on a GPU.
        made_now: whether this call made the pass, rather than finding the cache.
    """

    folder: str
    num_rows: int
    bad_rows: tuple[BadRow, ...]
    seconds: float
    peak_memory_bytes: int
    peak_gpu_memory_bytes: int
    made_now: bool


def open_cache(folder: Path) -> Cache | None:
    """Returns the cache in `folder`, or None where no pass has finished."""
    manifest = folder / "manifest.json"
    if not manifest.exists():
        return None
    values = read_json(manifest)
    bad_rows = tuple(BadRow(**row) for row in values.pop("bad_rows"))
    return Cache(folder=str(folder.resolve()), bad_rows=bad_rows, made_now=False, **values)


def write_cache(
    folder: Path,
    index: ImageIndex,
    preprocess: Mapping[str, Any],
    attach: Callable[[ray.data.Dataset, str], ray.data.Dataset],
    on_progress: Progress,
) -> Cache:
    """Makes one pass over the images of an index and writes the cache, unless another sweep is writing it already.

    Args:
        folder: where to.
        index: the images.
        preprocess: a `Preprocessing` as a dict, and `for_training`: which of its two geometries the rows get.
        attach: adds the stages that turn blocks of pixels into files and yield a `receipt` for every row.
        on_progress: called with (images done, images in all).
    """
    with _only_writer(folder):
        if cache := open_cache(folder):
            return cache
        for leftover in folder.glob("rows-*.parquet"):  # of a pass that was cut short, perhaps into other blocks
            leftover.unlink()
        _make_pass(folder, index, preprocess, attach, on_progress)
    cache = open_cache(folder)
    assert cache is not None
    return Cache(**{**vars(cache), "made_now": True})


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Waits until no other sweep of the same storage writes this cache."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make_pass(
    folder: Path,
    index: ImageIndex,
    preprocess: Mapping[str, Any],
    attach: Callable[[ray.data.Dataset, str], ray.data.Dataset],
    on_progress: Progress,
) -> None:
    started = time.perf_counter()
    dataset = attach(load_dataset(index).map_batches(_decode, fn_kwargs=dict(preprocess), **BLOCKS), str(folder))
    paths = dict(zip(index.table["row_id"].to_pylist(), index.table["path"].to_pylist(), strict=True))
    bad_rows: list[BadRow] = []
    num_done, memory, gpu_memory = 0, 0, 0
    for receipts in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        num_done += len(receipts)
        for row in receipts.to_pylist():
            memory, gpu_memory = max(memory, row["memory"]), max(gpu_memory, row["gpu_memory"])
            if row["error"] is not None:
                bad_rows.append(BadRow(row["row_id"], paths[row["row_id"]], row["error"]))
        on_progress(num_done, len(index.table))
    manifest = {
        "num_rows": num_done - len(bad_rows),
        "bad_rows": [vars(row) for row in sorted(bad_rows, key=lambda row: row.row_id)],
        "seconds": time.perf_counter() - started,
        "peak_memory_bytes": memory,
        "peak_gpu_memory_bytes": gpu_memory,
    }
    if num_done != len(index.table):
        raise DataError(f"{folder}: the pass saw {num_done} of {len(index.table)} images; start the sweep again")
    write_json(folder / "manifest.json", manifest)


BLOCKS: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow", "zero_copy_batch": True}


def load_dataset(index: ImageIndex) -> ray.data.Dataset:
    """The images of an index as a Ray Dataset of small blocks, one per cache file; nothing is read yet."""
    import ray.data

    num_rows = len(index.table)
    size = min(max(ROWS_PER_FILE, -(-num_rows // MAX_FILES)), MAX_ROWS_PER_FILE, max(1, num_rows // MIN_FILES))
    columns = index.table.select(["row_id", "path", "position", "image"])
    columns = columns.append_column("image_column", pa.array([index.image_column] * num_rows, pa.string()))
    return ray.data.from_arrow([columns.slice(start, size).combine_chunks() for start in range(0, num_rows, size)])


def _decode(rows: pa.Table, preprocessing: dict[str, Any], for_training: bool) -> pa.Table:
    """Reads and decodes a block: `row_id`, `pixels` (uint8 bytes of one geometry, null where bad), `error`."""
    geometry = Preprocessing.from_dict(preprocessing)
    resize = geometry.resize_for_training if for_training else geometry.resize_and_crop
    paths, positions, inline = (rows[name].to_pylist() for name in ("path", "position", "image"))
    pixels: list[bytes | None] = []
    errors: list[str | None] = []
    for content in read_image_bytes(paths, positions, inline, rows["image_column"][0].as_py()):
        try:
            if isinstance(content, DataError):
                raise content
            pixels.append(resize(decode_image(content, geometry.min_side)).tobytes())
            errors.append(None)
        except DataError as error:
            pixels.append(None)
            errors.append(str(error))
    return pa.table(
        {
            "row_id": rows["row_id"],
            "pixels": pa.array(pixels, pa.large_binary()),
            "error": pa.array(errors, pa.string()),
        }
    )


def write_block(folder: str, table: pa.Table, decoded: pa.Table, gpu_memory: int = 0) -> pa.Table:
    """Writes one file of a cache and returns its receipts: `row_id`, `error`, `memory`, `gpu_memory`.

    Named after its first row, so that a retried task replaces its own file.
    """
    num_rows = len(decoded)
    if len(table):
        pq.write_table(table, f"{folder}/rows-{decoded['row_id'][0].as_py():012d}.parquet", compression="none")
    return pa.table(
        {
            "row_id": decoded["row_id"],
            "error": decoded["error"],
            "memory": pa.array([peak_memory_bytes()] * num_rows, pa.int64()),
            "gpu_memory": pa.array([gpu_memory] * num_rows, pa.int64()),
        }
    )


def good_pixels(decoded: pa.Table, shape: tuple[int, int]) -> tuple[pa.Array, np.ndarray]:
    """Returns row ids and pixels, uint8 `(num_good, height, width, 3)`, of the rows that decoded."""
    good = decoded.filter(decoded["error"].is_null())
    pixels = [np.frombuffer(value.as_buffer(), np.uint8) for value in good["pixels"]]
    return good["row_id"].combine_chunks(), np.stack(pixels).reshape(-1, *shape, 3) if pixels else np.empty(
        (0, *shape, 3), np.uint8
    )


def read_blocks(folder: str, row_ids: np.ndarray) -> Iterator[tuple[np.ndarray, pa.Table]]:
    """Yields (places in `row_ids`, rows of one file in that order) for every file that holds wanted rows.

    Raises:
        DataError: a wanted row is not in the cache, or a file is damaged.
    """
    order = np.argsort(row_ids)
    wanted, num_found = row_ids[order], 0
    for path in sorted(Path(folder).glob("rows-*.parquet")):
        try:
            table = pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{path}: damaged ({reason}); delete the folder to have it rebuilt") from error
        ids = table["row_id"].to_numpy()
        places = np.searchsorted(wanted, ids)
        hits = places < len(wanted)
        hits[hits] = wanted[places[hits]] == ids[hits]
        if hits.any():
            num_found += int(hits.sum())
            yield order[places[hits]], table.filter(pa.array(hits))
    if num_found != len(row_ids):
        raise DataError(f"{folder}: {len(row_ids) - num_found} rows are missing; delete the folder to have it rebuilt")


def peak_memory_bytes() -> int:
    """Returns the largest resident set that this process has had."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024  # Linux counts in KiB
