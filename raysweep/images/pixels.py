"""What becomes of an image's pixels, and PixelCache: images decoded and resized once, for the loops to crop from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from raysweep.encoders.preprocess import Preprocessing
from raysweep.errors import DataError
from raysweep.images.cache import read_blocks
from raysweep.images.decode import decode_images
from raysweep.images.sources import ImageIndex, read_image_bytes
from raysweep.paths import signature


@dataclass(frozen=True)
class PixelRequest:
    """A pixel cache to be had: `folder` is named after `pixel_signature`."""

    folder: Path
    preprocessing: Preprocessing


@dataclass(frozen=True)
class Geometry:
    """From decoded images to pixels of one shape. Caches whose geometries are equal share the pixels.

    Attributes:
        preprocessing: without colours, which come later.
        for_training: whether what augmentation crops from is kept, or what the encoder sees.
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
        """Returns uint8 pixels of `shape` from what `decode_images` gave."""
        image = images[self.preprocessing.min_side]
        if self.for_training:
            return self.preprocessing.resize_for_training(image)
        return self.preprocessing.resize_and_crop(image)


def decode_rows(
    rows: pa.Table, image_column: str | None, geometries: Sequence[Geometry], num_threads: int
) -> tuple[list[str | None], dict[Geometry, np.ndarray]]:
    """Reads and decodes rows of an `ImageIndex`, each image once per size that draft mode gives.

    Args:
        rows: with the columns `path`, `position` and `image`.
        image_column: that of the index.
        geometries: what is wanted of every image.
        num_threads: threads that read and decode; Pillow releases the interpreter lock.

    Returns:
        For every row None, or why it is bad; and for each geometry uint8 `(len(rows), *shape)`, zero where bad.
    """
    paths, positions, inline = (rows[name].to_pylist() for name in ("path", "position", "image"))
    in_tables = any(position >= 0 for position in positions)
    contents = read_image_bytes(paths, positions, inline, image_column) if in_tables else []
    pixels = {geometry: np.zeros((len(rows), *geometry.shape), np.uint8) for geometry in geometries}
    min_sides = {geometry.preprocessing.min_side for geometry in geometries}

    def decode_row(row: int) -> str | None:
        try:
            # Files are read by the threads too, because one on a network takes as long as decoding it.
            content = contents[row] if in_tables else read_image_bytes([paths[row]], [-1], [inline[row]], None)[0]
            if isinstance(content, DataError):
                raise content
            images = decode_images(content, min_sides)
        except DataError as error:
            return str(error)
        for geometry in geometries:
            pixels[geometry][row] = geometry.decode(images)
        return None

    if num_threads == 1:
        return [decode_row(row) for row in range(len(rows))], pixels
    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(decode_row, range(len(rows)))), pixels


def pixel_signature(index: ImageIndex, preprocessing: Preprocessing) -> str:
    """Signature of row contents and of the geometry; encoders that differ in mean and std alone share a cache."""
    geometry = preprocessing.to_dict()
    kept = {key: geometry[key] for key in ("resize", "resize_size", "crop_size", "resample")}
    rows = signature([index.table["row_id"].to_pylist(), index.table["content_hash"].to_pylist()])
    return signature(["pixels", rows, kept])


def pixel_table(row_ids: np.ndarray, pixels: Iterable[np.ndarray]) -> pa.Table:
    """Rows of a pixel cache: `row_id`, and `pixels` as the bytes of uint8 (height, width, 3)."""
    return pa.table({"row_id": row_ids, "pixels": pa.array([image.tobytes() for image in pixels], pa.large_binary())})


def load_pixels(folder: str, row_ids: np.ndarray, shape: tuple[int, int]) -> torch.Tensor:
    """Reads cached pixels, uint8 `(len(row_ids), height, width, 3)`, in the order of `row_ids`."""
    pixels = np.empty((len(row_ids), *shape, 3), np.uint8)
    for places, table in read_blocks(folder, row_ids, ["pixels"]):
        for place, value in zip(places, table["pixels"], strict=True):
            pixels[place] = np.frombuffer(value.as_buffer(), np.uint8).reshape(*shape, 3)
    return torch.from_numpy(pixels)
