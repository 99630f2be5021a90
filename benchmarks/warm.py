"""Waiting times with little work: a sweep on cached features, the same sweep again, a plan, the help."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from benchmarks.cached import prepare
from benchmarks.figures import Figure, Options, make_figure
from benchmarks.sweeps import run_command

RAY_IS_UP, DONE = "Ray is up", "done:"


def run(options: Options) -> Iterator[Figure]:
    """Yields the seconds of the whole command, and of the part after Ray's start; medians of three."""
    data = prepare(options)
    num_trials, repeats = (8, 1) if options.quick else (64, 3)
    finished = [data.sweep(f"warm-{repeat}", num_trials) for repeat in range(repeats)]
    seconds = [one.seconds for one in finished]
    yield make_figure("warm", "sweep on cached features", statistics.median(seconds), "s", "<= 14", seconds=seconds)
    after = [one.stamp(DONE) - one.stamp(RAY_IS_UP) for one in finished]
    yield make_figure("warm", "of which after Ray's start", statistics.median(after), "s", "<= 8", seconds=after)
    again = [data.sweep("warm-0", num_trials).seconds for _ in range(repeats)]
    yield make_figure("warm", "finished sweep, repeated", statistics.median(again), "s", seconds=again)
    plans = [data.sweep("warm-0", num_trials, "--dry-run").seconds for _ in range(repeats)]
    yield make_figure("warm", "--dry-run", statistics.median(plans), "s", "<= 1.5", seconds=plans)
    helps = [run_command(["-m", "raysweep.run", "--help"], data.folder).seconds for _ in range(repeats)]
    yield make_figure("warm", "--help", statistics.median(helps), "s", "<= 1.5", seconds=helps)
