"""The gain of early stopping: the same 27 settings of a CNN from scratch, with ASHA and without a scheduler.

Complete sweeps, on handwritten digits. A setting counts as good if the best validation accuracy of its trial is within
half a percentage point of the best of all trials; its time is the end of that trial.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from benchmarks.figures import Figure, Options, make_figure
from benchmarks.sweeps import run_sweep

NUM_TRIALS = NUM_EPOCHS = 27
NUM_SEEDS = 3
PERCENTAGE_POINT = 0.01
NETWORK = {"type": "stacked_cnn", "image_size": 16, "config": {"channels": [16, 32]}}


@dataclass(frozen=True)
class Ended:
    """A trial that ended: seconds since the start of the first trial, best validation accuracy, number of epochs.

    The accuracy is 0 if the trial was stopped early, because such a trial is not chosen.
    """

    after: float
    accuracy: float
    num_epochs: int


def make_experiment(scheduler: str, seed: int, num_trials: int) -> dict[str, Any]:
    """Returns an experiment whose settings depend only on the seed."""
    space = {
        "learning_rate": {"low": 1e-5, "high": 1e-1, "log": True},
        "weight_decay": {"low": 1e-4, "high": 1.0, "log": True},
        "epochs": num_trials,
    }
    search = {"num_trials": num_trials, "sampler": "random", "scheduler": scheduler, "space": space}
    return {
        "name": f"{scheduler}-{seed}",
        "seed": seed,
        "data": {"source": "sklearn://digits"},
        "encoders": [NETWORK],
        "search": {"from_scratch": search},
        "train": {
            "augmentation": {"min_crop_scale": 0.7, "horizontal_flip": False},
            "early_stopping_patience": num_trials,  # only the scheduler ends a trial
        },
    }


def ended_trials(journal: Path) -> list[Ended]:
    """Reads the trials of a sweep with one study, in the order of their ends."""
    storage = JournalStorage(JournalFileBackend(str(journal)))
    (name,) = optuna.get_all_study_names(storage)
    trials = optuna.load_study(study_name=name, storage=storage).get_trials()
    begun = min(trial.datetime_start for trial in trials if trial.datetime_start)
    found = []
    for trial in trials:
        record = trial.user_attrs["record"]
        assert trial.datetime_complete is not None
        seconds = (trial.datetime_complete - begun).total_seconds()
        accuracy = record["final"].get("val/accuracy", 0.0) if trial.state.name == "COMPLETE" else 0.0
        found.append(Ended(seconds, accuracy, len(record["history"])))
    return sorted(found, key=lambda trial: trial.after)


def seconds_until(trials: list[Ended], accuracy: float) -> float:
    """Returns the seconds until a trial ended with that accuracy; those of the whole search if none did."""
    return next((trial.after for trial in trials if trial.accuracy >= accuracy), trials[-1].after)


def run(options: Options) -> Iterator[Figure]:
    """Yields medians, over a few seeds, of the ratio of ASHA to no scheduler."""
    num_trials, num_seeds = (4, 1) if options.quick else (NUM_TRIALS, NUM_SEEDS)
    ratios: dict[str, list[float]] = {"found": [], "all": [], "epochs": [], "accuracy": []}
    seconds: dict[str, list[float]] = {"none": [], "asha": []}
    for seed in range(num_seeds):
        trials = {}
        for scheduler in seconds:
            experiment = make_experiment(scheduler, seed, num_trials)
            run_sweep(options.scratch, experiment)
            trials[scheduler] = ended_trials(options.scratch / "runs" / experiment["name"] / "optuna.journal")
        best = {scheduler: max(trial.accuracy for trial in ended) for scheduler, ended in trials.items()}
        found = {s: seconds_until(ended, max(best.values()) - PERCENTAGE_POINT / 2) for s, ended in trials.items()}
        for scheduler, after in found.items():
            seconds[scheduler].append(after)
        ratios["found"].append(found["asha"] / found["none"])
        ratios["all"].append(trials["asha"][-1].after / trials["none"][-1].after)
        num_epochs = {s: sum(trial.num_epochs for trial in ended) for s, ended in trials.items()}
        ratios["epochs"].append(num_epochs["asha"] / num_epochs["none"])
        ratios["accuracy"].append((best["asha"] - best["none"]) / PERCENTAGE_POINT)
    middle = {name: statistics.median(values) for name, values in ratios.items()}
    yield make_figure("schedulers", "no scheduler: until a good setting", statistics.median(seconds["none"]), "s")
    yield make_figure("schedulers", "asha: until a good setting", statistics.median(seconds["asha"]), "s", **seconds)
    yield make_figure("schedulers", "asha / none: until a good setting", middle["found"], "x", seeds=ratios["found"])
    yield make_figure("schedulers", "asha / none: the whole search", middle["all"], "x", seeds=ratios["all"])
    yield make_figure("schedulers", "asha / none: epochs trained", middle["epochs"], "x", seeds=ratios["epochs"])
    yield make_figure("schedulers", "asha - none: best validation accuracy", middle["accuracy"], "points")
