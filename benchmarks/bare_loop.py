"""The bare loop that a sweep is held against: read, decode, encode, by the plainest code there is, in its best shape.

The shapes are processes x threads x precision x batch size; each is tried on a few images, and the fastest one works on
all. Run as a script of its own; prints one JSON object. Importing, building the encoder and trying the shapes are not
counted. The encoder and its preprocessing are those of the sweep; no Ray, no cache.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raysweep.cluster.resources import local_resources
from raysweep.encoders.base import Encoder
from raysweep.encoders.build import build_encoder
from raysweep.encoders.precision import supports_bf16
from raysweep.images.decode import decode_image

BATCH_SIZES = {"cpu": (4, 8, 16), "cuda": (64, 128, 256)}
NUM_TRIED = 32


@dataclass(frozen=True)
class Shape:
    """Precision and images per forward pass of one loop."""

    precision: str
    batch_size: int


def decode(encoder: Encoder, path: Path) -> np.ndarray:
    """Returns the pixels of one file, uint8 `(height, width, 3)`."""
    preprocessing = encoder.preprocessing
    return preprocessing.resize_and_crop(decode_image(path.read_bytes(), preprocessing.min_side))


@torch.inference_mode()
def forward(encoder: Encoder, pixels: Sequence[np.ndarray], device: torch.device, precision: str) -> None:
    """Encodes one batch and copies its features to the CPU as float16."""
    images = torch.from_numpy(np.stack(pixels)).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        outputs = encoder(encoder.preprocessing.normalize(images))
    for features in outputs.values():
        features.half().cpu()


class Loop:
    """One process of the loop; all of them take the next batch from one counter.

    Args:
        block: encoder block of an experiment.
        seed: of the encoder's weights.
        paths: the images.
        num_threads: CPU threads.
        forward_only: whether everything is decoded before the clock starts.
        counter: number of images that were taken.
    """

    def __init__(
        self,
        block: dict[str, Any],
        seed: int,
        paths: Sequence[Path],
        num_threads: int,
        forward_only: bool,
        counter: Any,
    ) -> None:
        torch.set_num_threads(num_threads)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.encoder = build_encoder(block, seed).requires_grad_(False).to(self.device)
        self.paths, self.counter = paths, counter
        self.decoded = {path: decode(self.encoder, path) for path in dict.fromkeys(paths)} if forward_only else {}

    def run(self, num_images: int, shape: Shape) -> None:
        """Works until `num_images` are taken."""
        while True:
            with self.counter.get_lock():
                start = self.counter.value
                self.counter.value = start + shape.batch_size
            chunk = self.paths[start : min(num_images, start + shape.batch_size)]
            if not chunk:
                return
            pixels = [self.decoded[path] if self.decoded else decode(self.encoder, path) for path in chunk]
            forward(self.encoder, pixels, self.device, shape.precision)


def serve(connection: Connection, *arguments: Any) -> None:
    """Runs in a process of its own: builds a loop, then answers every (num_images, shape) when it is done."""
    loop = Loop(*arguments)
    connection.send(None)
    while task := connection.recv():
        loop.run(*task)
        connection.send(None)


class Processes:
    """Several processes that work side by side."""

    def __init__(self, num_processes: int, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.counter = context.Value("q", 0)
        self.pipes, self.members = [], []
        for _ in range(num_processes):
            ours, theirs = context.Pipe()
            member = context.Process(target=serve, args=(theirs, *arguments, self.counter), daemon=True)
            member.start()
            self.pipes.append(ours)
            self.members.append(member)
        self._wait()

    def _wait(self) -> None:
        for pipe in self.pipes:
            pipe.recv()

    def seconds(self, num_images: int, shape: Shape) -> float:
        """Returns the seconds for the first images."""
        self.counter.value = 0
        started = time.perf_counter()
        for pipe in self.pipes:
            pipe.send((num_images, shape))
        self._wait()
        return time.perf_counter() - started

    def close(self) -> None:
        """Ends the processes."""
        for pipe in self.pipes:
            pipe.send(None)
        for member in self.members:
            member.join()


def main() -> None:
    """Runs the loop over every .jpg below a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--encoder", type=json.loads, required=True, help="encoder block of an experiment, as JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--forward-only", action="store_true", help="decode everything before the clock starts")
    options = parser.parse_args()
    paths = sorted(options.folder.rglob("*.jpg"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precisions = ("fp32", "bf16") if supports_bf16(device) else ("fp32",)
    shapes = [Shape(*values) for values in itertools.product(precisions, BATCH_SIZES[device.type])]
    num_cpus = local_resources().num_cpus
    tried: dict[tuple[int, int, Shape], float] = {}
    layouts = {(1, num_cpus), (num_cpus, 1)} if device.type == "cpu" else {(1, num_cpus)}
    for num_processes, num_threads in sorted(layouts):
        processes = Processes(
            num_processes, options.encoder, options.seed, paths[:NUM_TRIED], num_threads, options.forward_only
        )
        for shape in shapes * 2:  # the first time warms up
            seconds = processes.seconds(min(NUM_TRIED, len(paths)), shape)
            key = (num_processes, num_threads, shape)
            tried[key] = min(seconds, tried.get(key, float("inf")))
        processes.close()
    num_processes, num_threads, shape = min(tried, key=lambda key: tried[key])
    processes = Processes(num_processes, options.encoder, options.seed, paths, num_threads, options.forward_only)
    processes.seconds(min(NUM_TRIED, len(paths)), shape)
    seconds = processes.seconds(len(paths), shape)
    processes.close()
    result = {"seconds": seconds, "num_images": len(paths), "processes": num_processes, "threads": num_threads}
    speeds = {f"{p} x {t}, {s.precision}, {s.batch_size}": NUM_TRIED / value for (p, t, s), value in tried.items()}
    print(json.dumps(result | asdict(shape) | {"tried_images_per_s": speeds}))


if __name__ == "__main__":
    main()
