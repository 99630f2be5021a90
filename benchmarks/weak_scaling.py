"""Weak scaling of the encoder pass: Ray nodes on one machine, with equal numbers of images, and a sleeping encoder.

It measures the overhead of several nodes: Ray Data's scheduling, the start of its tasks, files and reports. The
encoder is a stub that sleeps a fixed time per image, because the nodes share the cores of one machine. Each number of
nodes runs in a separate process. The pass is that of a sweep on a cluster (`build_caches`), including its start.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from benchmarks.figures import Figure, Options, make_figure
from benchmarks.sweeps import run_command
from raysweep.encoders.build import build_encoder
from raysweep.images.features import FeatureRequest
from raysweep.images.index import ImageIndex
from raysweep.images.pass_processes import PassProcesses
from raysweep.images.passes import build_caches

NODES = (1, 2, 4)
IMAGES_PER_NODE, SECONDS_PER_IMAGE = 4_800, 0.025  # two minutes at 40 images/s, the speed of a small ViT on a CPU
# Its import is fast. This matters because nodes on two cores start one after another, unlike real machines.
ENCODER = {"type": "stacked_cnn", "image_size": 32, "config": {"channels": [8]}}
DISTINCT_IMAGES = 64


def make_index(count: int) -> ImageIndex:
    """Returns an index of small images in memory."""
    generator = np.random.default_rng(0)
    images = []
    for _ in range(DISTINCT_IMAGES):
        buffer = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), np.uint8)).save(buffer, "PNG")
        images.append(buffer.getvalue())
    ids = np.arange(count)
    columns = {
        "row_id": ids,
        "path": [f"{number}.png" for number in ids],
        "position": np.full(count, -1),
        "image": pa.array([images[number % DISTINCT_IMAGES] for number in ids], pa.large_binary()),
        "label": pa.array(ids % 2, pa.int32()),
        "split": ["train"] * count,
        "content_hash": [b"%d" % number for number in ids],
    }
    return ImageIndex(pa.table(columns), ("a", "b"), (), (), count, "fingerprint")


def sleep_instead(log_folder: str, seconds: float) -> Any:
    """Returns a setup hook for worker processes: encoders sleep, and write their node and number of images to files."""

    def replace_encode() -> None:
        import ray
        import torch

        from raysweep.images import pass_tasks

        def encode(encoder: Any, pixels: np.ndarray, _device: torch.device, _precision: str) -> dict[str, np.ndarray]:
            time.sleep(seconds * len(pixels))
            with open(f"{log_folder}/{ray.get_runtime_context().get_node_id()}", "a") as log:
                log.write(f"{len(pixels)}\n")
            return {part: np.zeros((len(pixels), width), np.float32) for part, width in encoder.parts.items()}

        pass_tasks.encode = encode

    return replace_encode


def measure(num_nodes: int, per_node: int, on_gpus: bool, folder: Path) -> dict[str, Any]:
    """Runs one pass on nodes with one CPU, and a simulated GPU if `on_gpus`; returns seconds and images per node."""
    import ray
    from ray.cluster_utils import Cluster

    log_folder = folder / "log"
    log_folder.mkdir(parents=True)
    index, encoder = make_index(num_nodes * per_node), build_encoder(ENCODER, seed=0)
    cluster = Cluster()
    for _ in range(num_nodes):
        cluster.add_node(num_cpus=1, num_gpus=int(on_gpus), object_store_memory=200_000_000)
    hook = sleep_instead(str(log_folder), SECONDS_PER_IMAGE)
    try:
        ray.init(
            cluster.address, runtime_env={"worker_process_setup_hook": hook}, log_to_driver=False, logging_level="ERROR"
        )
        weights = ray.put({name: tensor.numpy() for name, tensor in encoder.state_dict().items()})
        request = FeatureRequest(folder / "cache", encoder.spec, weights, "fp32")
        progress: list[tuple[float, int]] = []
        started = time.perf_counter()
        (cache,) = build_caches(
            [request],
            index,
            num_gpus=num_nodes if on_gpus else 0,
            processes=PassProcesses(num_nodes, on_cluster=True),
            on_progress=lambda done, _total: progress.append((time.perf_counter() - started, done)),
        )
        seconds = time.perf_counter() - started
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert cache.num_rows == num_nodes * per_node
    shares = Counter({path.name: sum(map(int, path.read_text().split())) for path in log_folder.iterdir()})
    return {"seconds": seconds, "first_rows_s": progress[0][0], "shares": sorted(shares.values())}


def run(options: Options) -> Iterator[Figure]:
    """Yields, for each kind of node, the seconds of the pass, and the efficiency of two and four nodes."""
    per_node = 64 if options.quick else IMAGES_PER_NODE
    for kind in ("cpu", "gpu"):
        alone = 0.0
        for num_nodes in NODES[: 2 if options.quick else None]:
            folder = options.scratch / f"{kind}-{num_nodes}"
            # An actor on a GPU runs two calls at a time, and here both sleep at the same time.
            count = per_node * (2 if kind == "gpu" else 1)
            command = ["-m", "benchmarks.weak_scaling", str(num_nodes), str(count), kind, str(folder)]
            found = json.loads(run_command(command, options.scratch).stdout.splitlines()[-1])
            alone = alone or found["seconds"]
            name, asleep = f"{num_nodes} {kind} nodes", per_node * SECONDS_PER_IMAGE
            yield make_figure("weak_scaling", f"{name}: pass", found["seconds"], "s", asleep_s=asleep, **found)
            if num_nodes > 1:
                yield make_figure("weak_scaling", f"{name}: efficiency", alone / found["seconds"], "x", ">= 0.9")


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "gpu", Path(sys.argv[4]))))
