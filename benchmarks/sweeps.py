"""Complete sweeps, as users run them: each in a separate process, in a clean environment, timed from outside."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.figures import ROOT

SEED = 42
# The size of dinov2-small. Weights are random, because the time does not depend on them.
DINOV2_SMALL = {
    "type": "dinov2",
    "use_pretrained": False,
    "config": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6},
}
TINY_DINOV2 = {
    "type": "dinov2",
    "use_pretrained": False,
    "image_size": 28,
    "config": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
}
REMOVED_PREFIXES = ("RAY_", "TUNE_", "MLFLOW_", "OPTUNA_", "PYTHONPATH")
PROGRESS_LINE = re.compile(r"\[ *([\d.]+) s\] (.*)")
SECONDS_BETWEEN_POLLS = 0.05


@dataclass(frozen=True)
class Finished:
    """A command that succeeded: wall seconds, its own peak resident set (0 without /proc), and its output."""

    seconds: float
    peak_memory_bytes: int
    stdout: str
    stderr: str

    def stamp(self, text: str) -> float:
        """Returns the seconds in the first progress line that contains `text`.

        Raises:
            LookupError: there is no such line.
        """
        for line in self.stderr.splitlines():
            found = PROGRESS_LINE.match(line)
            if found and text in found[2]:
                return float(found[1])
        raise LookupError(f"no progress line holds '{text}':\n{self.stderr}")


def run_command(arguments: Sequence[str], folder: Path) -> Finished:
    """Runs this Python with `arguments` in a folder.

    Raises:
        RuntimeError: it failed; the message contains its stderr.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(REMOVED_PREFIXES)}
    out, err = folder / "stdout.txt", folder / "stderr.txt"
    memory, started = 0, time.perf_counter()
    with out.open("w") as stdout, err.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=folder,
            env=environment | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
        )
        try:
            while process.poll() is None:
                memory = max(memory, peak_memory_bytes(process.pid))
                time.sleep(SECONDS_BETWEEN_POLLS)
        finally:
            process.kill()
    seconds = time.perf_counter() - started
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with {process.returncode}:\n{err.read_text()}")
    return Finished(seconds, memory, out.read_text(), err.read_text())


def peak_memory_bytes(process: int | str = "self") -> int:
    """Returns the largest resident set of a process, without its children, which rusage would include."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def make_experiment(
    name: str, source: Path | str, encoders: Sequence[dict[str, Any]], num_trials: int = 64, **search: Any
) -> dict[str, Any]:
    """Returns an experiment with linear probes of encoders, and defaults for all other keys."""
    return {
        "name": name,
        "seed": SEED,
        "data": {"source": str(source)},
        "encoders": list(encoders),
        "modes": ["linear_probe"],
        "search": {"linear_probe": {"num_trials": num_trials, **search}},
    }


def run_sweep(folder: Path, experiment: dict[str, Any], *arguments: str) -> Finished:
    """Runs `raysweep.run` in a folder. Each name has its own MLflow store, so that sweeps do not share runs."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{experiment['name']}.yaml"
    tracking = {"uri": f"sqlite:///mlflow-{experiment['name']}.db"}
    file.write_text(yaml.safe_dump({**experiment, "tracking": tracking}))
    return run_command(["-m", "raysweep.run", file.name, *arguments], folder)


def leaderboard(folder: Path, name: str) -> list[dict[str, Any]]:
    """Reads the leaderboard of a sweep in a folder."""
    rows: list[dict[str, Any]] = json.loads((folder / "runs" / name / "leaderboard.json").read_text())
    return rows
