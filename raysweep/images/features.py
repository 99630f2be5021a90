"""FeatureCache: what a frozen encoder gives for every image, computed in one pass and kept as half floats."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from raysweep.encoders import Encoder
from raysweep.images.cache import list_sizes, only_writer, read_blocks
from raysweep.images.sources import ImageIndex
from raysweep.paths import signature
from raysweep.training.disk_rows import DiskRows

# Images a forward pass: a GPU wants many; on CPUs few, whose activations stay in the cache. Measured on two cores, in
# images/s: dinov2-small in fp32 17.6 in batches of 4, 11.6 of 32; MobileNetV2 104 of 4, 48 of 32, in bf16 118 of 8.
ENCODER_BATCH = {("cuda", "fp32"): 128, ("cuda", "bf16"): 128, ("cpu", "fp32"): 4, ("cpu", "bf16"): 8}
STORED_DTYPE, HALF_BYTES = "float16", 2
LARGEST = float(np.finfo(STORED_DTYPE).max)  # an outlier beyond it would become infinite, and every logit NaN


@dataclass(frozen=True)
class FeatureRequest:
    """A feature cache to be had.

    Attributes:
        folder: named after `feature_signature`.
        encoder: gives the architecture and preprocessing.
        weights: object reference of its state dict as numpy arrays; read without a copy by all processes of a node.
        precision: of the forward pass, `fp32` or `bf16`.
    """

    folder: Path
    encoder: Encoder
    weights: Any
    precision: str


def feature_signature(index: ImageIndex, encoder: Encoder, weights: str, precision: str) -> str:
    """Signature of everything that cached features depend on.

    Args:
        index: whose row contents, in order, are meant.
        encoder: its preprocessing, parts and architecture count.
        weights: `encoders.weights_signature` of it.
        precision: `fp32` or `bf16`, that of the forward pass.
    """
    spec = encoder.spec()
    kept = {key: spec[key] for key in ("family", "config", "preprocessing", "parts")}
    return signature(["features", index.row_signature, kept, weights, precision, STORED_DTYPE])


@torch.inference_mode()
def encode(encoder: Encoder, pixels: np.ndarray, device: torch.device, precision: str) -> dict[str, np.ndarray]:
    """Runs the encoder over uint8 pixels `(n, height, width, 3)`; returns each part, float32 `(n, num_features)`.

    While a GPU works on one batch, the next is copied to pinned memory, from where its upload needs no waiting for;
    what comes out stays there until the end. Where a batch does not fit into its memory, batches are halved.
    """
    images, size = _as_tensor(pixels), ENCODER_BATCH[device.type, precision]
    parts = {part: [torch.empty((0, width), device=device)] for part, width in encoder.parts.items()}
    done = 0
    while done < len(images):
        outputs = _forward(encoder, images[done : done + size], device, precision)
        if outputs is None:
            size = max(1, min(size, len(images) - done) // 2)
            continue
        for part, features in outputs.items():
            parts[part].append(features.float())
        done += size
    return {part: torch.cat(batches).cpu().numpy() for part, batches in parts.items()}


def _forward(
    encoder: Encoder, images: torch.Tensor, device: torch.device, precision: str
) -> dict[str, torch.Tensor] | None:
    """Features of one batch, or None where several images at once do not fit into the device's memory."""
    if device.type == "cuda":
        images = images.pin_memory()
    try:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            outputs: dict[str, torch.Tensor] = encoder(
                encoder.preprocessing.normalize(images.to(device, non_blocking=True))
            )
            return outputs
    except torch.OutOfMemoryError:
        if len(images) == 1:
            raise
        return None


def feature_table(row_ids: np.ndarray, parts: Mapping[str, np.ndarray]) -> pa.Table:
    """Rows of a feature cache: `row_id`, and a fixed-size list of half floats for each part."""
    columns: dict[str, Any] = {"row_id": row_ids}
    for part, features in parts.items():
        flat = pa.array(np.clip(features, -LARGEST, LARGEST).astype(STORED_DTYPE).reshape(-1))
        columns[part] = pa.FixedSizeListArray.from_arrays(flat, features.shape[1])
    return pa.table(columns)


def load_arrays(encoder: torch.nn.Module, arrays: dict[str, np.ndarray]) -> None:
    """Loads a state dict of numpy arrays, which may be read-only views of the object store."""
    encoder.load_state_dict({name: _as_tensor(np.asarray(array)) for name, array in arrays.items()})


def _as_tensor(array: np.ndarray) -> torch.Tensor:
    """Wraps an array that is only read from, without the warning that it must not be written to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def load_features(
    folder: str, row_ids: np.ndarray, parts: Sequence[str], memory_bytes: int | None = None
) -> dict[str, torch.Tensor | DiskRows]:
    """Reads cached features: part -> float16 `(len(row_ids), num_features)`, in the order of `row_ids`.

    Args:
        folder: the cache's.
        row_ids: rows wanted.
        parts: outputs of the encoder.
        memory_bytes: where all parts together need more than this, each is laid out in a file of the cache, once for
            these rows, and read from there as needed; None for no limit.
    """
    widths = list_sizes(folder, parts)
    if memory_bytes is not None and len(row_ids) * sum(widths.values()) * HALF_BYTES > memory_bytes:
        return {part: _on_disk(folder, row_ids, part, width) for part, width in widths.items()}
    features = {part: np.empty((len(row_ids), width), STORED_DTYPE) for part, width in widths.items()}
    for places, table in read_blocks(folder, row_ids, parts):
        for part, width in widths.items():
            features[part][places] = _half_floats(table, part, width)
    return {part: torch.from_numpy(values) for part, values in features.items()}


def _half_floats(table: pa.Table, part: str, width: int) -> np.ndarray:
    flat: np.ndarray = table[part].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(-1, width)


def _on_disk(folder: str, row_ids: np.ndarray, part: str, width: int) -> DiskRows:
    key = signature([part, hashlib.sha256(row_ids.tobytes()).hexdigest()])
    path = Path(folder) / f"rows-{key}.f16"

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for places, table in read_blocks(folder, row_ids, [part]):
            yield places, _half_floats(table, part, width)

    with only_writer(Path(folder)):  # several workers want the same rows
        if not path.exists():
            DiskRows.create(path, len(row_ids), width, blocks())
    return DiskRows.open(path, width)
