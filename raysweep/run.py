"""`python -m raysweep.run EXPERIMENT.yaml`: one sweep, or its plan."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raysweep.cluster.signals import leave_at_once, stop_signals
from raysweep.errors import KEPT, RaysweepError, hide_secrets, print_output, printable

if TYPE_CHECKING:
    from rich.console import Console

    from raysweep.experiment.config import Experiment
    from raysweep.results.leaderboard import Row


def build_parser() -> argparse.ArgumentParser:
    """Returns the command line of `raysweep run`."""
    parser = argparse.ArgumentParser(
        prog="raysweep run", description="Finds which encoder, mode and setting suit your images best."
    )
    parser.add_argument("experiment", nargs="?", type=Path, metavar="EXPERIMENT.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="override a key of the file, e.g. search.linear_probe.num_trials=8")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--print-schema", action="store_true", help="print the JSON schema of experiment files")
    parser.add_argument("--verbose", action="store_true", help="show Ray's own messages, and tracebacks")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        The exit status: 0 if the sweep is done, 1 for an error, 2 for wrong usage, 130 for Ctrl-C, 143 for SIGTERM, 129
        for a closed terminal.
    """
    parser = build_parser()
    options = parser.parse_args(arguments)
    with stop_signals() as signals:
        try:
            if options.print_schema:
                from raysweep.experiment.config import experiment_schema

                print_output(json.dumps(experiment_schema(), indent=2))
                return 0
            if options.experiment is None:
                parser.error("an experiment file is needed, e.g. experiments/quickstart.yaml")
            from raysweep.experiment.config import load_experiment

            experiment = load_experiment(options.experiment, options.overrides)
            return _plan(experiment) if options.dry_run else _run(experiment, options.verbose)
        except RaysweepError as error:
            if options.verbose:
                raise
            if signals.failure is None:
                print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            if signals.failure is not None:
                return 1
            print(f"interrupted; {KEPT}", file=sys.stderr)
            return signals.exit_status


def _plan(experiment: Experiment) -> int:
    from raysweep.cluster.address import joins_cluster
    from raysweep.cluster.resources import local_resources
    from raysweep.cluster.session import RaySession
    from raysweep.images.index import load_index
    from raysweep.sweep.plan import cluster_lines, plan_lines

    if joins_cluster():
        from raysweep.sweep.sweep import check_results_outlast_job

        check_results_outlast_job(experiment)
    session = RaySession(verbose=False)
    try:
        start_ray = (lambda: session.resources) if joins_cluster() else None  # a plan for this machine needs no Ray
        index = load_index(experiment.data, experiment.seed, start_ray)
        if not joins_cluster():
            _print_lines(plan_lines(experiment, index, local_resources()))
            return 0
        present = session.resources
        may_grow = experiment.resources.wait_for_nodes_s > 0
        plan = plan_lines(experiment, index, present, may_grow=may_grow)
        _print_lines([*cluster_lines(present), *plan])
        from raysweep.sweep.estimate import estimate_lines

        _print_lines(estimate_lines(experiment, index, present))
    finally:
        session.close()
    return 0


def _run(experiment: Experiment, verbose: bool) -> int:
    from rich.console import Console

    from raysweep.results.progress import Progress

    with Progress() as progress:
        from raysweep.sweep.sweep import SweepStopped, run_sweep

        console = Console(highlight=False, soft_wrap=False, width=None if sys.stdout.isatty() else 120)
        try:
            result = run_sweep(experiment, progress, verbose)
        except SweepStopped as stop:
            if stop.rows:
                _print_board(console, stop.rows, experiment.metric)
            raise
        progress.say(f"done: {result.num_new_trials} new trials, {result.num_encoder_passes} encoder passes")
    _print_board(console, result.rows, experiment.metric)
    from raysweep.results.conclusion import conclusion, describe_choice

    _print_lines(["", conclusion(result.rows), f"Recommended: {describe_choice(result.rows)}."])
    _print_lines(_next_steps(experiment, result.rows, result.view))
    for failure in result.failures:
        print(f"error: {printable(failure)}", file=sys.stderr)
    return 1 if result.failures else 0


def _print_board(console: Console, rows: Sequence[Row], metric: str) -> None:
    from raysweep.results.leaderboard import render_leaderboard

    with console.capture() as board:
        console.print(render_leaderboard(rows, metric))
    print_output(board.get().removesuffix("\n"))


def _next_steps(experiment: Experiment, rows: Sequence[Row], view: str = "") -> list[str]:
    from raysweep.storage.copies import location
    from raysweep.storage.paths import SweepPaths

    paths = SweepPaths(experiment.storage, experiment.name)
    models = [_relative(row.model_path) for row in rows if row.model_path]
    uri = hide_secrets(experiment.tracking.uri)
    return [
        "",
        *([f"report     {_relative(location(paths.report_html))}"] if paths.report_html.exists() else []),
        f"results    {_relative(location(paths.root))}/leaderboard.json, leaderboard.csv, experiment.resolved.yaml",
        *[f"predict    raysweep predict {shlex.quote(model)} IMAGE [IMAGE ...]" for model in models[:1]],
        *_compare_steps(uri, view),
        "go on      the same command with a larger num_trials adds trials to those that are there",
    ]


def _compare_steps(uri: str, view: str) -> list[str]:
    """Returns how to open MLflow, and the link to the view of studies only."""
    if uri.startswith("http"):
        return [f"compare    {uri.rstrip('/')}{view}"]
    # MLflow would start seven processes of 250 MB for jobs that a sweep does not have.
    server = f"MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow ui --backend-store-uri {shlex.quote(uri)}"
    return [f"compare    {server}", *([f"           and open http://127.0.0.1:5000{view}"] if view else [])]


def _print_lines(lines: Sequence[str]) -> None:
    print_output("\n".join(map(printable, lines)))


def _relative(path: str) -> str:
    return path.removeprefix(f"{Path.cwd()}/")


if __name__ == "__main__":
    leave_at_once(main())
