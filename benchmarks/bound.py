"""A complete sweep without caches, compared with the bare loop, which only decodes and encodes, in its best shape.

Both run on a quiet machine, and with one busy loop per core beside them. The same runs give the growth: the time and
memory of the second half of the images, compared with the first.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.busy import LOADS, load
from benchmarks.figures import Figure, Options, make_figure
from benchmarks.images import repeat_images, source_images
from benchmarks.sweeps import DINOV2_SMALL, SEED, TINY_DINOV2, make_experiment, run_command, run_sweep

NUM_IMAGES, NUM_IMAGES_QUICK = (1_300, 2_600, 5_200), (100, 200, 400)
# The pass may take this share more time per image than the bare loop, on each kind of machine.
LIMITS = {"quiet": "<= 1.05", "busy": "<= 1.15"}


def run_bare_loop(folder: Path, images: Path, encoder: dict[str, Any], *arguments: str) -> dict[str, Any]:
    """Runs the bare loop over the images of a folder in a process of its own; returns what it prints."""
    command = ["-m", "benchmarks.bare_loop", str(images), "--encoder", json.dumps(encoder), "--seed", str(SEED)]
    result: dict[str, Any] = json.loads(run_command([*command, *arguments], folder).stdout)
    return result


def run(options: Options) -> Iterator[Figure]:
    """Yields for a quiet and for a busy machine the ratio at each size, then slope and fixed cost; then the growth."""
    sizes = NUM_IMAGES_QUICK if options.quick else NUM_IMAGES
    encoder = TINY_DINOV2 if options.quick else DINOV2_SMALL
    files = source_images(options)
    for size in sizes:
        repeat_images(files, options.scratch / f"images-{size}", size)
    for name in LOADS:
        sweeps, bare, memory = [], [], []
        for size in sizes if name == "quiet" else sizes[:2]:  # a busy machine takes twice as long
            folder, images = options.scratch / f"{name}-{size}", options.scratch / f"images-{size}"
            with load(name):
                sweep = run_sweep(folder, make_experiment(f"cold-{size}", images, [encoder]))
                loop = run_bare_loop(folder, images, encoder)
            shutil.rmtree(folder)
            sweeps.append(sweep.seconds)
            bare.append(float(loop["seconds"]))
            memory.append(sweep.peak_memory_bytes)
            ratio = sweeps[-1] / bare[-1]
            yield make_figure(
                "bound", f"{name}: sweep / bare loop, {size} images", ratio, "x", sweep_s=sweeps[-1], bare_loop=loop
            )
        yield from _slope(name, sizes[: len(sweeps)], sweeps, bare)
        if name == "quiet":
            yield from _growth(sizes, sweeps, memory)


def _slope(name: str, sizes: Sequence[int], sweeps: list[float], bare: list[float]) -> Iterator[Figure]:
    (slope, fixed), (bare_slope, bare_fixed) = (np.polyfit(sizes, seconds, 1) for seconds in (sweeps, bare))
    details = {"sizes": sizes, "sweep_s": sweeps, "bare_s": bare}
    yield make_figure("bound", f"{name}: slope ratio", slope / bare_slope, "x", LIMITS[name], **details)
    fixed_target = "<= 14" if name == "quiet" else None
    yield make_figure("bound", f"{name}: fixed cost", fixed - bare_fixed, "s", fixed_target, **details)


def _growth(sizes: Sequence[int], sweeps: list[float], memory: list[int]) -> Iterator[Figure]:
    details = {"sizes": sizes, "sweep_s": sweeps, "peak_memory_bytes": memory}
    growth = (sweeps[2] - sweeps[1]) / (2 * (sweeps[1] - sweeps[0]))
    yield make_figure("bound", "growth of time", growth, "x", "<= 1.05", **details)
    megabytes = (memory[2] - memory[0]) / 1e6
    yield make_figure("bound", "growth of driver memory", megabytes, "MB", "<= 100", **details)
