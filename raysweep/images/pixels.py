"""PixelCache: images decoded and resized once, uint8, for the training loops to crop from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch

from raysweep.encoders.preprocess import Preprocessing
from raysweep.images.cache import BLOCKS, Cache, Progress, open_cache, read_blocks, write_block, write_cache
from raysweep.images.sources import ImageIndex
from raysweep.paths import signature

if TYPE_CHECKING:
    import ray.data


def pixel_signature(index: ImageIndex, preprocessing: Preprocessing) -> str:
    """Signature of row contents and of the geometry; encoders that differ in mean and std alone share a cache."""
    geometry = preprocessing.to_dict()
    kept = {key: geometry[key] for key in ("resize", "resize_size", "crop_size", "resample")}
    rows = signature([index.table["row_id"].to_pylist(), index.table["content_hash"].to_pylist()])
    return signature(["pixels", rows, kept])


def build_pixel_cache(
    folder: Path,
    index: ImageIndex,
    preprocessing: Preprocessing,
    on_progress: Progress = lambda _done, _total: None,
) -> Cache:
    """Returns the cache in `folder`, making one pass of decoding and resizing if it is not there yet."""
    if cache := open_cache(folder):
        return cache

    def attach(dataset: ray.data.Dataset, target: str) -> ray.data.Dataset:
        return dataset.map_batches(_keep, fn_kwargs={"folder": target}, **BLOCKS)

    geometry = {"preprocessing": preprocessing.to_dict(), "for_training": True}
    return write_cache(folder, index, geometry, attach, on_progress)


def _keep(decoded: pa.Table, folder: str) -> pa.Table:
    good = decoded.filter(decoded["error"].is_null()).select(["row_id", "pixels"])
    return write_block(folder, good, decoded)


def load_pixels(folder: str, row_ids: np.ndarray, shape: tuple[int, int]) -> torch.Tensor:
    """Reads cached pixels, uint8 `(len(row_ids), height, width, 3)`, in the order of `row_ids`."""
    pixels = np.empty((len(row_ids), *shape, 3), np.uint8)
    for places, table in read_blocks(folder, row_ids):
        for place, value in zip(places, table["pixels"], strict=True):
            pixels[place] = np.frombuffer(value.as_buffer(), np.uint8).reshape(*shape, 3)
    return torch.from_numpy(pixels)
