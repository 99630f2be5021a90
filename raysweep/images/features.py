"""FeatureCache: the features of every image from a frozen encoder, computed in one pass, stored as half floats."""

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

from raysweep.encoders.base import EncoderSpec
from raysweep.encoders.compiled import PassEncoder, encode_batch
from raysweep.errors import EncoderError
from raysweep.images.cache import only_writer
from raysweep.images.cache_files import list_sizes, read_blocks
from raysweep.images.disk_rows import DiskRows
from raysweep.images.index import ImageIndex
from raysweep.storage.checksums import checksum_of
from raysweep.storage.paths import signature

# Images per forward pass. A GPU needs many. On a CPU few are faster, because their activations fit into its cache. One
# thread, in images/s with batches of 1, 4, 8, 16, 32: dinov2-small fp32 6.9, 7.2, 7.1, 7.3, 7.0, bf16 16.7, 21.0, 21.5,
# 21.1, 16.5; MobileNetV2 fp32 82, 92, 79, 55, 39, bf16 115, 192, 207, 109, 120.
ENCODER_BATCH = {("cuda", "fp32"): 128, ("cuda", "bf16"): 128, ("cpu", "fp32"): 4, ("cpu", "bf16"): 8}
STORED_DTYPE, HALF_BYTES, ROW_ID_BYTES = "float16", 2, 8
LARGEST = float(np.finfo(STORED_DTYPE).max)  # a larger outlier would become infinite, and make every logit NaN


@dataclass(frozen=True, slots=True)
class FeatureRequest:
    """A feature cache that a sweep needs.

    Attributes:
        folder: Folder of the cache, named after `feature_signature`.
        encoder: Architecture and preprocessing.
        weights: Object reference of the encoder's state dict as numpy arrays. All processes of a node read it without
            a copy.
        precision: Precision of the forward pass, `fp32` or `bf16`.
    """

    folder: Path
    encoder: EncoderSpec
    weights: Any
    precision: str


def feature_signature(index: ImageIndex, spec: EncoderSpec, weights: str, precision: str) -> str:
    """Returns the signature of everything that cached features depend on.

    Args:
        index: The images. Row ids and contents count, in their order.
        spec: The encoder. Its family, config, preprocessing and parts count.
        weights: The encoder's `weights_signature`.
        precision: Precision of the forward pass, `fp32` or `bf16`.
    """
    values = spec.to_dict()
    kept = {key: values[key] for key in ("family", "config", "preprocessing", "parts")}
    return signature(["features", index.row_signature, kept, weights, precision, STORED_DTYPE])


def feature_bytes(index: ImageIndex, spec: EncoderSpec) -> int:
    """Returns the size of the feature cache of an index."""
    return len(index.table) * (HALF_BYTES * sum(spec.parts.values()) + ROW_ID_BYTES)


@torch.inference_mode()
def encode(encoder: PassEncoder, pixels: np.ndarray, device: torch.device, precision: str) -> dict[str, np.ndarray]:
    """Runs the encoder over uint8 pixels `(n, height, width, 3)`; returns each part, float32 `(n, num_features)`.

    While a GPU works on one batch, the next batch is copied to pinned memory, so that its upload is asynchronous. The
    features stay on the GPU until the end. If a batch does not fit into the memory of the device, the batch size is
    halved.
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
    encoder: PassEncoder, images: torch.Tensor, device: torch.device, precision: str
) -> dict[str, torch.Tensor] | None:
    """Returns the features of one batch, or None if a batch of several images does not fit into the device's memory."""
    if device.type == "cuda":
        images = images.pin_memory()
    try:
        return encode_batch(encoder, images.to(device, non_blocking=True), precision)
    except torch.OutOfMemoryError:
        if len(images) == 1:
            raise
        return None


def feature_table(row_ids: np.ndarray, parts: Mapping[str, np.ndarray]) -> pa.Table:
    """Returns rows of a feature cache: `row_id`, and a fixed-size list of half floats for each part.

    Raises:
        EncoderError: a feature is NaN or infinite.
    """
    columns: dict[str, Any] = {"row_id": row_ids}
    for part, features in parts.items():
        bad = ~np.isfinite(features).all(axis=1)
        if bad.any():
            raise EncoderError(
                f"features: the encoder gives NaN or infinity as '{part}' of {bad.sum()} of {len(bad)} images, "
                f"the first with row id {row_ids[bad][0]}; its weights may be damaged; train.precision: fp32 may help"
            )
        flat = pa.array(np.clip(features, -LARGEST, LARGEST).astype(STORED_DTYPE).reshape(-1))
        columns[part] = pa.FixedSizeListArray.from_arrays(flat, features.shape[1])
    return pa.table(columns)


def load_arrays(encoder: torch.nn.Module, arrays: dict[str, np.ndarray], *, shared: bool = False) -> None:
    """Loads a state dict of numpy arrays. They may be read-only views of Ray's object store.

    Args:
        encoder: Receives the weights.
        arrays: The state dict.
        shared: Whether the encoder uses the arrays themselves, without a copy. It must not be trained then.
    """
    encoder.load_state_dict({name: _as_tensor(np.asarray(array)) for name, array in arrays.items()}, assign=shared)


def _as_tensor(array: np.ndarray) -> torch.Tensor:
    """Wraps an array that is only read, without torch's warning that it must not be written to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def load_features(
    folder: str, row_ids: np.ndarray, parts: Sequence[str], memory_bytes: int | None = None
) -> dict[str, torch.Tensor | DiskRows]:
    """Reads cached features: part -> float16 `(len(row_ids), num_features)`, in the order of `row_ids`.

    Args:
        folder: Local folder of the cache's rows, from `cache.fetched`.
        row_ids: The wanted rows.
        parts: The wanted outputs of the encoder.
        memory_bytes: If all parts together need more than this, each part is written to a file in the folder, once for
            these rows, and is read from there when needed. None sets no limit.

    Raises:
        DataError: a wanted row is not in the cache, or a file is damaged.
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

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for places, table in read_blocks(folder, row_ids, [part]):
            yield places, _half_floats(table, part, width)

    with only_writer(Path(folder)):  # several workers may need the same rows
        # The checksum is in the name, so that a damaged file is not found, and is made again.
        for path in Path(folder).glob(f"rows-{key}*.f16"):
            if path.name == f"rows-{key}-{checksum_of(path):08x}.f16":
                return DiskRows.open(path, width)
            path.unlink()
        new = Path(folder) / f"rows-{key}.f16"
        DiskRows.create(new, len(row_ids), width, blocks())
        path = new.rename(new.with_stem(f"{new.stem}-{checksum_of(new):08x}"))
    return DiskRows.open(path, width)
