"""A study: searches the setting for one encoder and mode, from Optuna's first trial to the chosen one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysweep.errors import TrialError
from raysweep.experiment.search_blocks import population_size, study_space
from raysweep.experiment.studies import StudyConfig
from raysweep.images.cache import Cache
from raysweep.images.rows import Draws
from raysweep.results.tracking import LoggedTrial, RunStatus, Tracker
from raysweep.storage.copies import location, publish
from raysweep.storage.paths import signature
from raysweep.sweep.best_heads import first_head, head_signature, offer_head, signature_of_file, starts_a_study
from raysweep.sweep.leaderboard_entry import LeaderboardEntry, draws_of, identity
from raysweep.sweep.optuna_study import OptunaStudy, open_optuna_study
from raysweep.sweep.optuna_trials import CONTINUES
from raysweep.sweep.outcome import Outcome, is_exported, study_outcome
from raysweep.sweep.schedulers import stopped_result
from raysweep.sweep.state import SweepState
from raysweep.sweep.study_progress import StudyProgress
from raysweep.sweep.study_runs import run_name, run_params, start_run
from raysweep.sweep.trial_files import TrialFiles, remove_checkpoints
from raysweep.sweep.trial_store import open_store
from raysweep.training.baseline_task import REFITTED
from raysweep.training.checkpoint import load_checkpoint
from raysweep.worker.job import EpochReport, Job, StudySpec, TestResult, TrialResult, TrialSpec

if TYPE_CHECKING:
    import optuna

# Keys of `train` that change how results are computed, but not the results.
KEYS_WITHOUT_EFFECT_ON_RESULTS = ("micro_batch_size", "gradient_checkpointing", "compile")


def open_study(state: SweepState, config: StudyConfig, cache: Cache) -> Study:
    """Opens a study with the trials of earlier invocations, and starts or reopens its MLflow run.

    Raises:
        ConfigError: the encoder has none of the requested feature sources, or Optuna's database cannot be used.
        DataError: the journal of Optuna's studies is damaged.
        TrialError: the head that it starts from cannot be read.
    """
    experiment = state.experiment
    block = experiment.search.block(config.mode)
    train, sources = experiment.train, list(state.encoder(config).spec.sources)
    space = study_space(block, sources, config.encoder_name, augments=train.augmentation is not None)
    head = first_head(state, config)
    draws = draws_of(state, config)
    key = signature(
        [
            *identity(state, config, cache, draws),
            {name: dimension.model_dump() for name, dimension in space.items()},
            block.sampler,
            *([] if block.scheduler == "none" else [block.scheduler]),
            experiment.train.model_dump(exclude=set(KEYS_WITHOUT_EFFECT_ON_RESULTS)),
            head_signature(head) if head else None,
        ]
    )
    run_id = start_run(state, config, key, draws)
    name, database = f"{config.name}-{key}", experiment.tracking.optuna_uri
    if database:  # sweeps share the database, but not the weights of their trials
        name = f"{experiment.name}-{signature(location(state.paths.root))}-{name}"
    if state.journal is None and database is None:
        state.journal = open_store(state.paths.optuna_journal, state.progress.warn)
    store = database or state.journal
    assert store is not None
    found = open_optuna_study(
        store, name, block, space, state.ranking.within_study, experiment.seed, train.warmup_fraction
    )
    study = Study(state, config, cache, key, draws, run_id, found, head.checkpoint if head else None)
    study.log_earlier_trials()
    study.files.remove_leftovers()
    return study


class Study(LeaderboardEntry):
    """A study whose setting is searched with Optuna. Made by `open_study`.

    Args:
        state: state that all studies share.
        config: encoder, mode and shots.
        cache: the features or pixels that it trains on.
        key: signature of everything that its results depend on.
        draws: its few-shot draws; None if it trains on all rows.
        run_id: id of its MLflow run.
        optuna_study: its trials in Optuna.
        head: file of heads that fine-tuning starts from; None for a new head.
    """

    config: StudyConfig

    def __init__(
        self,
        state: SweepState,
        config: StudyConfig,
        cache: Cache,
        key: str,
        draws: Draws | None,
        run_id: str,
        optuna_study: OptunaStudy,
        head: Path | None,
    ) -> None:
        super().__init__(state, config, cache, key, draws, run_id)
        self.optuna_study, self.head = optuna_study, head
        self.files = TrialFiles(self.folder, state.paths, optuna_study)
        metric = state.ranking.metric
        self.progress = StudyProgress(state.progress, self.name, self.folder, optuna_study, metric)
        self.num_left = optuna_study.num_remaining
        self.waiting: dict[int, optuna.trial.Trial] = {}
        self.histories: dict[int, list[Mapping[str, float]]] = {}  # logged epochs of trials that still run
        self.stopped: set[int] = set()
        self.failed: list[TrialResult] = []  # trials of this invocation that an error ended
        self.lost: TrialSpec | None = None  # the best trial, while it trains again because its checkpoint is lost
        self._started: float | None = None

    def log_earlier_trials(self) -> None:
        """Logs trials of earlier invocations that are not completely in MLflow."""
        times = self.optuna_study.times()
        trials = [self._to_logged_trial(result, *times[result.number]) for result in self.optuna_study.results]
        self.state.recorder.send(Tracker.log_missing_trials, self.run_id, trials)

    @cached_property
    def run_params(self) -> dict[str, Any]:
        """Parameters that the MLflow runs of its trials have besides the setting."""
        return run_params(self.state, self.config)

    @cached_property
    def is_settled(self) -> bool:
        """See `LeaderboardEntry.is_settled`."""
        earlier = self.earlier_outcome()
        if self.num_left or earlier is None or earlier.num_records != len(self.optuna_study.results):
            return False
        if self.spec.refit != (REFITTED.items() <= earlier.row.best_params.items()):
            return False
        return is_exported(self.state, self.config, self.key, self.optuna_study.best().number)

    @property
    def spec(self) -> StudySpec:
        """See `LeaderboardEntry.spec`."""
        return replace(super().spec, refit=self.state.experiment.refits(self.config))

    def ask(self) -> list[TrialSpec]:
        """Draws the settings of the next Population; none if the budget of trials or time is spent."""
        budget = self.optuna_study.block.time_budget_s
        if self._started is None:
            self._started = time.monotonic() - self.optuna_study.seconds_spent
        # The first Population always runs: a study without a trial has no result.
        elif budget is not None and time.monotonic() - self._started > budget:
            self.num_left = 0
        trials = self.optuna_study.ask(min(population_size(self.optuna_study.block), self.num_left))
        self.num_left -= len(trials)
        self.waiting |= {trial.number: trial for trial in trials}
        if not self.config.mode.trains_together:  # a trial writes checkpoints under its number before `tell`
            self._publish_journal()
        return [
            TrialSpec(
                study=self.name,
                number=trial.number,
                setting=dict(trial.params),
                continues=trial.user_attrs.get(CONTINUES),
                stop_file=location(self.files.stop_file(trial.number)),
            )
            for trial in trials
        ]

    def find_lost_trial(self) -> TrialSpec | None:
        """Returns the best trial if its checkpoint is needed and cannot be read: it has to be trained again.

        It keeps its number and its result: only the file is made again.
        """
        is_needed = starts_a_study(self.state, self.config) or not self.is_settled
        if self.lost is not None or self.num_left or not is_needed:
            return None
        try:
            best = self.optuna_study.best()
        except TrialError:
            return None
        checkpoint = self.files.checkpoint(best)
        try:
            load_checkpoint(checkpoint)
            return None
        except TrialError as error:
            self.state.progress.warn(f"{self.name}: trial {best.number}, its best, is trained again: {error}")
        remove_checkpoints(checkpoint.parent)
        folder_number = int(checkpoint.parent.name)
        self.lost = TrialSpec(
            study=self.name,
            number=best.number,
            setting=best.setting,
            continues=None if folder_number == best.number else folder_number,
            stop_file=location(self.files.stop_file(best.number)),
        )
        return self.lost

    def _publish_journal(self) -> None:
        if self.state.experiment.tracking.optuna_uri is None:
            publish(self.state.paths.optuna_journal)

    def on_epoch(self, report: EpochReport) -> bool:
        """Logs an epoch of a trial that is still running; returns whether to stop the trial."""
        number, metrics = report.number, report.metrics
        if number not in self.waiting:  # it trains again only for its checkpoint
            return False
        trial, history = self.waiting[number], self.histories.setdefault(number, [])
        if report.epoch < len(history):  # the trial started again from its last epoch, with smaller micro-batches
            return False
        history.append(metrics)
        key, name = f"{self.key}/{number}", run_name(self.config, trial.params)
        params, started = {**self.run_params, **trial.params}, _started(trial)
        self.state.recorder.send(Tracker.log_epoch, self.run_id, key, name, params, report.epoch, metrics, started)
        self.progress.show_epoch(number, report.epoch, metrics)
        if self.optuna_study.should_stop(trial, history):
            self.stopped.add(number)
        return number in self.stopped

    def ask_to_stop(self, number: int) -> None:
        """Asks the worker processes of a trial to stop."""
        self.files.ask_to_stop(number)

    def tell(self, number: int, result: TrialResult | None, reason: str) -> None:
        """Records the end of a trial: its result, or the reason why there is none."""
        if number not in self.waiting:
            self._take_lost_trial(number, result, reason)
            return
        trial, history = self.waiting.pop(number), self.histories.pop(number, [])
        if result is None and number in self.stopped:
            result = stopped_result(trial, self.name, history, self.state.ranking.within_study)
        elif result is None:
            result = TrialResult(self.name, number, dict(trial.params), error=reason)
        if result.checkpoint:
            result = replace(result, checkpoint=self.state.paths.relative(result.checkpoint))
        self.optuna_study.tell(trial, result)
        # Publish once per Population; a trial that trains alone takes minutes, so publish after each.
        if not self.config.mode.trains_together or not self.waiting:
            self._publish_journal()
        self.files.remove_unneeded(result, was_stopped=number in self.stopped)
        logged = self._to_logged_trial(result, _started(trial), time.time(), len(history))
        self.state.recorder.send(Tracker.log_trial, self.run_id, *logged)
        self.progress.num_done += 1
        self.state.num_new_trials += 1
        self.progress.show_end(result, is_last=not self.waiting)
        if result.error is not None:
            self._count_failure(result)

    def _take_lost_trial(self, number: int, result: TrialResult | None, reason: str) -> None:
        """Notes how a trial ended that trained again only for its checkpoint."""
        error = reason if result is None else result.error
        if error is not None:
            self.state.progress.warn(f"{self.name}: trial {number} could not be trained again: {error}")

    def _count_failure(self, result: TrialResult) -> None:
        """Counts failed trials, and ends the search once most of the study's trials have failed."""
        self.failed.append(result)
        if 2 * len(self.failed) > self.progress.total and self.num_left:
            self.num_left = 0
            first = self.failed[0]
            why = f"stopped, because {self._describe_failed()}"
            self.state.progress.warn(f"{self.name}: {why}; the first error (trial {first.number}):")
            for line in self.files.error_text(first).strip().splitlines():
                self.state.progress.say(line)

    def _describe_failed(self) -> str:
        return f"{len(self.failed)} of {self.progress.total} trials failed"

    @property
    def shortfall(self) -> str | None:
        """What failed trials have left of the budget, in words; None if nothing."""
        if not self.failed:
            return None
        first = self.failed[0]
        found = f"{self._describe_failed()} (trial {first.number}: {first.error})"
        return f"{self.name}: {found}; the same command runs what is left of its budget"

    def _to_logged_trial(
        self, result: TrialResult, started: float | None, ended: float | None, num_logged: int = 0
    ) -> tuple[str, str, LoggedTrial]:
        history = list(result.history[num_logged:])
        if self.config.mode.trains_together:  # the time of an epoch is shared by hundreds of trials
            history = [{k: v for k, v in epoch.items() if not k.startswith("time/")} for epoch in history]
        params, status = {**self.run_params, **result.setting}, self._status(result)
        trial = LoggedTrial(params, history, result.final, status, result.error, num_logged, started, ended)
        return f"{self.key}/{result.number}", run_name(self.config, result.setting), trial

    def _status(self, result: TrialResult) -> RunStatus:
        if result.pruned:
            return "KILLED"
        return "FINISHED" if self.optuna_study.is_usable(result) else "FAILED"

    def choose(self) -> str | None:
        """Ends the search; returns the checkpoint of the best trial, or None if no trial succeeded."""
        self.progress.finish()
        try:
            best = self.optuna_study.best()
        except TrialError as error:
            self.failure = str(error)
            return None
        checkpoint = self.files.checkpoint(best)
        if starts_a_study(self.state, self.config):
            offer_head(self.state, self.config, checkpoint, best.final, self._head_signature(best.number, checkpoint))
        return location(checkpoint)

    def _head_signature(self, trial: int, checkpoint: Path) -> str | None:
        """Returns the signature of a head when it was chosen first; None if it cannot be read now.

        A head that is trained again keeps its signature, and fine-tuning stays the same study.
        """
        found, kept = signature_of_file(checkpoint), self.optuna_study.head_weights(trial)
        if found is not None and kept is None:
            self.optuna_study.keep_head_weights(trial, found)
        return found and (kept or found)

    def settle(self, tested: TestResult, job: Job) -> None:
        """See `LeaderboardEntry.settle`. Removes all checkpoints but the best one."""
        results, best = self.optuna_study.results, self.optuna_study.best()
        chosen = replace(best, checkpoint=location(self.files.checkpoint(best)))
        self.finish(
            study_outcome(
                self.state,
                self.config,
                key=self.key,
                draws=self.draws,
                job=job,
                cache=self.cache,
                results=results,
                best=chosen,
                tested=tested,
            )
        )
        self.files.keep_only(best, results)

    def conclude(self) -> Outcome:
        """See `LeaderboardEntry.conclude`."""
        if self.outcome is None and self.failure is None:
            self.state.progress.say(f"{self.name}: all {self.progress.num_done} trials are there, nothing left to do")
        return super().conclude()


def _started(trial: optuna.trial.Trial) -> float | None:
    started = trial.datetime_start
    return started.timestamp() if started else None
