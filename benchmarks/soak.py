"""`python -m benchmarks.soak [--kills N] [--seed S]`: kills a small sweep at random moments, and checks what it leaves.

Each try kills one process (the driver, a worker, the raylet, ...) at a random moment, runs the same command until it
ends by itself, and compares everything with an uninterrupted sweep of the same seed. It prints one line a try.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from benchmarks.small_sweep import Running, SmallSweep

# Text in the title or command line of a process; "" is the driver.
VICTIMS = {
    "driver": "",
    "recorder": "multiprocessing.spawn",
    "trial": "ray::ImplicitFunc",
    "task of a pass": "ray::MapBatches(decode_and_encode",
    "raylet": "raylet/raylet",
    "GCS": "gcs_server",
}
MAX_RUNS = 5


def try_fault(sweep: SmallSweep, victim: str, delay_s: float, expected: dict) -> tuple[str, list[str], float]:
    """Kills one process of a fresh sweep, runs the command to its end, and returns what happened.

    Returns:
        What became of the kill, the problems found, and the seconds from the kill to the end of the last run.
    """
    running = sweep.start()
    running.wait_until(seconds=delay_s)
    if running.process.poll() is not None:
        return "too late", sweep.problems(expected), 0.0
    killed = kill(running, victim)
    started = time.monotonic()
    ended = running.wait()
    statuses = [ended.status]
    while statuses[-1] != 0 and len(statuses) < MAX_RUNS:
        statuses.append(sweep.run().status)
    problems = sweep.problems(expected) if statuses[-1] == 0 else [f"still exit {statuses[-1]} after {MAX_RUNS} runs"]
    if "Traceback" in ended.stderr:
        problems.append("a traceback on the terminal")
    return f"{killed}, exits {statuses}", problems, time.monotonic() - started


def kill(running: Running, victim: str) -> str:
    """Kills the driver, or a process that it has started; returns which."""
    if not VICTIMS[victim]:
        running.kill()
        return victim
    try:
        process = running.wait_for(VICTIMS[victim], timeout=60)
        process.kill()
    except (LookupError, psutil.Error):
        return f"no {victim}"
    return victim


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0 if nothing was lost, doubled, wrong or left behind, and 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="tries for each kind of process")
    parser.add_argument("--victims", nargs="+", default=list(VICTIMS), choices=list(VICTIMS), metavar="PROCESS")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    moments, num_bad = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory(prefix="raysweep-soak-", ignore_cleanup_errors=True) as scratch:
        whole = SmallSweep(Path(scratch) / "whole")
        ended = whole.run()
        assert ended.status == 0, ended.stderr
        expected = whole.rows()
        print(f"uninterrupted: {ended.seconds:.0f} s, problems {whole.problems(expected)}", flush=True)
        for victim in options.victims:
            for number in range(options.kills):
                delay = moments.uniform(0.3, ended.seconds)
                sweep = SmallSweep(Path(scratch) / f"{victim}-{number}")
                what, problems, seconds = try_fault(sweep, victim, delay, expected)
                num_bad += bool(problems)
                print(f"{victim} at {delay:5.1f} s: {what}, {seconds:.0f} s more; {problems or 'nothing'}", flush=True)
    print(f"{num_bad} tries with problems")
    return 1 if num_bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
