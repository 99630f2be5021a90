"""The inputs of a worker, as its job describes them: features, pixels and the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch

from raysweep.encoders.build import encoder_from_spec
from raysweep.encoders.head import Classifier, Head
from raysweep.errors import TrialError
from raysweep.images.cache_files import fetched
from raysweep.images.disk_rows import DiskRows
from raysweep.images.features import load_arrays, load_features
from raysweep.images.memory import forget_peak_memory
from raysweep.images.pixels import Geometry, open_pixels
from raysweep.images.splits import Split
from raysweep.images.streaming import StreamedPixels
from raysweep.storage.copies import local_path
from raysweep.training.checkpoint import load_checkpoint, save_checkpoint
from raysweep.training.pixel_rows import PixelRows, PixelSet, ResidentPixels
from raysweep.training.population import FeatureSet, Subsets
from raysweep.worker.job import Job, StudySpec

RESIDENT_SHARE = 0.3  # of a worker's GPU memory, for the pixels of all splits together
RESIDENT_ROWS = 256  # per copy to the GPU

Loaded = TypeVar("Loaded")

# Data of the last job: the next Population often runs in the same process and reads the same data.
_loaded: dict[str, object] = {}


def subsets_of(study: StudySpec, device: torch.device) -> Subsets | None:
    """Returns a study's few-shot draws on a device; None if it trains on all rows."""
    draws = study.draws
    if draws is None:
        return None
    return Subsets(torch.from_numpy(draws.train).to(device), torch.from_numpy(draws.validation).to(device))


def build_classifier(job: Job) -> Classifier:
    """Builds the initial model of every trial of a study that trains on pixels."""
    import ray

    encoder = encoder_from_spec(job.encoder)
    load_arrays(encoder, ray.get(job.weights))
    if job.head is not None:
        (head, *_), source = load_heads(local_path(job.head))
    else:
        source = job.encoder.default_source
        head = Head(encoder.num_features(source), job.num_classes)
    return Classifier(encoder, head, source)


# A baseline's file of the heads that were fitted to train images alone.
START_HEAD = "start.safetensors"


def save_heads(path: Path, heads: Sequence[Head], source: str, metadata: Mapping[str, Any]) -> None:
    """Writes a probe's checkpoint: its heads (one per few-shot draw) and their feature source."""
    tensors = {f"head.{i}.{name}": t for i, head in enumerate(heads) for name, t in head.state_dict().items()}
    save_checkpoint(path, tensors, {**metadata, "head": heads[0].spec(), "num_heads": len(heads), "source": source})


def load_heads(path: Path) -> tuple[list[Head], str]:
    """Reads a probe's checkpoint: its heads (one per few-shot draw) and their feature source.

    Raises:
        TrialError: the file is not a probe's checkpoint.
    """
    tensors, metadata = load_checkpoint(path)
    if "head" not in metadata:
        raise TrialError(f"{path}: not the checkpoint of a linear probe")
    heads = []
    for index in range(metadata["num_heads"]):
        heads.append(Head(**metadata["head"]))
        prefix = f"head.{index}."
        heads[-1].load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
    return heads, metadata["source"]


def reset_memory_peaks(device: torch.device) -> None:
    """Resets the peaks of host and GPU memory, which may be from other studies or from a failed try."""
    forget_peak_memory()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def feature_set(job: Job, split: Split, device: torch.device) -> FeatureSet:
    """Returns the cached features and the labels of a split, on a device; features on the disk stay there."""
    rows = job.rows[split]
    budget = int(job.resources.feature_memory_gb * 1e9) * len(rows) // job.num_rows  # all splits share the memory

    def load() -> dict[str, torch.Tensor | DiskRows]:
        return load_features(fetched(job.cache), rows.ids, list(job.encoder.parts), budget)

    parts = _load_once(f"{job.data_key}/{split}", load)
    groups = None if rows.groups is None else torch.from_numpy(rows.groups).to(device)
    on_device = {name: part.to(device) for name, part in parts.items()}
    return FeatureSet(on_device, torch.from_numpy(rows.labels).to(device), groups)


def pixel_set(job: Job, split: Split, device: torch.device) -> PixelSet:
    """Returns the pixels and labels of a split; the pixels are on the GPU if those of all splits fit there."""
    rows = job.rows[split]
    load = partial(_load_pixels, job, rows.ids, device)
    return PixelSet(_load_once(f"{job.data_key}/{split}", load), torch.from_numpy(rows.labels))


def _load_pixels(job: Job, row_ids: np.ndarray, device: torch.device) -> PixelRows:
    geometry = Geometry.of(job.encoder.preprocessing, for_training=True)
    pixels: PixelRows
    if job.index is None:
        pixels = open_pixels(fetched(job.cache), row_ids, geometry.shape)
    else:
        pixels = StreamedPixels(job.index, row_ids, geometry)
    num_bytes, share = math.prod(geometry.shape) * job.num_rows, job.resources.gpus_per_worker
    if device.type != "cuda" or not fits_on_device(num_bytes, total_memory_of(device), share):
        return pixels
    resident = torch.empty((len(row_ids), *geometry.shape), dtype=torch.uint8, device=device)
    batches = torch.arange(len(row_ids)).split(RESIDENT_ROWS)
    for part, read in zip(resident.split(RESIDENT_ROWS), pixels.read(batches), strict=True):
        part.copy_(read)
    return ResidentPixels(resident)


def total_memory_of(device: torch.device) -> int:
    """Returns the bytes of a GPU's memory."""
    return torch.cuda.mem_get_info(device)[1]


def fits_on_device(num_bytes: int, total_memory: int, gpus_per_worker: float) -> bool:
    """Whether pixels fit into the part of a worker's GPU memory that training leaves for them."""
    return num_bytes <= RESIDENT_SHARE * total_memory * min(1.0, gpus_per_worker)


def _load_once(key: str, load: Callable[[], Loaded]) -> Loaded:
    study = key.rpartition("/")[0]
    for other in [known for known in _loaded if known.rpartition("/")[0] != study]:
        del _loaded[other]
    if key not in _loaded:
        _loaded[key] = load()
    return cast(Loaded, _loaded[key])
