"""From images to pixels of one shape, and PixelCache: images decoded and resized once, for training to crop from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from raysweep.encoders.preprocess import Preprocessing
from raysweep.errors import DataError
from raysweep.images.cache_files import (
    Checksums,
    check_types,
    file_of_rows,
    list_files,
    missing_rows,
    reading_file,
    write_file,
)
from raysweep.images.decode import DEFAULT_OPTIONS, DecodeOptions, decode_images
from raysweep.images.disk_rows import read_into, runs
from raysweep.images.image_bytes import content_hash, read_image_bytes
from raysweep.images.image_hashes import hash_image
from raysweep.images.index import UNREAD, ImageIndex
from raysweep.storage.paths import signature

PIXEL_FORMAT = "arrow"  # format of the files; a new value makes every existing pixel cache invalid


@dataclass(frozen=True, slots=True)
class PixelRequest:
    """A pixel cache that a sweep needs.

    Attributes:
        folder: Folder of the cache, named after `pixel_signature`.
        preprocessing: The encoder's preprocessing.
        streamed: Whether the disk has no room for pixels. The pass then only looks for rows that cannot be decoded.
    """

    folder: Path
    preprocessing: Preprocessing
    streamed: bool = False


@dataclass(frozen=True, slots=True)
class Geometry:
    """How decoded images become pixels of one shape. Caches with equal geometries share the pixels.

    Attributes:
        preprocessing: The preprocessing, with neutral values for rescaling and normalisation, which happen later.
        for_training: True for the larger image that augmentation crops from, False for what the encoder gets.
    """

    preprocessing: Preprocessing
    for_training: bool

    @classmethod
    def of(cls, preprocessing: Preprocessing, *, for_training: bool) -> Geometry:
        """Returns the geometry of a preprocessing."""
        colourless = replace(preprocessing, mean=(0.0,) * 3, std=(1.0,) * 3, rescale_factor=1.0)
        return cls(colourless, for_training)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, 3) of the pixels."""
        size = self.preprocessing.training_size if self.for_training else self.preprocessing.output_size
        return (*size, 3)

    def decode(self, images: dict[int | None, Any]) -> np.ndarray:
        """Returns uint8 pixels of `shape` from the result of `decode_images`."""
        image = images[self.preprocessing.min_side]
        if self.for_training:
            return self.preprocessing.resize_for_training(image)
        return self.preprocessing.resize_and_crop(image)


def decode_rows(
    rows: pa.Table,
    image_column: str | None,
    geometries: Sequence[Geometry],
    num_threads: int,
    options: DecodeOptions = DEFAULT_OPTIONS,
    hashes: np.ndarray | None = None,
) -> tuple[list[str | None], dict[Geometry, np.ndarray]]:
    """Reads and decodes rows of an `ImageIndex`. Each image is decoded once for each size that draft mode gives.

    Args:
        rows: A table with the columns `path`, `position`, `image` and `content_hash`.
        image_column: `ImageIndex.image_column`.
        geometries: The geometries that every image is prepared for.
        num_threads: Threads that read and decode. Pillow releases Python's global interpreter lock.
        options: `ImageIndex.decode_options`.
        hashes: uint8 `(len(rows), 32)`, receives the `image_hashes.hash_image` of every good row; None for no hashes.

    Returns:
        For every row None, or the reason why it is bad. It begins with `UNREAD` if the image was not read, or has
        changed: that says nothing about the image that was hashed. For each geometry uint8 `(len(rows), *shape)`,
        where bad rows are zero.
    """
    paths, positions, inline = (rows[name].to_pylist() for name in ("path", "position", "image"))
    content_hashes = rows["content_hash"].to_pylist()
    in_tables = any(position >= 0 for position in positions)
    contents = read_image_bytes(paths, positions, inline, image_column) if in_tables else []
    pixels = {geometry: np.zeros((len(rows), *geometry.shape), np.uint8) for geometry in geometries}
    min_sides = {geometry.preprocessing.min_side for geometry in geometries}
    smallest = min(min_sides, key=lambda side: math.inf if side is None else side)

    def decode_row(row: int) -> str | None:
        try:
            # The threads read files too: reading a file over a network takes as long as decoding it.
            content = contents[row] if in_tables else read_image_bytes([paths[row]], [-1], [inline[row]], None)[0]
            if isinstance(content, DataError):
                return f"{UNREAD}: {content}"
            if inline[row] is None and content_hash(content) != content_hashes[row]:
                return f"{UNREAD}: the image has changed since this sweep began"
            images = decode_images(content, min_sides, options)
        except DataError as error:
            return str(error)
        for geometry in geometries:
            pixels[geometry][row] = geometry.decode(images)
        if hashes is not None:
            hashes[row] = hash_image(images[smallest])
        return None

    if num_threads == 1:
        return [decode_row(row) for row in range(len(rows))], pixels
    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(decode_row, range(len(rows)))), pixels


def is_blank(pixels: np.ndarray) -> np.ndarray:
    """Tells which images have one colour only: bool `(n,)` from uint8 `(n, height, width, 3)`."""
    blank: np.ndarray = (pixels[:, ::8, ::8] == pixels[:, :1, :1]).all(axis=(1, 2, 3))  # hardly any image passes this
    for row in np.flatnonzero(blank):
        blank[row] = (pixels[row] == pixels[row, :1, :1]).all()
    return blank


def pixel_signature(index: ImageIndex, preprocessing: Preprocessing) -> str:
    """Returns the signature of contents and geometry. Encoders that differ only in mean and std share a cache."""
    geometry = preprocessing.to_dict()
    kept = {key: geometry[key] for key in ("resize", "resize_size", "crop_size", "resample")}
    return signature(["pixels", PIXEL_FORMAT, index.row_signature, kept])


def pixel_bytes(index: ImageIndex, preprocessing: Preprocessing) -> int:
    """Returns the size of the pixel cache of an index."""
    return len(index.table) * math.prod(Geometry.of(preprocessing, for_training=True).shape)


def write_pixels(folder: str, row_ids: np.ndarray, pixels: np.ndarray) -> Checksums:
    """Writes one file of a pixel cache; returns its name and checksum, or nothing if there are no rows.

    A retried task replaces its own file.

    Args:
        folder: Local folder of the cache's rows.
        row_ids: int64 `(n,)`.
        pixels: uint8 `(n, height, width, 3)`.
    """
    if not len(row_ids):
        return {}
    kind, flat = pa.binary(pixels[0].nbytes), pa.py_buffer(np.ascontiguousarray(pixels))
    values = pa.FixedSizeBinaryArray.from_buffers(kind, len(row_ids), [None, flat])
    rows = pa.record_batch({"row_id": row_ids, "pixels": values})

    def write(path: Path) -> None:
        with pa.ipc.new_file(str(path), rows.schema) as writer:
            writer.write_batch(rows)

    return write_file(file_of_rows(folder, int(row_ids[0]), "arrow"), write)


@dataclass(frozen=True, eq=False, slots=True)
class PixelFiles:
    """Rows of a pixel cache, read from its files when they are needed. It has the methods of `PixelRows`.

    Only the operating system keeps file contents in memory, once for all trials of a node. As in `DiskRows`, files are
    neither memory-mapped nor kept open.

    Attributes:
        paths: The files.
        offsets: int64 `(num_files,)`, the position in each file where its pixels begin, in bytes.
        starts: int64 `(num_files,)`, the number of rows in the files before each file.
        numbers: int64 `(num_rows,)`, the position of each row among the rows of all files.
        shape: (height, width, 3).
    """

    paths: tuple[Path, ...]
    offsets: np.ndarray
    starts: np.ndarray
    numbers: np.ndarray
    shape: tuple[int, int, int]

    def read(self, batches: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yields the pixels of each batch of row numbers, as `PixelRows.read` does; reads a batch when it is asked for.

        Raises:
            DataError: a file has become shorter, or no longer exists.
        """
        return (self._read(rows.numpy()) for rows in batches)

    def _read(self, rows: np.ndarray) -> torch.Tensor:
        numbers = self.numbers[rows]
        places = np.argsort(numbers)
        numbers = numbers[places]
        files = np.searchsorted(self.starts, numbers, side="right") - 1
        pixels = torch.empty((len(rows), *self.shape), dtype=torch.uint8)
        whole, row_bytes = pixels.numpy().reshape(-1).data, math.prod(self.shape)
        for file in np.unique(files).tolist():
            held = slice(*np.searchsorted(files, [file, file + 1]))
            offsets = self.offsets[file] + (numbers[held] - self.starts[file]) * row_bytes
            with reading_file(self.paths[file]), open(self.paths[file], "rb", buffering=0) as opened:
                for start, stop in runs(numbers[held], places[held]):
                    first = int(places[held][start]) * row_bytes
                    buffer = whole[first : first + (stop - start) * row_bytes]
                    if not read_into(opened.fileno(), buffer, int(offsets[start])):
                        raise OSError("it has become shorter")
        return pixels


def open_pixels(folder: str, row_ids: np.ndarray, shape: tuple[int, int, int]) -> PixelFiles:
    """Finds rows of a pixel cache in its files.

    Args:
        folder: Local folder of the cache's rows, from `cache.fetched`.
        row_ids: int64 `(n,)`, the wanted rows.
        shape: (height, width, 3) of the pixels.

    Raises:
        DataError: a wanted row is not in the cache, or a file is damaged or has pixels of another shape.
    """
    paths = tuple(path for path, _ in list_files(folder))
    layouts = [_layout(path, math.prod(shape)) for path in paths]
    lengths = np.array([len(ids) for ids, _ in layouts], np.int64)
    ids = np.concatenate([np.empty(0, np.int64), *(ids for ids, _ in layouts)])
    order = np.argsort(ids)
    places = np.searchsorted(ids[order], row_ids)
    found = places < len(ids)
    found[found] = ids[order][places[found]] == row_ids[found]
    if not found.all():
        raise missing_rows(folder, int((~found).sum()))
    offsets = np.array([offset for _, offset in layouts], np.int64)
    return PixelFiles(paths, offsets, np.cumsum(lengths) - lengths, order[places], shape)


def _layout(path: Path, row_bytes: int) -> tuple[np.ndarray, int]:
    """Returns the row ids of a file, and the position in the file where its pixels begin, in bytes."""
    with reading_file(path):
        whole = pa.memory_map(str(path)).read_buffer()
        rows = pa.ipc.open_file(whole).get_batch(0)
        check_types(rows.schema)
        if rows["pixels"].type != pa.binary(row_bytes):
            raise pa.ArrowInvalid(f"{rows['pixels'].type} where {row_bytes} bytes are expected")
        return rows["row_id"].to_numpy().copy(), rows["pixels"].buffers()[1].address - whole.address
