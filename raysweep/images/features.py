"""FeatureCache: what a frozen encoder gives for every image, computed in one pass and kept as half floats."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from raysweep.encoders import Encoder, encoder_from_spec
from raysweep.images.cache import (
    BLOCKS,
    Cache,
    Progress,
    good_pixels,
    open_cache,
    read_blocks,
    write_block,
    write_cache,
)
from raysweep.images.sources import ImageIndex
from raysweep.paths import signature

if TYPE_CHECKING:
    import ray.data

# Images a forward pass: a GPU wants many; on CPUs few, whose activations stay in the cache (measured with MobileNetV2
# on two cores: 77 images/s in batches of 4, 36 in batches of 64).
ENCODER_BATCH = {"cuda": 128, "cpu": 8}
STORED_DTYPE = "float16"
LARGEST = float(np.finfo(STORED_DTYPE).max)  # an outlier beyond it would become infinite, and every logit NaN


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
    rows = signature([index.table["row_id"].to_pylist(), index.table["content_hash"].to_pylist()])
    return signature(["features", rows, kept, weights, precision, STORED_DTYPE])


def build_feature_cache(
    folder: Path,
    index: ImageIndex,
    encoder: Encoder,
    weights: Any,
    *,
    precision: str,
    num_gpus: int,
    on_progress: Progress = lambda _done, _total: None,
) -> Cache:
    """Returns the cache in `folder`, making the one pass of decoding and encoding if it is not there yet.

    Args:
        folder: named after `feature_signature`.
        index: the images.
        encoder: gives the architecture and preprocessing.
        weights: object reference of its state dict as numpy arrays; read without a copy by every actor of a node.
        precision: of the forward pass, `fp32` or `bf16`.
        num_gpus: GPUs to spread the pass over; 0 encodes on CPUs.
        on_progress: called with (images done, images in all).
    """
    if cache := open_cache(folder):
        return cache

    def attach(dataset: ray.data.Dataset, target: str) -> ray.data.Dataset:
        from ray.data import ActorPoolStrategy

        # One actor per GPU. On CPUs one actor uses every core of its node: torch shares a batch among threads with
        # less memory than several copies of the encoder, and one logical CPU leaves the rest to the decoding tasks.
        return dataset.map_batches(
            _Encode,
            fn_constructor_args=(encoder.spec(), weights, precision, target),
            compute=ActorPoolStrategy(size=max(num_gpus, 1)),
            num_cpus=1,
            num_gpus=1 if num_gpus else 0,
            **BLOCKS,
        )

    geometry = {"preprocessing": encoder.preprocessing.to_dict(), "for_training": False}
    return write_cache(folder, index, geometry, attach, on_progress)


class _Encode:
    """An actor that holds the encoder and turns blocks of pixels into files of features."""

    def __init__(self, spec: dict[str, Any], weights: Any, precision: str, folder: str) -> None:
        import ray

        self.encoder = encoder_from_spec(spec)
        load_arrays(self.encoder, ray.get(weights))
        self.device = torch.device("cuda" if torch.cuda.is_available() and ray.get_gpu_ids() else "cpu")
        if self.device.type == "cpu":
            torch.set_num_threads(os.cpu_count() or 1)
        self.encoder.to(self.device).requires_grad_(False)
        self.precision, self.folder = precision, folder

    def __call__(self, decoded: pa.Table) -> pa.Table:
        row_ids, pixels = good_pixels(decoded, self.encoder.preprocessing.output_size)
        columns: dict[str, Any] = {"row_id": row_ids}
        for part, features in encode(self.encoder, pixels, self.device, self.precision).items():
            flat = pa.array(np.clip(features, -LARGEST, LARGEST).astype(STORED_DTYPE).reshape(-1))
            columns[part] = pa.FixedSizeListArray.from_arrays(flat, self.encoder.parts[part])
        gpu_memory = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        return write_block(self.folder, pa.table(columns), decoded, gpu_memory)


@torch.inference_mode()
def encode(encoder: Encoder, pixels: np.ndarray, device: torch.device, precision: str) -> dict[str, np.ndarray]:
    """Runs the encoder over uint8 pixels `(n, height, width, 3)`; returns each part, float32 `(n, num_features)`."""
    parts: dict[str, list[torch.Tensor]] = {part: [] for part in encoder.parts}
    for chunk in torch.from_numpy(pixels).split(ENCODER_BATCH[device.type]) if len(pixels) else ():
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            outputs = encoder(encoder.preprocessing.normalize(chunk.to(device)))
        for part, features in outputs.items():
            parts[part].append(features.float().cpu())
    return {
        part: torch.cat(values).numpy() if values else np.empty((0, encoder.parts[part]), np.float32)
        for part, values in parts.items()
    }


def load_arrays(encoder: torch.nn.Module, arrays: dict[str, np.ndarray]) -> None:
    """Loads a state dict of numpy arrays, which may be read-only views of the object store."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        encoder.load_state_dict({name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()})


def load_features(folder: str, row_ids: np.ndarray, parts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Reads cached features: part -> float16 `(len(row_ids), num_features)`, in the order of `row_ids`."""
    features: dict[str, np.ndarray] = {}
    for places, table in read_blocks(folder, row_ids):
        for part in parts:
            values = table[part].combine_chunks()
            block = values.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1)
            if part not in features:
                features[part] = np.empty((len(row_ids), block.shape[1]), STORED_DTYPE)
            features[part][places] = block
    return {part: torch.from_numpy(values) for part, values in features.items()}
