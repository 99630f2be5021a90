"""What feature caches and pixel caches share: a folder with files of rows and a `manifest.json`.

The folder is named after a signature. Each pass writes into its own subfolder. The manifest is written last. It names
the subfolder that counts, and its files with their checksums (see `cache_files`). Without a manifest the cache is not
finished, and a pass makes it again (see `passes`). It does the same if the manifest is damaged, since nothing else
tells damaged files from good ones. A cache holds neither labels nor splits, so a change of these needs no new pass.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache as cached
from pathlib import Path
from typing import Any

from filelock import FileLock
from pydantic import TypeAdapter, ValidationError

from raysweep.errors import DataError
from raysweep.images.index import BadRow
from raysweep.storage.checksums import read_checked_json, write_checked_json
from raysweep.storage.copies import fetch, forget, is_bucket, location, remove, written

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
        files: Name of each file of rows to its checksum; None in caches of earlier versions (see `add_checksums`).
        blank_rows: Ids of rows whose image has one colour only.
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
    files: Mapping[str, int] | None = None
    blank_rows: tuple[int, ...] = ()


def open_cache(folder: Path) -> Cache | None:
    """Returns the cache in `folder`, or None if no pass has finished there, or if its manifest is damaged."""
    try:
        return _read_manifest(folder)
    except DataError:
        return None


def damage_of_manifest(folder: Path) -> str:
    """Returns what is wrong with the manifest of a cache; empty if nothing is, or if there is none."""
    try:
        _read_manifest(folder)
    except DataError as error:
        return str(error)
    return ""


def _read_manifest(folder: Path) -> Cache | None:
    manifest = folder / MANIFEST
    if not manifest.exists():
        return None
    values = read_checked_json(manifest)
    if "rows" not in values:  # an earlier version wrote all passes into one folder
        return None
    try:
        stored = _manifests().validate_python({**values, "folder": location(folder.resolve()), "made_now": False})
    except ValidationError as error:
        wrong = error.errors()[0]
        key = ".".join(map(str, wrong["loc"]))
        raise DataError(f"{manifest}: {key}: {wrong['msg'].lower()}") from None
    for name in (stored.rows, *(stored.files or ())):
        if Path(name).name != name:
            raise DataError(f"{manifest}: '{name}' is not the name of a file in its folder")
    return replace(stored, rows=location(folder.resolve() / stored.rows))


@cached
def _manifests() -> TypeAdapter[Cache]:
    return TypeAdapter(Cache)


def write_manifest(folder: Path, cache: Cache) -> None:
    """Marks a cache as finished, so that `open_cache` finds it."""
    values: dict[str, Any] = asdict(cache)
    del values["folder"], values["made_now"]
    # Only the subfolder's name is stored, so that the cache can be moved.
    subfolder = Path(values.pop("rows")).name
    write_checked_json(folder / MANIFEST, values | {"rows": subfolder})


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
