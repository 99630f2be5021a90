"""The Tune search algorithm whose every suggestion is a Population.

Ray's own OptunaSearch asks for one setting a suggestion and leaves a trial without a finite value running, hence this
one (docs/decisions/0003). Apart from `study`, because it needs Ray's class when it is imported.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import tune
from ray.tune.search import Searcher

from raysweep.search import Listener, Search, make_record, population_size
from raysweep.trial import run_population, trial_resources

if TYPE_CHECKING:
    import optuna


class PopulationSearcher(Searcher):  # type: ignore[misc]  # mypy is told not to look into ray
    """Asks a `Search` for as many settings as train together, and tells it and a listener what came of them.

    Args:
        search: the Optuna study.
        listener: told of epochs and finished trials.
    """

    def __init__(self, search: Search, listener: Listener) -> None:
        super().__init__()
        self.search, self.listener = search, listener
        self.num_left = search.num_remaining
        self.seconds_before, self.started = search.seconds_spent, 0.0
        self.waited = False
        self.waiting: dict[str, dict[int, optuna.trial.Trial]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its search algorithm to restore it one day; the study's journal does that job here.
        return {}

    def suggest(self, trial_id: str) -> Any:
        """Returns the settings of the next Population, or that there is none: budget spent or time over."""
        self.started = self.started or time.monotonic()
        budget, spent = self.search.block.time_budget_s, self.seconds_before + time.monotonic() - self.started
        # The first Population always runs: a study without a trial has no answer.
        over = budget is not None and self.waited and spent > budget
        if over or self.num_left == 0:
            return Searcher.FINISHED
        self.waited = True
        trials = self.search.ask(min(population_size(self.search.block), self.num_left))
        self.num_left -= len(trials)
        self.waiting[trial_id] = {trial.number: trial for trial in trials}
        return {
            "trials": [
                {"number": trial.number, "setting": dict(trial.params), "continues": trial.user_attrs.get("continues")}
                for trial in trials
            ]
        }

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Passes an epoch of a lone trial on."""
        if "epoch" in result:
            epoch = json.loads(result["epoch"])
            setting = self.waiting[trial_id][epoch["number"]].params
            self.listener.on_epoch(epoch["number"], setting, epoch["epoch"], epoch["metrics"])

    def on_trial_complete(
        self,
        trial_id: str,
        result: dict[str, Any] | None = None,
        error: bool = False,  # noqa: ARG002
    ) -> None:
        """Tells every trial of a Population its result, or that it failed and why."""
        reason = (result or {}).get("error", "the worker process died")
        results = {one["number"]: one for one in json.loads((result or {}).get("results", "[]"))}
        for number, trial in self.waiting.pop(trial_id, {}).items():
            record = make_record(number, dict(trial.params), results.get(number), reason)
            self.search.tell(trial, record)
            self.listener.on_trial(record)

    def save(self, checkpoint_path: str) -> None:
        """Does nothing: see `__getstate__`."""

    def restore(self, checkpoint_path: str) -> None:
        """Does nothing: see `__getstate__`."""


def run_study(search: Search, job: dict[str, Any], listener: Listener, tune_folder: Path, num_concurrent: int) -> None:
    """Works through what is left of a study's budget with Ray Tune.

    Args:
        search: the study.
        job: what its trials share; see `worker.train_worker`.
        listener: told of epochs and finished trials, in this process.
        tune_folder: where Tune may write.
        num_concurrent: Populations at a time.
    """
    name = search.optuna_study.study_name
    searcher = PopulationSearcher(search, listener)
    num_populations = math.ceil(search.num_remaining / population_size(search.block))
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(run_population, job=job), trial_resources(job)),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=num_populations,
            max_concurrent_trials=num_concurrent,
            reuse_actors=job["num_workers"] == 1,
            # Without it Tune writes the whole population into a folder's name.
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(name=name, storage_path=str(tune_folder), verbose=0),
    )
    tuner.fit()
    shutil.rmtree(tune_folder / name, ignore_errors=True)  # what matters is in the study's journal and folder
