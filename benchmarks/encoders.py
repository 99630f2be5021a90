"""The time that a second encoder adds to a sweep without caches, compared with its forward pass on decoded pixels."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from benchmarks.bound import run_bare_loop
from benchmarks.figures import Figure, Options, make_figure
from benchmarks.images import repeat_images, source_images
from benchmarks.sweeps import DINOV2_SMALL, TINY_DINOV2, make_experiment, run_sweep

NUM_TRIALS = 8  # few, because the benchmark measures the encoder pass

# The same cost as dinov2-small: 196 patches and a class token, 12 blocks of width 384.
CLIP_SMALL = {
    "type": "clip",
    "use_pretrained": False,
    "config": {
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "patch_size": 16,
    },
}
TINY_CLIP = {
    "type": "clip",
    "use_pretrained": False,
    "image_size": 64,
    "config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
}


def run(options: Options) -> Iterator[Figure]:
    """Yields the ratio; one sweep of each kind, a few minutes each."""
    first, second = (TINY_DINOV2, TINY_CLIP) if options.quick else (DINOV2_SMALL, CLIP_SMALL)
    num_images, repeats = (60, 1) if options.quick else (1_300, 1)
    images = options.scratch / "images"
    repeat_images(source_images(options), images, num_images)
    seconds: dict[str, list[float]] = {"one": [], "both": []}
    forward = []
    for repeat in range(repeats):
        for name, encoders in (("one", [first]), ("both", [first, second])):
            folder = options.scratch / f"{name}-{repeat}"
            experiment = make_experiment(name, images, encoders, NUM_TRIALS, baselines=[])
            seconds[name].append(run_sweep(folder, experiment).seconds)
        forward.append(float(run_bare_loop(options.scratch, images, second, "--forward-only")["seconds"]))
    added = statistics.median(seconds["both"]) - statistics.median(seconds["one"])
    ratio = added / statistics.median(forward)
    yield make_figure(
        "encoders", "second encoder / its forward pass", ratio, "x", "<= 1.10", forward_s=forward, **seconds
    )
