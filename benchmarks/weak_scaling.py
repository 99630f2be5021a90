"""Weak scaling of the encoder pass: nodes of one machine, each with its share of images, and an encoder that sleeps.

What is measured is what several nodes add: Ray Data's scheduling, its tasks' start, files and receipts. The encoder is
a stub that sleeps a fixed time an image, because the cores of one machine cannot be several nodes' at once. Each count
of nodes is a process of its own, and the pass is that of a sweep on a cluster (`build_caches`), start included.
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
from raysweep.images.passes import build_caches

NODES = (1, 2, 4)
IMAGES_PER_NODE, SECONDS_PER_IMAGE = 4_800, 0.025  # two minutes at 40 images/s, as a CPU has with a small ViT
# Whose import is quick: nodes that share two cores start one after another, as machines do not.
ENCODER = {"type": "stacked_cnn", "image_size": 32, "config": {"channels": [8]}}
DISTINCT_IMAGES = 64


def make_index(count: int) -> ImageIndex:
    """An index of small images in memory."""
    noise = np.random.default_rng(0)
    images = []
    for _ in range(DISTINCT_IMAGES):
        buffer = io.BytesIO()
        Image.fromarray(noise.integers(0, 256, (32, 32, 3), np.uint8)).save(buffer, "PNG")
        images.append(buffer.getvalue())
    ids = np.arange(count)
    columns = {
        "row_id": ids,
        "path": [f"{number}.png" for number in ids],
        "position": np.full(count, -1),
        "image": pa.array([images[number % DISTINCT_IMAGES] for number in ids], pa.large_binary()),
        "label": pa.array(ids % 2, pa.int32()),
        "split": ["train"] * count,
        "content_hash": [str(number) for number in ids],
    }
    return ImageIndex(pa.table(columns), ("a", "b"), (), (), count, "fingerprint")


def sleep_instead(marks: str, seconds: float) -> Any:
    """What every worker process does first: its encoders sleep, and note on which node for how many images."""

    def replace_encode() -> None:
        import ray
        import torch

        from raysweep.images import pass_tasks

        def encode(encoder: Any, pixels: np.ndarray, _device: torch.device, _precision: str) -> dict[str, np.ndarray]:
            time.sleep(seconds * len(pixels))
            with open(f"{marks}/{ray.get_runtime_context().get_node_id()}", "a") as mark:
                mark.write(f"{len(pixels)}\n")
            return {part: np.zeros((len(pixels), width), np.float32) for part, width in encoder.parts.items()}

        pass_tasks.encode = encode

    return replace_encode


def measure(num_nodes: int, per_node: int, on_gpus: bool, folder: Path) -> dict[str, Any]:
    """Makes one pass on nodes with a CPU each, and a pretended GPU where asked; returns its seconds and shares."""
    import ray
    from ray.cluster_utils import Cluster

    marks = folder / "marks"
    marks.mkdir(parents=True)
    index, encoder = make_index(num_nodes * per_node), build_encoder(ENCODER, seed=0)
    cluster = Cluster()
    for _ in range(num_nodes):
        cluster.add_node(num_cpus=1, num_gpus=int(on_gpus), object_store_memory=200_000_000)
    hook = sleep_instead(str(marks), SECONDS_PER_IMAGE)
    try:
        ray.init(
            cluster.address, runtime_env={"worker_process_setup_hook": hook}, log_to_driver=False, logging_level="ERROR"
        )
        weights = ray.put({name: tensor.numpy() for name, tensor in encoder.state_dict().items()})
        request = FeatureRequest(folder / "cache", encoder.spec, weights, "fp32")
        told: list[tuple[float, int]] = []
        started = time.perf_counter()
        (cache,) = build_caches(
            [request],
            index,
            num_gpus=num_nodes if on_gpus else 0,
            num_threads=1,
            num_nodes=num_nodes,
            on_progress=lambda done, _total: told.append((time.perf_counter() - started, done)),
        )
        seconds = time.perf_counter() - started
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert cache.num_rows == num_nodes * per_node
    shares = Counter({path.name: sum(map(int, path.read_text().split())) for path in marks.iterdir()})
    return {"seconds": seconds, "first_rows_s": told[0][0], "shares": sorted(shares.values())}


def run(options: Options) -> Iterator[Figure]:
    """Yields, for each kind of node, the seconds of the pass and the efficiency of two and four nodes."""
    per_node = 64 if options.quick else IMAGES_PER_NODE
    for kind in ("cpu", "gpu"):
        alone = 0.0
        for num_nodes in NODES[: 2 if options.quick else None]:
            folder = options.scratch / f"{kind}-{num_nodes}"
            # An actor on a GPU takes two calls at once, which here sleep at once.
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
