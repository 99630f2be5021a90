"""Studies and baselines, which become rows of the leaderboard: signature, folder, MLflow run and outcome."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from concurrent.futures import Future
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from raysweep.errors import DataError, TrialError
from raysweep.experiment.studies import BaselineConfig, RowConfig
from raysweep.images.cache import Cache
from raysweep.images.rows import Draws, draw_subsets
from raysweep.results.tracking import LoggedRun, Tracker
from raysweep.storage.copies import location, remove
from raysweep.storage.paths import signature
from raysweep.sweep.best_heads import offer_head, signature_of_file, starts_a_study
from raysweep.sweep.caches import precision_of
from raysweep.sweep.outcome import (
    Outcome,
    baseline_outcome,
    is_exported,
    log_outcome,
    read_outcome,
    with_places,
    write_outcome,
)
from raysweep.sweep.state import SweepState
from raysweep.sweep.study_runs import start_run
from raysweep.worker.inputs import START_HEAD
from raysweep.worker.job import Job, StudySpec, TestResult

# A higher number makes all studies anew: rows that were chosen or computed in different ways cannot be compared.
METHOD = 2


class LeaderboardEntry(ABC):
    """A study or a baseline: its classifier is chosen on the validation split and then tested once.

    Args:
        state: state that all studies share.
        config: encoder, mode or baseline, and shots.
        cache: the features or pixels that it trains on.
        key: signature of everything that its row depends on, without the number of trials.
        draws: its few-shot draws; None if it trains on all rows.
        run_id: id of its MLflow run.
    """

    def __init__(
        self, state: SweepState, config: RowConfig, cache: Cache, key: str, draws: Draws | None, run_id: str
    ) -> None:
        self.state, self.cache, self.key, self.draws, self.run_id = state, cache, key, draws, run_id
        self.name, self.config = config.name, config
        self.encoder = state.encoder(config)
        self.folder = state.paths.study(config.name, key)
        self.seconds = cache.seconds if cache.made_now else 0.0  # wall time of all its work in this invocation
        self.outcome: Outcome | None = None
        self.failure: str | None = None
        self._logged: Future[LoggedRun] | None = None

    @property
    @abstractmethod
    def is_settled(self) -> bool:
        """Whether earlier invocations have done all of its work."""

    @property
    def spec(self) -> StudySpec:
        """What a worker needs to know about it."""
        return StudySpec(self.name, location(self.folder), self.draws)

    @abstractmethod
    def settle(self, tested: TestResult, job: Job) -> None:
        """Makes the outcome from the result of its test, and finishes."""

    @property
    def _result_path(self) -> Path:
        return self.state.paths.study_result(self.name, self.key)

    def earlier_outcome(self) -> Outcome | None:
        """Returns the outcome of an earlier invocation; None if there is none, or if its file was cut off.

        Raises:
            DataError: the file is of a version that this one does not know.
        """
        try:
            outcome = read_outcome(self._result_path)
        except DataError as error:
            if not isinstance(error.__cause__, json.JSONDecodeError | UnicodeDecodeError):
                raise
            self.state.progress.warn(f"{error}; {self.name} is tested again")
            remove(self._result_path)
            return None
        return outcome and with_places(outcome, self.state.paths.resolve)

    def _write(self, outcome: Outcome) -> None:
        write_outcome(self._result_path, with_places(outcome, self.state.paths.relative))

    def reopen_run(self) -> None:
        """Marks its MLflow run as running: there is work left."""
        self.state.recorder.send(Tracker.reopen, self.run_id)

    @property
    def shortfall(self) -> str | None:
        """What this invocation has left of its budget because of errors, in words; None if nothing."""
        return None

    def finish(self, outcome: Outcome) -> None:
        """Writes the outcome to disk, so that a sweep that is killed later does not test it again, and logs it."""
        earlier = self.earlier_outcome()
        seconds = self.seconds + (earlier.row.study_seconds if earlier else 0.0)
        self.outcome = replace(outcome, row=replace(outcome.row, study_seconds=seconds))
        self._write(self.outcome)
        self._logged = log_outcome(self.state, self.run_id, self.outcome, time.time())

    def conclude(self) -> Outcome:
        """Completes the outcome, writes it, ends the MLflow run, and returns the outcome.

        Raises:
            TrialError: it failed, and has no outcome.
        """
        if self.failure:
            raise TrialError(self.failure)
        outcome = self.outcome or self._update_earlier_outcome()
        model_uri = outcome.model_uri
        if self._logged is not None:
            self.state.recorder.wait()
            if logged := self._logged.result():  # None where the store is lost
                self.run_id, model_uri = logged.run_id, logged.model_uri
        # Without a run, the next invocation logs it.
        run_id = None if self.state.recorder.is_lost else self.run_id
        outcome = replace(outcome, model_uri=model_uri, row=replace(outcome.row, mlflow_run_id=run_id))
        self._write(outcome)
        self.state.recorder.send(Tracker.finish, self.run_id)
        return outcome

    def _update_earlier_outcome(self) -> Outcome:
        """Returns the outcome of an earlier invocation, updated for this one."""
        outcome = self.earlier_outcome()
        assert outcome is not None, self.name
        num_passes = int(self.cache.made_now and self.config.reads_features)
        outcome = replace(outcome, row=replace(outcome.row, encoder_passes=num_passes))
        if outcome.row.mlflow_run_id != self.run_id:
            self._logged = log_outcome(self.state, self.run_id, outcome)
        return outcome


class BaselineEntry(LeaderboardEntry):
    """A baseline: chosen and tested in one piece of work, without trials. Made by `open_baseline`."""

    config: BaselineConfig

    @cached_property
    def is_settled(self) -> bool:
        """See `LeaderboardEntry.is_settled`."""
        earlier = self.earlier_outcome()
        if earlier is None or earlier.row.model_path is None:
            return earlier is not None
        if starts_a_study(self.state, self.config) and signature_of_file(self.folder / START_HEAD) is None:
            return False
        return is_exported(self.state, self.config, self.key)

    def offer_start(self) -> None:
        """Offers its head to fine-tuning: that which was fitted to train alone, so that validation can judge it."""
        outcome, start = self.outcome or self.earlier_outcome(), self.folder / START_HEAD
        if self.failure or outcome is None or outcome.checkpoint is None:
            return
        if starts_a_study(self.state, self.config) and signature_of_file(start) is not None:
            # Its weights depend on these alone; their last bits also on the number of threads.
            inputs = [*identity(self.state, self.config, self.cache, self.draws), self.state.near_copies]
            offer_head(self.state, self.config, start, outcome.validation, signature(inputs))

    @property
    def spec(self) -> StudySpec:
        """See `LeaderboardEntry.spec`."""
        config = self.config
        return replace(super().spec, baseline=config.baseline, refit=config.refit, folds=config.folds)

    def settle(self, tested: TestResult, job: Job) -> None:  # noqa: ARG002
        """See `LeaderboardEntry.settle`."""
        assert tested.fit is not None, "a baseline's test says how it was chosen"
        self.finish(
            baseline_outcome(self.state, self.config, key=self.key, cache=self.cache, fit=tested.fit, tested=tested)
        )


def open_baseline(state: SweepState, config: BaselineConfig, cache: Cache) -> BaselineEntry:
    """Opens a baseline, and starts or finds its MLflow run."""
    draws = draws_of(state, config)
    folds = [] if config.folds is None else [["folds", config.folds]]
    copies = [["near copies", state.near_copies]] if state.near_copies else []  # they stay in one fold
    refit = ["refit"] if config.refit else []
    key = signature([*identity(state, config, cache, draws), *copies, *refit, *folds])
    return BaselineEntry(state, config, cache, key, draws, start_run(state, config, key, draws))


def draws_of(state: SweepState, config: RowConfig) -> Draws | None:
    """Draws an entry's few-shot subsets; None if it trains on all rows.

    Training all weights on several draws takes too long, so such a study uses only the first draw. The exported model
    of a probe is from the first draw, too.
    """
    num_draws = state.experiment.data.few_shot_seeds if config.uses_every_draw else 1
    return draw_subsets(state.rows, config.shots, num_draws, state.experiment.seed)


def identity(state: SweepState, config: RowConfig, cache: Cache, draws: Draws | None) -> list[Any]:
    """Returns everything that a row depends on, without the number of trials."""
    experiment, encoder = state.experiment, state.encoder(config)
    num_draws = draws.num_draws if draws else 1
    return [
        [state.index.fingerprint, sorted(state.bad_rows)],
        [encoder.spec.to_dict(), encoder.weights, config.kind, config.shots, num_draws],
        [METHOD, experiment.metric, experiment.seed],
        # Folds keep groups together, also where the splits are those of the source.
        *([] if experiment.data.group is None else [experiment.model_dump()["data"]["group"]]),
        # Features in another precision have other values.
        [Path(cache.folder).name, precision_of(state, config)],
    ]
