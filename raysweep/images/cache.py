"""What feature caches and pixel caches share: a folder with files of rows and a `manifest.json`.

The folder is named after a signature. Each pass writes into its own subfolder. The manifest is written last and names
the subfolder that counts. Without a manifest the cache is not finished, and a pass makes it again (see `passes`).
A cache holds neither labels nor splits, so a change of these needs no new pass.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from raysweep.errors import DataError
from raysweep.images.index import BadRow
from raysweep.storage.copies import (
    fetch,
    fetch_folder,
    forget,
    is_bucket,
    local_path,
    location,
    publish,
    remove,
    replacing,
    written,
)
from raysweep.storage.paths import read_json, write_json

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Cache:
    """A finished cache. Its manifest has the same keys, except `folder` and `made_now`.

    Attributes:
        folder: Location of the cache, named after its signature.
        rows: Location of the subfolder with its files of rows, written by one pass.
        num_rows: Number of images in the cache.
        bad_rows: Images that could be listed but not decoded.
        seconds: The part of the pass's wall time that this cache cost: the work for this cache alone, and an equal
            part of the decoding. The seconds of all caches of a pass add up to its wall time.
        peak_memory_bytes: Largest resident set size of any process of the pass.
        peak_gpu_memory_bytes: Most GPU memory that any process of the pass had allocated.
        made_now: Whether this call made the cache; False if the cache already existed.
        streamed: Whether the pass only looked for bad rows, because the disk had no room for pixels (see `streaming`).
    """

    folder: str
    rows: str
    num_rows: int
    bad_rows: tuple[BadRow, ...]
    seconds: float
    peak_memory_bytes: int
    peak_gpu_memory_bytes: int
    made_now: bool
    streamed: bool = False


def open_cache(folder: Path) -> Cache | None:
    """Returns the cache in `folder`, or None if no pass has finished there."""
    manifest = folder / MANIFEST
    if not manifest.exists():
        return None
    values = read_json(manifest)
    if "rows" not in values:  # an earlier version wrote all passes into one folder
        return None
    bad_rows = tuple(BadRow(**row) for row in values.pop("bad_rows"))
    folder = folder.resolve()
    rows = location(folder / values.pop("rows"))
    return Cache(folder=location(folder), rows=rows, bad_rows=bad_rows, made_now=False, **values)


def write_manifest(folder: Path, cache: Cache) -> None:
    """Marks a cache as finished, so that `open_cache` finds it."""
    values = asdict(cache)
    del values["folder"], values["made_now"]
    # Only the subfolder's name is stored, so that the cache can be moved.
    subfolder = Path(values.pop("rows")).name
    write_json(folder / MANIFEST, values | {"rows": subfolder})


def has_cache(folder: Path, *, streamed: bool = False) -> bool:
    """Tells whether a pass has finished in `folder`.

    Args:
        folder: The folder of the cache.
        streamed: Whether a pass that only looked for bad rows is enough.
    """
    fetch(folder / MANIFEST)  # in a bucket, another sweep may have made the cache in the meantime
    cache = open_cache(folder)
    return cache is not None and (streamed or not cache.streamed)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Waits until no other process and no other thread writes to this cache, then keeps them out.

    The operating system releases the lock when the process ends, however it ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        yield


def remove_leftovers(folder: Path) -> None:
    """Removes the files of interrupted passes. The caller must hold the lock of the cache, which is to be made.

    If the cache lies in a bucket, only this node's copies are removed: a head node elsewhere, which has its own lock,
    may be making the same cache (see `remove_older_passes`).
    """
    is_copy = is_bucket(location(folder))
    for path in folder.iterdir():
        if is_copy:
            forget(path)
        elif path.is_dir() or _has_rows(path.name):
            remove(path)


def remove_older_passes(rows: Path) -> None:
    """Removes from a bucket what interrupted passes left beside the rows of a finished pass.

    A pass counts as interrupted if it has written nothing since the finished pass wrote its first file, by the bucket's
    clock. Another head node that is still making the same cache continues, and finds at its end that the cache exists.
    """
    if not is_bucket(location(rows)):
        return
    times = defaultdict(list)
    for name, time in written(rows.parent).items():
        times[name.partition("/")[0]].append(time)
    since = min(times.pop(rows.name, [0]))
    for other in times.keys() - {MANIFEST}:
        if max(times[other]) < since:
            remove(rows.parent / other)


def num_leftover_bytes(folder: Path) -> int:
    """Returns the size of what interrupted passes left on this node, for a cache that does not exist yet."""
    total = 0
    with suppress(FileNotFoundError):  # another sweep may begin or end a pass in the meantime
        for path in folder.rglob("*"):
            total += path.stat().st_size if _has_rows(path.name) else 0
    return total


def _has_rows(name: str) -> bool:
    return name.startswith(("rows-", ".rows-"))


def fetched(cache: str) -> str:
    """Brings the rows of a finished cache to this node, and returns the local folder that they are in.

    Args:
        cache: `Cache.rows`.

    Raises:
        RaysweepError: the cache lies in a bucket that cannot be read.
    """
    rows = local_path(cache)
    if is_bucket(cache):
        with only_writer(rows):
            fetch_folder(rows, lambda name: name.startswith("rows-") and not name.endswith(".f16"))
            others = [path for path in rows.parent.iterdir() if path.is_dir() and path != rows]
            kept = {name.partition("/")[0] for name in written(rows.parent)} if others else set()
            for other in others:
                if other.name not in kept:
                    forget(other)  # an interrupted pass wrote it
    return str(rows)


def write_rows(folder: str, table: pa.Table) -> None:
    """Writes one file of a cache. The name comes from the first row id, so a retried task replaces its own file."""
    if len(table):
        path = file_of_rows(folder, table["row_id"][0].as_py(), "parquet")
        with replacing(path) as temporary:
            pq.write_table(table, temporary, compression="none")
        publish(path)


def file_of_rows(folder: str, first: int, suffix: str) -> Path:
    """Returns the path of the file that begins with the row id `first`."""
    return Path(folder) / f"rows-{first:012d}.{suffix}"


def read_blocks(folder: str, row_ids: np.ndarray, columns: Sequence[str]) -> Iterator[tuple[np.ndarray, pa.Table]]:
    """Reads the wanted rows, file by file.

    Yields:
        For every file with wanted rows: their positions in `row_ids`, and the rows in the same order.

    Raises:
        DataError: a wanted row is not in the cache, or a file is damaged.
    """
    order = np.argsort(row_ids)
    wanted, num_found = row_ids[order], 0
    for path in sorted(Path(folder).glob("rows-*.parquet")):
        with reading_file(path):
            table = pq.read_table(path, columns=["row_id", *columns])
        ids = table["row_id"].to_numpy()
        places = np.searchsorted(wanted, ids)
        hits = places < len(wanted)
        hits[hits] = wanted[places[hits]] == ids[hits]
        if hits.any():
            num_found += int(hits.sum())
            yield order[places[hits]], table.filter(pa.array(hits))
    if num_found != len(row_ids):
        raise missing_rows(folder, len(row_ids) - num_found)


def missing_rows(folder: str, count: int) -> DataError:
    """Returns the error for a cache that lacks wanted rows."""
    return DataError(f"{folder}: {count} rows are missing; {_remedy(Path(folder))}")


def _remedy(rows: Path) -> str:
    return f"delete {location(rows.parent)} to have the cache made again"


def list_sizes(folder: str, columns: Sequence[str]) -> dict[str, int]:
    """Returns the length of the fixed-size lists of each column.

    Raises:
        DataError: the cache is empty or damaged.
    """
    for path in Path(folder).glob("rows-*.parquet"):
        with reading_file(path):
            schema = pq.read_schema(path)
            return {column: schema.field(column).type.list_size for column in columns}
    raise DataError(f"{folder}: no rows; {_remedy(Path(folder))}")


@contextmanager
def reading_file(path: Path) -> Iterator[None]:
    """Turns errors of Arrow and of the file system into a DataError that names the file of the cache."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: damaged ({reason}); {_remedy(path.parent)}") from error
