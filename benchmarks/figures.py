"""Figures: the results of a benchmark, as JSON lines while it runs and as a table at the end."""

from __future__ import annotations

import json
import operator
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from raysweep.storage.git import run_git

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("raysweep", "ray", "torch", "transformers", "mlflow", "optuna", "pyarrow", "pillow")
COMPARISONS = {"<=": operator.le, ">=": operator.ge}


class Skipped(Exception):
    """A benchmark cannot run here; the message says what it lacks."""


@dataclass(frozen=True)
class Options:
    """Options of every benchmark.

    `quick` makes sizes so small that only the code is tested; `images` is a folder of class folders, None for the
    default; `scratch` is an empty folder, removed afterwards.
    """

    quick: bool
    images: Path | None
    scratch: Path


@dataclass(frozen=True)
class Figure:
    """One measured number. `target` is for example `<= 1.05`; `met` is None if there is no target."""

    benchmark: str
    name: str
    value: float
    unit: str
    target: str | None = None
    met: bool | None = None
    details: dict[str, Any] = field(default_factory=dict)


def make_figure(
    benchmark: str, name: str, value: float, unit: str, target: str | None = None, **details: Any
) -> Figure:
    """Returns a figure; `met` is set if it has a target."""
    met = None
    if target is not None:
        sign, limit = target.split()
        met = bool(COMPARISONS[sign](value, float(limit)))
    return Figure(benchmark, name, float(value), unit, target, met, details)


def machine_facts() -> dict[str, Any]:
    """Returns facts that figures depend on: cores, CPU, load, versions, commit."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu": cpu_model(),
        "load": os.getloadavg()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "commit": _git("rev-parse", "HEAD"),
        "changed": bool(_git("status", "--porcelain")),
    }


def cpu_model() -> str:
    """Returns the CPU's name as the kernel gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    try:
        return run_git(ROOT, *arguments).stdout.decode().strip()
    except OSError:
        return ""


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Appends one JSON line to a file, so that figures are kept if a later benchmark raises an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(value) + "\n")


def figure_line(figure: Figure, seconds: float) -> dict[str, Any]:
    """Returns a figure as a JSON-able dict, with the seconds since the start of the benchmarks."""
    return {**asdict(figure), "after_s": round(seconds, 1)}


def print_table(figures: Sequence[Figure], console: Console) -> None:
    """Prints every figure, its target, and whether it is met."""
    table = Table("benchmark", "figure", "value", "unit", "target", "met")
    table.columns[2].justify = "right"
    for figure in figures:
        met = {True: "yes", False: "NO", None: ""}[figure.met]
        cells = (f"{figure.value:,.4g}", figure.unit, figure.target or "", met)
        table.add_row(figure.benchmark, figure.name, *cells, style="red" if figure.met is False else None)
    console.print(table)
