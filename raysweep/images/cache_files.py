"""The files of rows of a cache: writes and reads them, and compares them with the checksums of the manifest."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raysweep.errors import DataError, one_line
from raysweep.images.cache import MANIFEST, Cache, has_cache, only_writer, open_cache, write_manifest
from raysweep.storage.checksums import checksum_of, checksum_of_bytes
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

Checksums = Mapping[str, int]  # by the name of the file
MAX_THREADS = 8
HALF_EXPONENT = 0x7C00  # these bits are all set in half floats that are infinite or no numbers
_whole_copies: set[tuple[Path, int, int, int | None]] = set()  # path, size, time and checksum
CHANGED = "it has changed since it was written"
MADE_AGAIN = "to have it made again"


def file_of_rows(folder: str, first: int, suffix: str) -> Path:
    """Returns the path of the file that begins with the row id `first`."""
    return Path(folder) / f"rows-{first:012d}.{suffix}"


def write_file(path: Path, write: Callable[[Path], None]) -> Checksums:
    """Writes one file of a cache, completely or not at all; `write` is called with a temporary path."""
    with replacing(path) as temporary:
        write(temporary)
        checksum = checksum_of(temporary)
    publish(path)
    return {path.name: checksum}


def write_rows(folder: str, table: pa.Table) -> Checksums:
    """Writes one file of a feature cache; returns its name and checksum, or nothing if there are no rows.

    The name comes from the first row id, so a retried task replaces its own file.
    """
    if not len(table):
        return {}
    path = file_of_rows(folder, table["row_id"][0].as_py(), "parquet")
    return write_file(path, lambda temporary: pq.write_table(table, temporary, compression="none"))


# Reading


def fetched(cache: str) -> str:
    """Brings the rows of a finished cache to this node, and returns the local folder that they are in.

    A copy that is damaged is fetched again. An object that is damaged is deleted, so that the next run makes it again.

    Args:
        cache: `Cache.rows`.

    Raises:
        RaysweepError: the cache lies in a bucket that cannot be read.
        DataError: a file in the bucket is damaged.
    """
    rows = local_path(cache)
    if is_bucket(cache):
        with only_writer(rows):
            fetch(rows.parent / MANIFEST)
            _fetch_rows(rows)
            others = [path for path in rows.parent.iterdir() if path.is_dir() and path != rows]
            kept = {name.partition("/")[0] for name in written(rows.parent)} if others else set()
            for other in others:
                if other.name not in kept:
                    forget(other)  # an interrupted pass wrote it
    return str(rows)


def _fetch_rows(rows: Path) -> None:
    damaged: list[Path] = []
    for _attempt in range(2):
        fetch_folder(rows, lambda name: name.startswith("rows-") and not name.endswith(".f16"))
        stored = dict(list_files(str(rows)))
        damaged = [path for path, checksum in stored.items() if not _is_as_written(path, checksum)]
        for path in damaged:
            path.unlink(missing_ok=True)
        if not damaged:
            return
    for path in damaged:
        remove(path)
    raise DataError(
        f"{location(damaged[0])}: damaged or missing, as {len(damaged)} of {len(stored)} files; they are deleted; "
        "run the same command again to have them made again"
    )


def list_files(folder: str) -> list[tuple[Path, int | None]]:
    """Returns the files of rows of a cache and their checksums, None where the manifest has none."""
    rows = Path(folder)
    cache = open_cache(rows.parent)
    if cache is None or cache.files is None or Path(cache.rows).name != rows.name:
        return [(path, None) for path in sorted(rows.glob("rows-*")) if path.suffix in (".parquet", ".arrow")]
    return [(rows / name, checksum) for name, checksum in sorted(cache.files.items())]


def read_blocks(folder: str, row_ids: np.ndarray, columns: Sequence[str]) -> Iterator[tuple[np.ndarray, pa.Table]]:
    """Reads the wanted rows, file by file.

    Yields:
        For every file with wanted rows: their positions in `row_ids`, and the rows in the same order.

    Raises:
        DataError: a wanted row is not in the cache, or a file is damaged.
    """
    order = np.argsort(row_ids)
    wanted, num_found = row_ids[order], 0
    for path, checksum in list_files(folder):
        table = _read_table(path, checksum, ["row_id", *columns])
        ids = table["row_id"].to_numpy()
        places = np.searchsorted(wanted, ids)
        hits = places < len(wanted)
        hits[hits] = wanted[places[hits]] == ids[hits]
        if hits.any():
            num_found += int(hits.sum())
            yield order[places[hits]], table.filter(pa.array(hits))
    if num_found != len(row_ids):
        raise missing_rows(folder, len(row_ids) - num_found)


def _read_table(path: Path, checksum: int | None, columns: Sequence[str] | None = None) -> pa.Table:
    """Reads a file of features, and checks what was read."""
    with reading_file(path):
        content = pa.OSFile(str(path)).read_buffer()
        if checksum is not None and checksum_of_bytes(content) != checksum:
            raise OSError(CHANGED)
        table = pq.read_table(pa.BufferReader(content), columns=columns)
        check_types(table.schema)
        for name, column in zip(table.column_names, table.columns, strict=True):
            if pa.types.is_fixed_size_list(column.type) and not _is_finite(column):
                raise OSError(f"{name}: NaN or infinity")
    return table


def _is_finite(column: pa.ChunkedArray) -> bool:
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float16, copy=False)
    return bool(((flat.view(np.uint16) & HALF_EXPONENT) != HALF_EXPONENT).all())


def read_row_ids(path: Path) -> np.ndarray:
    """Returns the row ids of a file of features or pixels.

    Raises:
        DataError: the file is damaged.
    """
    with reading_file(path):
        if path.suffix == ".arrow":
            table = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        else:
            table = pq.read_table(path, columns=["row_id"])
        check_types(table.schema)
        return np.array(table["row_id"])


def check_types(schema: pa.Schema) -> None:
    """Checks the types of a cache's columns before a value is read, because values of extension types may run code.

    Raises:
        ArrowInvalid: a column has another type than caches have.
    """
    for field in schema:
        if field.name == "row_id":
            is_usual = field.type == pa.int64()
        elif pa.types.is_fixed_size_list(field.type):
            is_usual = field.type.value_type == pa.float16()
        else:
            is_usual = pa.types.is_fixed_size_binary(field.type)
        if not is_usual:
            raise pa.ArrowInvalid(f"column '{field.name}' is {field.type}, which no cache has")


def missing_rows(folder: str, count: int) -> DataError:
    """Returns the error for a cache that lacks wanted rows."""
    return DataError(f"{folder}: {count} rows are missing; delete {location(Path(folder).parent)} {MADE_AGAIN}")


def list_sizes(folder: str, columns: Sequence[str]) -> dict[str, int]:
    """Returns the length of the fixed-size lists of each column.

    Raises:
        DataError: the cache is empty or damaged.
    """
    for path, _ in list_files(folder):
        with reading_file(path):
            schema = pq.read_schema(path)
            check_types(schema)
            return {column: schema.field(column).type.list_size for column in columns}
    raise DataError(f"{folder}: no rows; delete {location(Path(folder).parent)} {MADE_AGAIN}")


@contextmanager
def reading_file(path: Path) -> Iterator[None]:
    """Turns errors of Arrow and of the file system into a DataError that names the file of the cache."""
    try:
        yield
    except (pa.ArrowException, OSError, KeyError) as error:
        reason = one_line(error)
        raise DataError(f"{path}: damaged ({reason}); run the same command again {MADE_AGAIN}") from error


# Checking


def damaged_files(cache: Cache) -> list[str]:
    """Returns the names of files that are missing or not as they were written.

    The contents of objects in a bucket are compared when a node has fetched them (see `fetched`).
    """
    files, rows = cache.files, local_path(cache.rows)
    if not files:
        return []
    if is_bucket(cache.rows):
        return sorted(files.keys() - written(rows).keys())
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        whole = pool.map(lambda name: _checksum(rows / name) == files[name], files)
        return sorted(name for name, is_whole in zip(files, whole, strict=True) if not is_whole)


def remove_others(rows: Path, files: Collection[str]) -> None:
    """Removes from a cache all files of rows but the named ones, also from its bucket."""
    present = {path.name for path in rows.glob("rows-*")} if rows.is_dir() else set()
    if is_bucket(location(rows)):
        present |= written(rows).keys()
    for name in present - set(files):
        remove(rows / name)


def fetch_files(rows: Path, files: Collection[str]) -> list[Path]:
    """Brings files of rows to this node, and returns their paths."""
    fetch_folder(rows, lambda name: name in files)
    return [rows / name for name in files]


def _checksum(path: Path) -> int | None:
    try:
        return checksum_of(path)
    except OSError:
        return None


def _is_as_written(copy: Path, checksum: int | None) -> bool:
    """Whether this node's copy of a file is whole; read once for all splits that a process loads."""
    try:
        status = copy.stat()
    except OSError:
        return False
    state = (copy, status.st_size, status.st_mtime_ns, checksum)
    if checksum is not None and state not in _whole_copies and _checksum(copy) != checksum:
        return False
    _whole_copies.add(state)
    return True


def is_whole(folder: Path, *, streamed: bool = False) -> bool:
    """Tells whether a pass has finished in `folder`, got all images, and all its files are as they were written."""
    cache = open_cache(folder) if has_cache(folder, streamed=streamed) else None
    return cache is not None and not any(what_is_lacking(cache))


def what_is_lacking(cache: Cache) -> tuple[list[str], int]:
    """Returns the names of damaged files, and the number of images that the pass could not read."""
    return damaged_files(cache), sum(row.is_unread for row in cache.bad_rows)


def add_checksums(folder: Path) -> str:
    """Reads the files of a cache that an earlier version made, and stores their checksums. Others are left alone.

    Returns:
        What is wrong with the cache; empty if nothing is.
    """
    with only_writer(folder):
        cache = open_cache(folder)
        if cache is None or cache.files is not None or is_bucket(cache.rows):
            return ""
        files, num_rows = {}, 0
        for path, _ in list_files(cache.rows):
            try:
                ids = read_row_ids(path) if path.suffix == ".arrow" else _read_table(path, None)["row_id"]
            except DataError as error:
                return str(error)
            num_rows += len(ids)
            files[path.name] = checksum_of(path)
        if num_rows != cache.num_rows and not cache.streamed:
            return f"{cache.rows}: {num_rows} rows, {cache.num_rows} were written"
        write_manifest(folder, replace(cache, files=files))
        return ""
