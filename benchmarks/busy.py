"""Other work beside a benchmark: one busy loop per core, as children of the benchmark, so that anyone can repeat it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from raysweep.cluster.resources import local_resources

LOOP = "while True: pass"
LOADS = ("quiet", "busy")


@contextmanager
def busy_cores(num_loops: int | None = None) -> Iterator[None]:
    """Runs busy loops at the usual priority while the block runs.

    Args:
        num_loops: number of processes; None for one per core.
    """
    count = local_resources().num_cpus if num_loops is None else num_loops
    with ExitStack() as loops:
        for _ in range(count):
            loop = loops.enter_context(subprocess.Popen([sys.executable, "-c", LOOP]))
            loops.callback(loop.kill)
        yield


@contextmanager
def load(name: str) -> Iterator[None]:
    """Runs the block on a machine that is `quiet`, or `busy` with one loop per core."""
    with busy_cores(0 if name == "quiet" else None):
        yield
