"""Heads trained on features that are read from disk when needed, compared with the same features in memory.

A million rows of 768 float16 numbers, 1.5 GB. Each training runs in a separate process, to measure its memory alone.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.figures import Figure, Options, make_figure
from benchmarks.population import BATCH_SIZE, SEED, SOURCES, make_features, make_settings
from benchmarks.sweeps import peak_memory_bytes, run_command
from raysweep.images.disk_rows import DiskRows
from raysweep.training.population import FeatureSet, train_population

NUM_CLASSES, NUM_HEADS, NUM_VALIDATION, ROWS_PER_BLOCK = 10, 8, 10_000, 4_096


def random_blocks(num_rows: int, num_features: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields `(positions, features)`, one block at a time, as from the files of a cache."""
    generator = np.random.default_rng(0)
    for start in range(0, num_rows, ROWS_PER_BLOCK):
        places = np.arange(start, min(start + ROWS_PER_BLOCK, num_rows))
        yield places, generator.standard_normal((len(places), num_features), np.float32).astype(np.float16)


def train(path: Path, num_features: int, where: str) -> dict[str, Any]:
    """Trains eight heads for one epoch; returns seconds, and the growth of the resident set in bytes."""
    rows = DiskRows.open(path, num_features)
    features = rows if where == "disk" else torch.from_numpy(np.fromfile(path, np.float16)).view(rows.shape)
    labels = torch.randint(NUM_CLASSES, (len(rows),), generator=torch.Generator().manual_seed(0))
    validation = make_features(min(NUM_VALIDATION, len(rows)), num_features, NUM_CLASSES, torch.device("cpu"))
    settings = make_settings(NUM_HEADS, 1)
    before, started = resident_bytes(), time.perf_counter()
    train_population(
        FeatureSet({"cls": features}, labels),
        validation,
        settings,
        sources=SOURCES,
        num_classes=NUM_CLASSES,
        batch_size=BATCH_SIZE,
        seed=SEED,
    )
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "growth_bytes": peak_memory_bytes() - before}


def resident_bytes() -> int:
    """Returns the current resident set of this process."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def run(options: Options) -> Iterator[Figure]:
    """Yields the growth of memory, and the time relative to features in memory."""
    num_rows, num_features = (20_000, 64) if options.quick else (1_000_000, 768)
    path = options.scratch / "rows.f16"
    DiskRows.create(path, num_rows, num_features, random_blocks(num_rows, num_features))
    results = {}
    for where in ("disk", "memory"):
        command = ["-m", "benchmarks.streaming", str(path), str(num_features), where]
        results[where] = json.loads(run_command(command, options.scratch).stdout)
    growth = results["disk"]["growth_bytes"] / 1e6
    yield make_figure("streaming", "growth of memory", growth, "MB", "<= 300", file_bytes=path.stat().st_size)
    ratio = results["disk"]["seconds"] / results["memory"]["seconds"]
    yield make_figure("streaming", "from disk / in memory", ratio, "x", **results)


if __name__ == "__main__":
    print(json.dumps(train(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])))
