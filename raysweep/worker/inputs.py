"""What a worker trains on and with: features, pixels and the model, as a group's job describes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raysweep.encoders import encoder_from_spec
from raysweep.encoders.head import Classifier, Head
from raysweep.encoders.preprocess import Preprocessing
from raysweep.errors import TrialError
from raysweep.images.cache import fetched, forget_peak_memory
from raysweep.images.features import load_arrays, load_features
from raysweep.images.pixels import Geometry, open_pixels
from raysweep.images.streaming import StreamedPixels
from raysweep.storage import local_path
from raysweep.training.checkpoint import load_checkpoint, save_checkpoint
from raysweep.training.pixel_rows import PixelRows, PixelSet, ResidentPixels
from raysweep.training.population import FeatureSet, Subsets

RESIDENT_SHARE = 0.3  # of a worker's GPU memory, for the pixels of all splits
RESIDENT_ROWS = 256  # that are copied to it at once

# What the last job loaded: actors are reused from one Population to the next, and the data is the same.
_loaded: dict[str, Any] = {}


def widest(job: dict[str, Any]) -> int:
    """Features of the widest source."""
    widths: dict[str, int] = job["encoder"]["parts"]
    return max(sum(widths[part] for part in parts) for parts in sources_of(job).values())


def sources_of(job: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """The encoder's feature sources, each with the parts that it concatenates."""
    return {source: tuple(parts) for source, parts in job["encoder"]["sources"].items()}


def subsets_of(study: dict[str, Any], device: torch.device) -> Subsets | None:
    """A study's few-shot draws on a device; None where it takes all rows."""
    places = study["subsets"]
    return (
        Subsets(*(torch.from_numpy(places[split]).to(device) for split in ("train", "validation"))) if places else None
    )


def build_classifier(job: dict[str, Any]) -> Classifier:
    """Builds the model that every trial of a fine_tune or from_scratch study starts from."""
    import ray

    encoder = encoder_from_spec(job["encoder"])
    load_arrays(encoder, ray.get(job["weights"]))
    if job["head"] is not None:
        (head, *_), source = load_heads(local_path(job["head"]))
    else:
        source = job["source"]
        head = Head(encoder.num_features(source), job["num_classes"])
    return Classifier(encoder, head, source)


def save_heads(path: Path, heads: Sequence[Head], source: str, metadata: dict[str, Any]) -> None:
    """Writes a probe's checkpoint: its heads, one per few-shot draw, and the feature source that they read."""
    tensors = {f"head.{i}.{name}": t for i, head in enumerate(heads) for name, t in head.state_dict().items()}
    save_checkpoint(path, tensors, metadata | {"head": heads[0].spec(), "num_heads": len(heads), "source": source})


def load_heads(path: Path) -> tuple[list[Head], str]:
    """Reads a probe's checkpoint: its heads, one per few-shot draw, and the feature source that they read.

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


def forget_peaks(device: torch.device) -> None:
    """Begins to measure memory anew: this process may have worked for other studies, or run out of memory."""
    forget_peak_memory()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def feature_set(job: dict[str, Any], split: str, device: torch.device) -> FeatureSet:
    """Cached features and labels of a split, on a device."""
    row_ids, labels = job["rows"][split]
    num_rows = sum(len(ids) for ids, _ in job["rows"].values())
    budget = job["memory_bytes"] * len(row_ids) // num_rows  # of what all splits together may take

    def load() -> dict[str, Any]:
        return load_features(fetched(job["cache"]), row_ids, list(job["encoder"]["parts"]), budget)

    parts = _load_once(f"{job['data_key']}/{split}", load)
    return FeatureSet({name: part.to(device) for name, part in parts.items()}, torch.from_numpy(labels).to(device))


def pixel_set(job: dict[str, Any], split: str, device: torch.device) -> PixelSet:
    """Pixels and labels of a split: on a GPU with room for all splits of the job there, else where they are read."""
    row_ids, labels = job["rows"][split]
    load = partial(_load_pixels, job, row_ids, device)
    return PixelSet(_load_once(f"{job['data_key']}/{split}", load), torch.from_numpy(labels))


def _load_pixels(job: dict[str, Any], row_ids: np.ndarray, device: torch.device) -> PixelRows:
    shape = (*job["shape"], 3)
    if job["stream"] is None:
        pixels: PixelRows = open_pixels(fetched(job["cache"]), row_ids, shape)
    else:
        preprocessing = Preprocessing.from_dict(job["encoder"]["preprocessing"])
        pixels = StreamedPixels(job["stream"], row_ids, Geometry.of(preprocessing, for_training=True))
    num_bytes = math.prod(shape) * sum(len(ids) for ids, _ in job["rows"].values())
    if device.type != "cuda" or not fits_on_device(num_bytes, total_memory_of(device), job["gpus_per_worker"]):
        return pixels
    resident = torch.empty((len(row_ids), *shape), dtype=torch.uint8, device=device)
    batches = torch.arange(len(row_ids)).split(RESIDENT_ROWS)
    for part, read in zip(resident.split(RESIDENT_ROWS), pixels.read(batches), strict=True):
        part.copy_(read)
    return ResidentPixels(resident)


def total_memory_of(device: torch.device) -> int:
    """Bytes of a GPU's memory."""
    return torch.cuda.mem_get_info(device)[1]


def fits_on_device(num_bytes: int, total_memory: int, gpus_per_worker: float) -> bool:
    """Whether pixels leave enough of a worker's share of a GPU's memory to what trains on them."""
    return num_bytes <= RESIDENT_SHARE * total_memory * min(1.0, gpus_per_worker)


def _load_once(key: str, load: Callable[[], Any]) -> Any:
    study = key.rpartition("/")[0]
    for other in [known for known in _loaded if known.rpartition("/")[0] != study]:
        del _loaded[other]
    if key not in _loaded:
        _loaded[key] = load()
    return _loaded[key]
