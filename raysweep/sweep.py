"""One sweep, from the experiment to the leaderboard: the order of things, and nothing else."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raysweep.cluster import check_resources, local_resources
from raysweep.context import SweepContext, write_quarantine
from raysweep.errors import ConfigError, TrialError
from raysweep.experiment.config import Experiment, resolved_yaml
from raysweep.images.sources import ImageIndex, load_index
from raysweep.images.splits import SPLITS
from raysweep.paths import SweepPaths, write_atomically
from raysweep.progress import Progress
from raysweep.results.leaderboard import rank_rows, write_leaderboard
from raysweep.results.tracking import Tracker, reported_as_ours
from raysweep.search import study_space
from raysweep.study import Study


@dataclass(frozen=True)
class SweepResult:
    """What a sweep leaves behind: the ranked rows, and how much had to be done for them this time."""

    rows: list[dict[str, Any]]
    num_new_trials: int
    num_encoder_passes: int
    failures: tuple[str, ...] = ()


def run_sweep(experiment: Experiment, progress: Progress, verbose: bool = False) -> SweepResult:
    """Runs every study of an experiment, or what is left of them, and writes the leaderboard.

    Raises:
        RaysweepError: the experiment, data, weights, resources or store cannot be used; the message says which.
    """
    paths = SweepPaths(Path(experiment.storage), experiment.name)
    if not os.environ.get("RAY_ADDRESS"):
        check_resources(experiment.resources, local_resources())
    with ExitStack() as stack:
        stack.enter_context(only_sweep_in(paths.root))
        progress.say(f"reading {experiment.data.source}")
        index = load_index(experiment.data, experiment.seed)
        describe_index(index, progress)
        write_atomically(paths.resolved_experiment, resolved_yaml(experiment))
        write_quarantine(paths.quarantine, index.bad_rows)
        stack.enter_context(reported_as_ours(experiment.tracking.uri))
        tracker = Tracker(experiment.tracking.uri, experiment.tracking.experiment or experiment.name)
        stack.callback(tracker.close)
        context = SweepContext(experiment, paths, index, tracker, progress, verbose, stack)
        check_studies(context)
        outcomes, failures = [], []
        for config in experiment.studies():
            try:
                outcomes.append(Study(context, config).run())
            except TrialError as error:  # what is wrong with one study need not be wrong with the others
                failures.append(str(error))
                progress.warn(f"{config.name} has no result: {error}")
        if not outcomes:
            raise TrialError("; ".join(failures))
        return replace(conclude(context, outcomes), failures=tuple(failures))


def check_studies(context: SweepContext) -> None:
    """Loads every encoder and settles every search space, so that what is wrong with the last study shows at once.

    Raises:
        EncoderError: weights cannot be loaded.
        ConfigError: an encoder has none of the feature sources asked for.
    """
    experiment = context.experiment
    for config in experiment.studies():
        encoder = context.encoder(config).encoder
        study_space(experiment.search.block(config.mode), list(encoder.sources), config.encoder_name)


def conclude(context: SweepContext, outcomes: list[dict[str, Any]]) -> SweepResult:
    """Ranks the studies, writes the leaderboard, registers the winner, and ends the sweep's MLflow run.

    The leaderboard is ordered by the test split; the model that is registered is the best by validation, so that
    nothing is chosen on test.
    """
    experiment, tracker, run_id = context.experiment, context.tracker, context.run_id
    rows = rank_rows([o["row"] for o in outcomes], [o["correct"] for o in outcomes], experiment.seed)
    write_leaderboard(rows, context.paths.leaderboard_json, context.paths.leaderboard_csv)
    for path in (context.paths.leaderboard_json, context.paths.leaderboard_csv, context.paths.quarantine):
        tracker.log_file(run_id, path)
    sign = 1 if experiment.direction == "maximize" else -1
    winner = max(outcomes, key=lambda outcome: sign * outcome["val_metric"])
    tracker.log_metrics(run_id, {"test/accuracy": winner["row"]["test_accuracy"]})
    name = experiment.tracking.register_model
    if name:
        version = tracker.register(winner["model_uri"], name)
        context.progress.say(
            f"registered {winner['row']['study']}, the best by validation, as {name} version {version}"
        )
    tracker.finish(run_id)
    return SweepResult(rows, context.num_new_trials, context.num_encoder_passes)


@contextmanager
def only_sweep_in(root: Path) -> Iterator[None]:
    """Holds a lock on the sweep's folder: two sweeps at once would each take the other's trials for lost.

    Raises:
        ConfigError: another sweep holds it.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{root}: another sweep is running here; wait for it, or give this one a name") from None
        yield


def describe_index(index: ImageIndex, progress: Progress) -> None:
    """Says what was found: images by split, classes, bad rows, and what to be wary of."""
    counts = {split: sum(by_class.values()) for split, by_class in index.counts().items()}
    derived = f" ({' and '.join(index.derived_splits)} taken from train)" if index.derived_splits else ""
    splits = ", ".join(f"{counts[split]:,} {split}" for split in SPLITS)
    progress.say(f"{len(index.table):,} images in {len(index.classes)} classes: {splits}{derived}")
    for warning in index.warnings:
        progress.warn(warning)
    if index.bad_rows:
        progress.warn(f"{len(index.bad_rows)} images cannot be used; see quarantine.csv")
