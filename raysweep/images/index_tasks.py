"""Opens, checks and hashes the images of a listing: in threads of this process, or in Ray tasks on all nodes.

Ray takes seconds to start and a process for each CPU, so that tasks are worth it for many images only.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from raysweep.errors import DataError
from raysweep.images.blocks import MAX_RETRIES
from raysweep.images.contents import HASH_BYTES
from raysweep.images.decode import DecodeOptions, open_image
from raysweep.images.image_bytes import content_hash, stream_images
from raysweep.images.listed_rows import Listing
from raysweep.images.pixel_depth import is_deep
from raysweep.storage.copies import in_a_job, on_every_node

MIN_ROWS_FOR_TASKS = 50_000
ROWS_PER_CHUNK, ROWS_PER_TASK = 64, 1_024
THREADS, REMOTE_THREADS = 4, 32  # of a task: reading a file over a network takes longer than hashing it
TASKS_PER_CPU = 2  # at a time, so that the next one waits where the last one ends
SECONDS_BETWEEN_LOOKS = 5  # for CPUs that have joined the cluster


@dataclass(frozen=True, slots=True)
class CheckedImages:
    """What is known of the encoded images of rows after each was read once.

    Attributes:
        hashes: uint8 `(rows, 32)`, the SHA-256 of each image; zeros for bad rows.
        deep: bool `(rows,)`, which images have more than 8 bits a channel.
        problems: Why rows are bad, by their places.
        unread: Those of the bad rows whose images could not be read, here: on another node it may be possible.
    """

    hashes: np.ndarray
    deep: np.ndarray
    problems: dict[int, str] = field(default_factory=dict)
    unread: list[int] = field(default_factory=list)

    @classmethod
    def of_size(cls, num_rows: int) -> CheckedImages:
        """Returns arrays of zeros."""
        return cls(np.zeros((num_rows, HASH_BYTES), np.uint8), np.zeros(num_rows, np.bool_))

    def fill(self, rows: np.ndarray, part: CheckedImages) -> None:
        """Takes over what is known of some rows, given by their numbers."""
        self.hashes[rows], self.deep[rows] = part.hashes, part.deep
        self.problems.update({int(rows[place]): problem for place, problem in part.problems.items()})
        self.unread.extend(int(rows[place]) for place in part.unread)


def check_listing(listing: Listing, options: DecodeOptions, start_ray: Callable[[], Any] | None) -> CheckedImages:
    """Reads all images of a listing; their bytes are not kept.

    Args:
        listing: The rows. Those that have a problem already are not read, and keep it.
        options: Limits of the images.
        start_ray: Starts Ray if it does not run. None reads all images in this process, however many there are.

    Raises:
        ResourceError: processes of tasks were ended too often.
    """
    checked = CheckedImages.of_size(len(listing.rows))
    checked.problems.update(listing.rows.problems)
    usable = listing.rows.usable
    listing.rows.paths.pack()  # several threads read them
    if start_ray is None or usable.sum() < MIN_ROWS_FOR_TASKS:
        _check_in_threads(listing, usable, options, checked)
        return checked
    start_ray()
    import ray

    if not ray.cluster_resources().get("CPU"):  # no task would ever run; the sweep says later that it needs CPUs
        _check_in_threads(listing, usable, options, checked)
        return checked
    _check_in_tasks(listing, usable, options, checked)
    # A file may be readable on this node alone, or a node may have lost its network: this process has the last word.
    again = np.zeros(len(usable), np.bool_)
    again[checked.unread] = True
    for row in checked.unread:
        del checked.problems[row]
    checked.unread.clear()
    _check_in_threads(listing, again, options, checked)
    return checked


def _check_in_threads(listing: Listing, wanted: np.ndarray, options: DecodeOptions, checked: CheckedImages) -> None:
    def check(part: np.ndarray) -> None:
        checked.fill(part, check_images(_locators(listing, part), listing.image_column, options))

    remote = any("://" in path for path in listing.rows.paths[:1])
    num_threads = REMOTE_THREADS if remote else min(16, 2 * (os.cpu_count() or 1))
    size = max(ROWS_PER_CHUNK, min(ROWS_PER_TASK, len(wanted) // 1_000))
    with _large_images_allowed(), ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(check, _parts(listing, wanted, size)))


def _check_in_tasks(listing: Listing, wanted: np.ndarray, options: DecodeOptions, checked: CheckedImages) -> None:
    import ray

    task = ray.remote(check_in_task).options(max_retries=MAX_RETRIES, scheduling_strategy="SPREAD")
    parts = _parts(listing, wanted, ROWS_PER_TASK)
    running: dict[Any, np.ndarray] = {}
    looked, limit = 0.0, 0
    try:
        while True:
            if time.monotonic() > looked + SECONDS_BETWEEN_LOOKS:
                looked, limit = time.monotonic(), TASKS_PER_CPU * int(ray.cluster_resources().get("CPU", 1))
            while len(running) < max(1, limit) and (part := next(parts, None)) is not None:
                running[task.remote(_for_every_node(_locators(listing, part)), listing.image_column, options)] = part
            if not running:
                return
            found, _ = ray.wait(list(running), num_returns=1, timeout=SECONDS_BETWEEN_LOOKS)
            for done in found:
                checked.fill(running.pop(done), ray.get(done))
    except ray.exceptions.RayError:
        from raysweep.images.pass_errors import raising_own_errors  # imports torch

        with raising_own_errors():
            raise


def check_in_task(rows: pa.Table, image_column: str | None, options: DecodeOptions) -> CheckedImages:
    """Does what `check_images` does, in several threads; for rows in Parquet files in one, to read row groups once."""
    in_files = bool((rows["position"].to_numpy() >= 0).any())
    size = len(rows) if in_files else ROWS_PER_CHUNK
    starts = range(0, len(rows), max(1, size))
    checked = CheckedImages.of_size(len(rows))
    num_threads = REMOTE_THREADS if "://" in rows["path"][0].as_py() else THREADS
    with _large_images_allowed(), ThreadPoolExecutor(num_threads) as pool:
        parts = pool.map(lambda start: check_images(rows[start : start + size], image_column, options), starts)
        for start, part in zip(starts, parts, strict=True):
            checked.fill(np.arange(start, start + len(part.deep)), part)
    return checked


def check_images(rows: pa.Table, image_column: str | None, options: DecodeOptions) -> CheckedImages:
    """Reads images, checks their headers and hashes them.

    Args:
        rows: Columns `path`, `position` and `image` as `ImageIndex.table` has them.
        image_column: Column of the images in Parquet files.
        options: Limits of the images.
    """
    checked = CheckedImages.of_size(len(rows))
    paths, positions, inline = (rows[name].to_pylist() for name in ("path", "position", "image"))
    for place, image in stream_images(paths, positions, inline, image_column):
        try:
            if isinstance(image, DataError):
                checked.unread.append(place)
                raise image
            with open_image(image, options) as opened:
                checked.deep[place] = is_deep(opened)
            checked.hashes[place] = np.frombuffer(content_hash(image), np.uint8)
        except DataError as error:
            checked.problems[place] = str(error)
    return checked


def _parts(listing: Listing, wanted: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Splits rows into parts of about `size` rows. Row groups of Parquet files are left whole, in larger parts.

    Args:
        listing: The rows.
        wanted: Which of them are wanted, bool `(rows,)`.
        size: The number of rows, wanted or not.

    Yields:
        The numbers of the wanted rows of a part.
    """
    rows, positions = listing.rows, listing.rows.positions
    start, size = 0, ROWS_PER_TASK if listing.row_groups else size
    while start < len(rows):
        stop = min(start + size, len(rows))
        if stop < len(rows) and positions[stop] > 0:
            firsts = listing.row_groups.get(rows.paths[stop], ())
            while stop < len(rows) and positions[stop] > 0 and positions[stop] not in firsts:
                stop += 1
        part = start + np.flatnonzero(wanted[start:stop])
        if len(part):
            yield part
        start = stop


def _locators(listing: Listing, rows: np.ndarray) -> pa.Table:
    """Returns where the images of some rows are."""
    first, last = int(rows[0]), int(rows[-1])
    # Taken, not sliced: Ray would send the whole chunks of which a slice is a part.
    return listing.rows.to_arrow(first, last + 1).take(rows - first)


def _for_every_node(rows: pa.Table) -> pa.Table:
    if not in_a_job():
        return rows
    paths = pa.array(map(on_every_node, rows["path"].to_pylist()), pa.string())
    return rows.set_column(rows.schema.get_field_index("path"), "path", paths)


@contextmanager
def _large_images_allowed() -> Iterator[None]:
    """Leaves it to `data.max_megapixels` how large an image may be."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield
