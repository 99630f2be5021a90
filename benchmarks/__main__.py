"""`python -m benchmarks [NAME ...]`: runs benchmarks one after another and shows their figures."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from rich.console import Console

from benchmarks.figures import ROOT, Figure, Options, Skipped, append_line, figure_line, machine_facts, print_table

NAMES = (
    "population",
    "streaming",
    "gpu",
    "fine_tune",
    "warm",
    "marginal",
    "train_run_per_trial",
    "schedulers",
    "encoders",
    "bound",
    "weak_scaling",
    "index",
    "statistics",
)


def build_parser() -> argparse.ArgumentParser:
    """Returns the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(NAMES)}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tries the plumbing, says nothing of speed")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results.jsonl", metavar="FILE")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="class folders of images to work on")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, or 1 if a benchmark raised an error. A missed target is no error."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in NAMES]
    if unknown:
        parser.error(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(NAMES)}")
    console, started = Console(), time.monotonic()
    append_line(options.out, {"machine": machine_facts(), "quick": options.quick})
    figures: list[Figure] = []
    broken = False
    for name in options.names or NAMES:
        console.print(f"[{time.monotonic() - started:7.1f} s] {name}", markup=False)
        try:
            with tempfile.TemporaryDirectory(prefix=f"raysweep-{name}-", ignore_cleanup_errors=True) as scratch:
                for measured in import_module(f"benchmarks.{name}").run(
                    Options(options.quick, options.images, Path(scratch))
                ):
                    # With tiny sizes, a target is met or missed by chance.
                    figure = replace(measured, met=None) if options.quick else measured
                    figures.append(figure)
                    append_line(options.out, figure_line(figure, time.monotonic() - started))
                    console.print(f"    {figure.name}: {figure.value:,.4g} {figure.unit}", markup=False)
        except Skipped as reason:
            append_line(options.out, {"benchmark": name, "skipped": str(reason)})
            console.print(f"    skipped: {reason}", markup=False)
        except Exception:
            broken = True
            append_line(options.out, {"benchmark": name, "broken": traceback.format_exc()})
            console.print(traceback.format_exc(), markup=False)
    print_table(figures, console)
    return 1 if broken else 0


if __name__ == "__main__":
    # SIGTERM raises SystemExit, so that sweeps end and scratch folders are removed.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    sys.exit(main())
