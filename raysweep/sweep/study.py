"""A study: searches the setting for one encoder and mode, from Optuna's first trial to the chosen one."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from raysweep.encoders.base import weights_signature
from raysweep.errors import TrialError
from raysweep.experiment.search_blocks import population_size, study_space
from raysweep.experiment.studies import StudyConfig
from raysweep.images.cache import Cache
from raysweep.images.rows import Draws
from raysweep.results.progress import Stage
from raysweep.results.tracking import LoggedTrial, RunStatus, Tracker
from raysweep.storage.copies import fetch, list_files, local_path, location, publish, remove
from raysweep.storage.paths import signature, write_atomically
from raysweep.sweep.leaderboard_entry import LeaderboardEntry, draws_of, identity, start_run
from raysweep.sweep.optuna_study import OptunaStudy, open_optuna_study
from raysweep.sweep.outcome import Outcome, is_exported, study_outcome
from raysweep.sweep.state import SweepState
from raysweep.sweep.trial_store import open_store
from raysweep.training.checkpoint import load_checkpoint
from raysweep.worker.inputs import load_heads
from raysweep.worker.job import EpochReport, Job, TestResult, TrialResult, TrialSpec

if TYPE_CHECKING:
    import optuna

LAST = "last.safetensors"
CHECKPOINTS = ("best.safetensors", LAST)  # files of a trial

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
    space = study_space(block, list(state.encoder(config).spec.sources), config.encoder_name)
    head = None  # LP-FT (Kumar et al. 2022) starts from the head of the best probe of the same encoder and shots
    if config.mode.starts_from == "best_probe":
        head = state.best_heads.get((config.encoder_name, config.shots))
    draws = draws_of(state, config)
    key = signature(
        [
            *identity(state, config, cache, draws),
            {name: dimension.model_dump() for name, dimension in space.items()},
            block.sampler,
            *([] if block.scheduler == "none" else [block.scheduler]),
            experiment.train.model_dump(exclude=set(KEYS_WITHOUT_EFFECT_ON_RESULTS)),
            (state.head_weights.get(head) or weights_signature(load_heads(head)[0][0])) if head else None,
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
    found = open_optuna_study(store, name, block, space, state.ranking, experiment.seed)
    study = Study(state, config, cache, key, draws, run_id, found, head)
    study.log_earlier_trials()
    study.remove_leftovers()
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
        head: checkpoint of the probe that fine-tuning starts from; None for a new head.
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
        self.num_left = optuna_study.num_remaining
        self.num_done, self.total = optuna_study.num_done, optuna_study.block.num_trials
        self.waiting: dict[int, optuna.trial.Trial] = {}
        self.histories: dict[int, list[Mapping[str, float]]] = {}  # logged epochs of trials that still run
        self.stopped: set[int] = set()
        self.errors: set[str] = set()
        self.failed: list[TrialResult] = []  # trials of this invocation that an error ended
        self.lost: TrialSpec | None = None  # the best trial, while it trains again because its checkpoint is lost
        self._stage: Stage | None = None
        self._started: float | None = None

    def log_earlier_trials(self) -> None:
        """Logs trials of earlier invocations that are not completely in MLflow."""
        trials = [self._to_logged_trial(result) for result in self.optuna_study.results]
        self.state.recorder.send(Tracker.log_missing_trials, self.run_id, trials)

    @cached_property
    def is_settled(self) -> bool:
        """See `LeaderboardEntry.is_settled`."""
        earlier = self.earlier_outcome()
        if self.num_left or earlier is None or earlier.num_records != len(self.optuna_study.results):
            return False
        return is_exported(self.state, self.config, self.key, self.optuna_study.best().number)

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
                continues=trial.user_attrs.get("continues"),
                stop_file=location(self._stop_file(trial.number)),
            )
            for trial in trials
        ]

    def find_lost_trial(self) -> TrialSpec | None:
        """Returns the best trial if its checkpoint is needed and cannot be read: it has to be trained again.

        It keeps its number and its result: only the file is made again.
        """
        if self.lost is not None or self.num_left or not (self._gives_a_head or not self.is_settled):
            return None
        try:
            best = self.optuna_study.best()
        except TrialError:
            return None
        checkpoint = self._checkpoint_of(best)
        try:
            load_checkpoint(checkpoint)
            return None
        except TrialError as error:
            self.state.progress.warn(f"{self.name}: trial {best.number}, its best, is trained again: {error}")
        for name in CHECKPOINTS:
            remove(checkpoint.with_name(name))
        folder_number = int(checkpoint.parent.name)
        self.lost = TrialSpec(
            study=self.name,
            number=best.number,
            setting=best.setting,
            continues=None if folder_number == best.number else folder_number,
            stop_file=location(self._stop_file(best.number)),
        )
        return self.lost

    @property
    def _gives_a_head(self) -> bool:
        """Whether another study of this sweep starts from its best head."""
        mine = self.config.encoder_name, self.config.shots
        return self.config.mode.gives_heads and any(
            other.mode.starts_from == "best_probe" and (other.encoder_name, other.shots) == mine
            for other in self.state.experiment.studies()
        )

    def _checkpoint_of(self, result: TrialResult) -> Path:
        assert result.checkpoint is not None, "the best trial of a study has a checkpoint"
        return local_path(self.state.paths.resolve(result.checkpoint))

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
        key, name = f"{self.key}/{number}", f"{self.name}-{number}"
        recorder = self.state.recorder
        recorder.send(Tracker.log_epoch, self.run_id, key, name, dict(trial.params), report.epoch, metrics)
        metric = self.state.experiment.metric
        self._show(f"trial {number} epoch {report.epoch + 1}: {metric} {metrics.get(metric, math.nan):.3f}")
        if self.optuna_study.should_stop(trial, history):
            self.stopped.add(number)
        return number in self.stopped

    def ask_to_stop(self, number: int) -> None:
        """Writes the file that the worker processes of a trial look for, because Tune cannot stop them."""
        write_atomically(self._stop_file(number), "")

    def _stop_file(self, number: int) -> Path:
        return self.folder / "stop" / str(number)

    def tell(self, number: int, result: TrialResult | None, reason: str) -> None:
        """Records the end of a trial: its result, or the reason why there is none."""
        if number not in self.waiting:
            self._take_lost_trial(number, result, reason)
            return
        trial, history = self.waiting.pop(number), self.histories.pop(number, [])
        if result is None and number in self.stopped:
            result = self.optuna_study.stopped_result(trial, self.name, history)
        elif result is None:
            result = TrialResult(self.name, number, dict(trial.params), error=reason)
        if result.checkpoint:
            result = replace(result, checkpoint=self.state.paths.relative(result.checkpoint))
        self.optuna_study.tell(trial, result)
        # Publish once per Population; a trial that trains alone takes minutes, so publish after each.
        if not self.config.mode.trains_together or not self.waiting:
            self._publish_journal()
        self._remove_unneeded_files(result)
        self.state.recorder.send(Tracker.log_trial, self.run_id, *self._to_logged_trial(result, len(history)))
        self.num_done += 1
        self.state.num_new_trials += 1
        self._show_end(result)
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
        if 2 * len(self.failed) > self.total and self.num_left:
            self.num_left = 0
            found = f"{len(self.failed)} of {self.total} trials failed"
            first = self.failed[0]
            self.state.progress.warn(f"{self.name}: stopped, because {found}; the first error (trial {first.number}):")
            path = fetch(self.folder / "trials" / str(first.number) / "error.txt")
            text = path.read_text() if path.exists() else str(first.error)  # a process that died has written none
            for line in text.strip().splitlines():
                self.state.progress.say(line)

    @property
    def shortfall(self) -> str | None:
        """What failed trials have left of the budget, in words; None if nothing."""
        if not self.failed:
            return None
        found = (
            f"{len(self.failed)} of {self.total} trials failed (trial {self.failed[0].number}: {self.failed[0].error})"
        )
        return f"{self.name}: {found}; the same command runs what is left of its budget"

    def _remove_unneeded_files(self, result: TrialResult) -> None:
        """Removes files that are not needed after the end of a trial."""
        if result.number in self.stopped:
            remove(self._stop_file(result.number))
        if result.checkpoint:  # the optimiser's state takes twice the model's size
            remove(self._checkpoint_of(result).with_name(LAST))
        elif result.error is not None and not self.config.mode.trains_together:
            folder = self.folder / "trials" / str(self.optuna_study.folder_number(result.number))
            for name in CHECKPOINTS:
                remove(folder / name)
        if result.pruned:
            self._delete_folders(result.number)

    def remove_leftovers(self) -> None:
        """Removes what killed invocations have left of trials that are over: the state of their training."""
        if self.config.mode.trains_together:  # such trials write only their result
            return
        trials = self.folder / "trials"
        unfinished = self.optuna_study.unfinished_folders
        for name in list_files(trials):
            folder, _, file = name.rpartition("/")
            if file.startswith(".") or (file == LAST and folder not in unfinished):
                remove(trials / name)

    def _delete_folders(self, number: int) -> None:
        """Deletes the files of a stopped trial, because its weights are not needed."""
        for folder_number in {number, self.optuna_study.folder_number(number)}:
            remove(self.folder / "trials" / str(folder_number))

    def _show_end(self, result: TrialResult) -> None:
        if result.error and result.error not in self.errors:
            self.errors.add(result.error)
            self.state.progress.warn(f"{self.name}: trial {result.number} failed: {result.error}")
            self.state.progress.say(f"its traceback is in {location(self.folder)}/trials/")
        if result.pruned:
            scheduler = self.optuna_study.block.scheduler
            self._show(f"trial {result.number} stopped after epoch {len(result.history)} ({scheduler})")
        if not self.waiting:
            self._show(self._best_so_far())

    def _to_logged_trial(self, result: TrialResult, num_logged: int = 0) -> tuple[str, str, LoggedTrial]:
        history = list(result.history[num_logged:])
        if self.config.mode.trains_together:  # the time of an epoch is shared by hundreds of trials
            history = [{k: v for k, v in epoch.items() if not k.startswith("time/")} for epoch in history]
        trial = LoggedTrial(result.setting, history, result.final, self._status(result), result.error, num_logged)
        return f"{self.key}/{result.number}", f"{self.name}-{result.number}", trial

    def _status(self, result: TrialResult) -> RunStatus:
        if result.pruned:
            return "KILLED"
        return "FINISHED" if self.optuna_study.is_usable(result) else "FAILED"

    def _show(self, note: str) -> None:
        if self._stage is None:
            self._stage = self.state.progress.stage(self.name, self.total)
        self._stage.update(self.num_done, note)

    def _best_so_far(self) -> str:
        metric = self.state.experiment.metric
        try:
            value = self.optuna_study.best().final[metric]
        except TrialError:
            return "no trial has succeeded yet"
        return ", ".join(filter(None, [f"best {metric} {value:.3f}", self._describe_stopped()]))

    def _describe_stopped(self) -> str:
        num_stopped = sum(result.pruned for result in self.optuna_study.results)
        return f"{num_stopped} of {self.num_done} trials stopped early" if num_stopped else ""

    def choose(self) -> str | None:
        """Ends the search; returns the checkpoint of the best trial, or None if no trial succeeded."""
        if self._stage is not None:
            self._stage.finish()
            if stopped := self._describe_stopped():
                self.state.progress.say(f"{self.name}: {stopped} ({self.optuna_study.block.scheduler})")
        try:
            best = self.optuna_study.best()
        except TrialError as error:
            self.failure = str(error)
            return None
        checkpoint = self._checkpoint_of(best)
        if self._gives_a_head:
            self.state.best_heads[self.config.encoder_name, self.config.shots] = checkpoint
            self._find_head_weights(best.number, checkpoint)
        return location(checkpoint)

    def _find_head_weights(self, trial: int, checkpoint: Path) -> None:
        """Finds the signature of the best head's weights. A head that cannot be read has none."""
        try:
            (head, *_), _ = load_heads(checkpoint)
        except TrialError:  # whoever starts from it says so
            return
        weights = self.optuna_study.head_weights(trial)
        if weights is None:
            weights = weights_signature(head)
            self.optuna_study.keep_head_weights(trial, weights)
        self.state.head_weights[checkpoint] = weights

    def settle(self, tested: TestResult, job: Job) -> None:
        """See `LeaderboardEntry.settle`. Removes all checkpoints but the best one."""
        results, best = self.optuna_study.results, self.optuna_study.best()
        chosen = replace(best, checkpoint=location(self._checkpoint_of(best)))
        self.finish(
            study_outcome(
                self.state,
                self.config,
                key=self.key,
                job=job,
                cache=self.cache,
                results=results,
                best=chosen,
                tested=tested,
            )
        )
        for result in results:  # eight fine-tunes of a large encoder would keep 10 GB
            if result.checkpoint and result.checkpoint != best.checkpoint:
                remove(self._checkpoint_of(result))
            if result.pruned:  # a worker may have written again while it stopped
                self._delete_folders(result.number)

    def conclude(self) -> Outcome:
        """See `LeaderboardEntry.conclude`."""
        if self.outcome is None and self.failure is None:
            self.state.progress.say(f"{self.name}: all {self.num_done} trials are there, nothing left to do")
        return super().conclude()
