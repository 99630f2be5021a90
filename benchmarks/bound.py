"""A complete sweep without caches, compared at three sizes with the bare loop, which only decodes and encodes.

The same runs give the growth: the time and memory of the second half of the images, compared with the first.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures import Figure, Options, make_figure
from benchmarks.images import repeat_images, source_images
from benchmarks.sweeps import DINOV2_SMALL, SEED, TINY_DINOV2, make_experiment, run_command, run_sweep

NUM_IMAGES, NUM_IMAGES_QUICK = (1_300, 2_600, 5_200), (100, 200, 400)
DECODE_THREADS = (0, 2)


def run_bare_loop(folder: Path, images: Path, encoder: dict[str, Any], *arguments: str) -> dict[str, Any]:
    """Runs the bare loop over the images of a folder in a process of its own; returns what it prints."""
    command = ["-m", "benchmarks.bare_loop", str(images), "--encoder", json.dumps(encoder), "--seed", str(SEED)]
    result: dict[str, Any] = json.loads(run_command([*command, *arguments], folder).stdout)
    return result


def run(options: Options) -> Iterator[Figure]:
    """Yields the ratio at each size, then slope, fixed cost, and growth of time and memory."""
    encoder = TINY_DINOV2 if options.quick else DINOV2_SMALL
    sizes = NUM_IMAGES_QUICK if options.quick else NUM_IMAGES
    files = source_images(options)
    sweeps, bare, memory = [], [], []
    variants: tuple[int, ...] = DECODE_THREADS
    for size in sizes:
        folder = options.scratch / str(size)
        repeat_images(files, folder / "images", size)
        sweep = run_sweep(folder, make_experiment(f"cold-{size}", folder / "images", [encoder]))
        loops = [
            run_bare_loop(folder, folder / "images", encoder, "--decode-threads", str(threads)) for threads in variants
        ]
        shutil.rmtree(folder)
        fastest = min(loops, key=lambda loop: float(loop["seconds"]))
        loops_by_threads = dict(zip(map(str, variants), loops, strict=True))
        variants = (
            variants[loops.index(fastest)],
        )  # the larger sizes run only the variant that is faster at the smallest size
        sweeps.append(sweep.seconds)
        bare.append(float(fastest["seconds"]))
        memory.append(sweep.peak_memory_bytes)
        details: dict[str, Any] = {
            "sweep_s": sweep.seconds,
            "bare_loops": loops_by_threads,
        }
        yield make_figure("bound", f"sweep / bare loop, {size} images", sweeps[-1] / bare[-1], "x", **details)
    yield from _trends(sizes, sweeps, bare, memory)


def _trends(sizes: tuple[int, ...], sweeps: list[float], bare: list[float], memory: list[int]) -> Iterator[Figure]:
    (slope, fixed), (bare_slope, bare_fixed) = (np.polyfit(sizes, seconds, 1) for seconds in (sweeps, bare))
    details = {"sizes": sizes, "sweep_s": sweeps, "bare_s": bare}
    yield make_figure("bound", "slope ratio", slope / bare_slope, "x", "<= 1.05", **details)
    yield make_figure("bound", "fixed cost", fixed - bare_fixed, "s", "<= 20", **details)
    growth = (sweeps[2] - sweeps[1]) / (2 * (sweeps[1] - sweeps[0]))
    yield make_figure("bound", "growth of time", growth, "x", "<= 1.05", **details)
    megabytes = (memory[2] - memory[0]) / 1e6
    yield make_figure("bound", "growth of driver memory", megabytes, "MB", "<= 100", peak_memory_bytes=memory)
