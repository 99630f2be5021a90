"""What feature and pixel caches share: a folder, keyed by a signature, of files of rows and a `manifest.json`.

Each pass writes into a subfolder of its own, and the manifest, written last, names the one that counts: without it
the cache was never finished and is made again (see `passes`). Labels and splits are not in it, so relabelling costs
no pass.
"""

from __future__ import annotations

import ctypes
import fcntl
import resource
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raysweep.errors import DataError
from raysweep.images.sources import BadRow
from raysweep.paths import read_json
from raysweep.storage import (
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

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Cache:
    """A finished cache.

    Attributes:
        folder: its location, named after its signature.
        rows: location of its files of rows, in a subfolder of the pass that wrote them.
        num_rows: images in it.
        bad_rows: images that could be listed but not decoded.
        seconds: its share of the wall time of the pass that wrote it: what was done for it alone, and an equal part
            of the decoding; those of all caches of a pass add up to its wall time.
        peak_memory_bytes: largest resident set of a process of that pass; `peak_gpu_memory_bytes` likewise on a GPU.
        made_now: whether this call made the pass, rather than finding the cache.
        streamed: whether the pass has but looked for bad rows, as there was no room for pixels (see `streaming`).
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
    """Returns the cache in `folder`, or None where no pass has finished."""
    manifest = folder / MANIFEST
    if not manifest.exists():
        return None
    values = read_json(manifest)
    if "rows" not in values:  # of a version that wrote all passes into one folder
        return None
    bad_rows = tuple(BadRow(**row) for row in values.pop("bad_rows"))
    folder = folder.resolve()
    rows = location(folder / values.pop("rows"))
    return Cache(folder=location(folder), rows=rows, bad_rows=bad_rows, made_now=False, **values)


def has_cache(folder: Path, *, streamed: bool = False) -> bool:
    """Whether a pass has finished in `folder`; one that has but looked for bad rows counts where `streamed`."""
    fetch(folder / MANIFEST)  # of a bucket, where another sweep may have made it meanwhile
    cache = open_cache(folder)
    return cache is not None and (streamed or not cache.streamed)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Waits until no other process, nor another thread of this one, writes to this cache."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def remove_leftovers(folder: Path) -> None:
    """Removes what passes that were cut short have left; for who holds the lock of a cache that is to be made.

    Of a bucket only this node's copies: another head, with a lock of its own, may be making the cache too (see
    `remove_older_passes`).
    """
    is_copy = is_bucket(location(folder))
    for path in folder.iterdir():
        if is_copy:
            forget(path)
        elif path.is_dir() or _is_of_rows(path.name):
            remove(path)


def remove_older_passes(rows: Path) -> None:
    """Removes from a bucket what passes that were cut short have left beside the rows of one that has ended.

    That is what has got no file since that one wrote its first, by the bucket's clock: another head that makes the
    same cache goes on, and finds at its end that it is there.
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
    """Size of what passes that were cut short have left on this node for a cache that is not there."""
    total = 0
    with suppress(FileNotFoundError):  # another sweep may begin or end a pass meanwhile
        for path in folder.rglob("*"):
            total += path.stat().st_size if _is_of_rows(path.name) else 0
    return total


def _is_of_rows(name: str) -> bool:
    return name.startswith(("rows-", ".rows-"))


def fetched(cache: str) -> str:
    """Returns the folder of a finished cache's rows on this node, with all of them in it.

    Raises:
        RaysweepError: the bucket that it lies in cannot be read.
    """
    rows = local_path(cache)
    if is_bucket(cache):
        with only_writer(rows):
            fetch_folder(rows, lambda name: name.startswith("rows-") and not name.endswith(".f16"))
            others = [path for path in rows.parent.iterdir() if path.is_dir() and path != rows]
            kept = {name.partition("/")[0] for name in written(rows.parent)} if others else set()
            for other in others:
                if other.name not in kept:
                    forget(other)  # of a pass that was cut short
    return str(rows)


def write_rows(folder: str, table: pa.Table) -> None:
    """Writes one file of a cache, named after its first row, so that a retried task replaces its own file."""
    if len(table):
        path = file_of_rows(folder, table["row_id"][0].as_py(), "parquet")
        with replacing(path) as temporary:
            pq.write_table(table, temporary, compression="none")
        publish(path)


def file_of_rows(folder: str, first: int, suffix: str) -> Path:
    """The file of a cache that begins with the row id `first`."""
    return Path(folder) / f"rows-{first:012d}.{suffix}"


def read_blocks(folder: str, row_ids: np.ndarray, columns: Sequence[str]) -> Iterator[tuple[np.ndarray, pa.Table]]:
    """Yields (places in `row_ids`, rows of one file in that order) for every file that holds wanted rows.

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
    """The error of a cache that lacks wanted rows."""
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
    """Turns what Arrow and the file system raise into a DataError that names the file of a cache."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: damaged ({reason}); {_remedy(path.parent)}") from error


def forget_peak_memory() -> None:
    """Lets `peak_memory_bytes` begin anew, where the system can do that (Linux: proc_pid_clear_refs(5)).

    What is free is given back to the system first. Every trial runs in a thread of its own, for which glibc may keep an
    arena of its own: after five trials of MobileNetV2, of 1.6 GB each, a worker held 4.7 GB.
    """
    with suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory_bytes() -> int:
    """Returns the largest resident set that this process has had, since `forget_peak_memory`."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024  # Linux counts in KiB
