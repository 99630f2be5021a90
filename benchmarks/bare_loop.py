"""The bare loop that a sweep is held against: read, decode, encode, in one process, by the plainest code there is.

Run as a script of its own; prints one JSON object. Importing, building the encoder and choosing the batch size are not
counted. The encoder, its preprocessing and its precision are those of the sweep; no Ray, no cache.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from raysweep.encoders.base import Encoder
from raysweep.encoders.build import build_encoder
from raysweep.encoders.precision import faster_precision
from raysweep.images.decode import decode_image

BATCH_SIZES = {"cpu": (2, 4, 8, 16, 32), "cuda": (32, 64, 128, 256)}
NUM_TRIED = 32
BATCHES_AHEAD = 8


def decode(encoder: Encoder, path: Path) -> np.ndarray:
    """Returns the pixels of one file, uint8 `(height, width, 3)`."""
    preprocessing = encoder.preprocessing
    return preprocessing.resize_and_crop(decode_image(path.read_bytes(), preprocessing.min_side))


def decoded_batches(
    encoder: Encoder, paths: Sequence[Path], batch_size: int, num_threads: int
) -> Iterator[Sequence[np.ndarray]]:
    """Yields batches of pixels, decoded when needed, or a few batches ahead if there are threads."""
    chunks = [paths[start : start + batch_size] for start in range(0, len(paths), batch_size)]
    if num_threads == 0:
        yield from ([decode(encoder, path) for path in chunk] for chunk in chunks)
        return
    with ThreadPoolExecutor(num_threads) as pool:
        waiting = deque([pool.submit(decode, encoder, path) for path in chunk] for chunk in chunks[:BATCHES_AHEAD])
        for position in range(len(chunks)):
            ahead = chunks[position + BATCHES_AHEAD : position + BATCHES_AHEAD + 1]
            waiting.extend([pool.submit(decode, encoder, path) for path in chunk] for chunk in ahead)
            yield [one.result() for one in waiting.popleft()]


@torch.inference_mode()
def forward(encoder: Encoder, pixels: Sequence[np.ndarray], device: torch.device, precision: str) -> None:
    """Encodes one batch and copies its features to the CPU as float16."""
    images = torch.from_numpy(np.stack(pixels)).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        outputs = encoder(encoder.preprocessing.normalize(images))
    for features in outputs.values():
        features.half().cpu()


def best_batch_size(encoder: Encoder, paths: Sequence[Path], device: torch.device, precision: str) -> int:
    """Returns the fastest batch size on a few images; each size is tried twice."""
    pixels = [decode(encoder, path) for path in paths[:NUM_TRIED]]
    seconds: dict[int, float] = {}
    for size in BATCH_SIZES[device.type] * 2:
        batches = [pixels[start : start + size] for start in range(0, len(pixels), size)]
        started = time.perf_counter()
        for batch in batches:
            forward(encoder, batch, device, precision)
        seconds[size] = min(time.perf_counter() - started, seconds.get(size, float("inf")))
    return min(seconds, key=lambda size: seconds[size])


def main() -> None:
    """Runs the loop over every .jpg below a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--encoder", type=json.loads, required=True, help="encoder block of an experiment, as JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--decode-threads", type=int, default=0, help="0: decode in the loop")
    parser.add_argument("--forward-only", action="store_true", help="decode everything before the clock starts")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = build_encoder(options.encoder, options.seed).requires_grad_(False).to(device)
    paths = sorted(options.folder.rglob("*.jpg"))
    precision = faster_precision(encoder, device, 2 if device.type == "cpu" else 64)
    size = best_batch_size(encoder, paths, device, precision)
    batches = decoded_batches(encoder, paths, size, options.decode_threads)
    if options.forward_only:
        batches = iter(list(batches))
    started = time.perf_counter()
    for batch in batches:
        forward(encoder, batch, device, precision)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "num_images": len(paths), "batch_size": size, "precision": precision}))


if __name__ == "__main__":
    main()
