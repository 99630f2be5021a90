"""The cost of one more probe trial on cached features: a sweep with many trials compared with a sweep with few.

Then the same work is timed part by part in this process, without Tune.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.cached import CachedData, prepare
from benchmarks.figures import Figure, Options, make_figure
from benchmarks.sweeps import SEED
from raysweep.experiment.search_blocks import LinearProbeSearch, population_size, study_space
from raysweep.results.tracking import LoggedTrial, open_tracker
from raysweep.sweep.optuna_study import open_optuna_study
from raysweep.training.population import train_population
from raysweep.training.ranking import Ranking
from raysweep.worker.job import TrialResult

BATCH_SIZE = 64


def trial_counts(options: Options) -> tuple[int, int]:
    """Returns the number of trials of the small and of the large sweep."""
    return (8, 16) if options.quick else (64, 256)


def seconds_per_trial(options: Options, data: CachedData, repeats: int) -> tuple[float, dict[str, list[float]]]:
    """Returns the marginal seconds per trial, and the seconds of all sweeps; small and large sweeps alternate."""
    small, large = trial_counts(options)
    seconds: dict[str, list[float]] = {str(small): [], str(large): []}
    for repeat in range(repeats):
        for count in (small, large):
            seconds[str(count)].append(data.sweep(f"trials-{count}-{repeat}", count).seconds)
    medians = {count: statistics.median(values) for count, values in seconds.items()}
    return (medians[str(large)] - medians[str(small)]) / (large - small), seconds


def split_of_a_trial(options: Options, data: CachedData) -> dict[str, float]:
    """Returns the milliseconds per trial of heads, Optuna and MLflow, each measured alone."""
    train, validation, sources, num_classes = data.feature_sets()
    num_trials = trial_counts(options)[1]
    block = LinearProbeSearch(num_trials=num_trials)
    space = study_space(block, list(sources), "encoder")
    optuna_study = open_optuna_study(data.folder / "split.journal", "split", block, space, Ranking(), SEED)
    tracker = open_tracker(f"sqlite:///{data.folder}/split.db", "split")
    sweep, _ = tracker.start_run("sweep", "sweep", "sweep")
    study, _ = tracker.start_run("study", "study", "study", parent=sweep)
    seconds = {"heads": 0.0, "optuna": 0.0, "mlflow": 0.0}

    @contextmanager
    def timed(part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        seconds[part] += time.perf_counter() - started

    for _ in range(num_trials // population_size(block)):
        with timed("optuna"):
            trials = optuna_study.ask(population_size(block))
        with timed("heads"):
            heads = train_population(
                train,
                validation,
                [dict(trial.params) for trial in trials],
                sources=sources,
                num_classes=num_classes,
                batch_size=BATCH_SIZE,
                seed=SEED,
            )
        for trial, head in zip(trials, heads, strict=True):
            result = TrialResult(
                "split", trial.number, dict(trial.params), tuple(head.history), head.history[-1], len(head.history) - 1
            )
            with timed("optuna"):
                optuna_study.tell(trial, result)
            history = [{k: v for k, v in epoch.items() if k != "time/epoch_s"} for epoch in result.history]
            logged = LoggedTrial(result.setting, history, result.final, "FINISHED")
            with timed("mlflow"):
                tracker.log_trial(study, f"trial/{result.number}", str(result.number), logged)
    tracker.finish(study)
    tracker.finish(sweep)
    return {part: 1000 * total / num_trials for part, total in seconds.items()}


def run(options: Options) -> Iterator[Figure]:
    """Yields the marginal cost of a trial, then the cost of its parts, each measured alone."""
    data = prepare(options)
    marginal, seconds = seconds_per_trial(options, data, 1 if options.quick else 2)
    yield make_figure("marginal", "one more trial", 1000 * marginal, "ms", "<= 40", sweeps_s=seconds)
    parts = split_of_a_trial(options, data)
    for part, milliseconds in parts.items():
        yield make_figure("marginal", f"of which {part}, alone", milliseconds, "ms")
    # Training and MLflow run in parallel with the search, so the sum of the parts may exceed the whole.
    yield make_figure("marginal", "parts / whole", sum(parts.values()) / (1000 * marginal), "x")
