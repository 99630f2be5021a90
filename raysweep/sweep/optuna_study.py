"""One study as Optuna keeps it: which settings come next, what became of each trial, and which one is the best.

The only importer of optuna. The study in its journal is the truth: every trial told is there, a resumed sweep opens
it again and goes on, and Tune is started afresh for what is left of the budget.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysweep.errors import ConfigError, TrialError
from raysweep.experiment.search_blocks import SearchBlock
from raysweep.experiment.space import (
    Choices,
    Dimension,
    FloatRange,
    Scheduler,
    fit_to_space,
    grid,
    num_grid_points,
)
from raysweep.training.ranking import Ranking
from raysweep.worker.job import TrialResult, field_values

if TYPE_CHECKING:
    import optuna

SECONDS_TO_CONNECT = 10
SCHEMA_LOCK = 0x7261797377656570  # "raysweep"
RUNG = "completed_rung_"  # where Optuna's asha notes, in a trial's system attributes, what it has compared
STOPPED = "stopped"  # user attribute of a trial that its scheduler wants stopped
MEDIAN_NEEDS = 4  # trials that ran to their end, before others are compared with them
RESULT = "record"  # user attribute of a trial that is over: its TrialResult


def open_optuna_study(
    store: Path | str, name: str, block: SearchBlock, space: Mapping[str, Dimension], ranking: Ranking, seed: int
) -> OptunaStudy:
    """Opens or creates a study, and makes it ready to be asked: interrupted trials are to be run again.

    Args:
        store: what `open_store` takes; holds the studies of all invocations.
        name: of the study; made unique by the signature of all that its results depend on.
        block: sampler, scheduler and budget.
        space: from `study_space`.
        ranking: how trials are ranked.
        seed: of the sampler.

    Raises:
        ConfigError: the store cannot be used.
    """
    import optuna

    if block.sampler == "grid":  # an encoder that lacks a feature source has fewer points than the block
        block = block.model_copy(update={"num_trials": min(block.num_trials, num_grid_points(space))})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        opened = optuna.create_study(
            storage=open_store(store),
            study_name=name,
            direction=ranking.direction,
            sampler=_sampler(block.sampler, seed),
            pruner=_pruner(block.scheduler),
            load_if_exists=True,
        )
    past = opened.get_trials(deepcopy=False)
    # A resumed sampler must not draw again what it drew before.
    opened.sampler = _sampler(block.sampler, seed + len(past))
    study = OptunaStudy(opened, block, space, ranking)
    study.enqueue_first(past)
    study.continue_interrupted()
    return study


class OptunaStudy:
    """An Optuna study with its budget: asks for settings, is told results, survives being killed.

    Made by `open_optuna_study`; its arguments are the same.
    """

    def __init__(
        self, study: optuna.Study, block: SearchBlock, space: Mapping[str, Dimension], ranking: Ranking
    ) -> None:
        self.study, self.block, self.space, self.ranking = study, block, dict(space), ranking
        self.distributions = {name: _distribution(dimension) for name, dimension in space.items()}

    def enqueue_first(self, past: Sequence[optuna.trial.FrozenTrial]) -> None:
        """Enqueues the recommendations, or the grid, as far as they are not there: the budget may have grown."""
        failed = {result.number for result in self.results if result.error is not None}
        known = [t.system_attrs.get("fixed_params", t.params) for t in past if t.number not in failed]
        if self.block.sampler == "grid":
            first = grid(self.space)[: self.block.num_trials]
        else:
            first = [fit_to_space(setting, self.space) for setting in self.block.mode.recommendations]
        seen = {_key(setting) for setting in known}
        for setting in first:
            if _key(setting) not in seen:
                seen.add(_key(setting))
                self.study.enqueue_trial(setting)

    def continue_interrupted(self) -> None:
        """Ends trials that an earlier invocation left running, and enqueues each again with what it has reported."""
        from optuna.trial import TrialState

        for trial in self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            if RESULT in trial.user_attrs:  # it was over, but the sweep ended before Optuna was told
                self._tell(trial.number, read_result(trial.user_attrs[RESULT]))
                continue
            self.study.tell(trial.number, state=TrialState.FAIL)
            self.study.add_trial(self._continuation(trial))

    def _continuation(self, trial: optuna.trial.FrozenTrial) -> optuna.trial.FrozenTrial:
        """What `enqueue_trial` would add, and with it what has been reported: no epoch is judged twice."""
        from optuna.trial import TrialState, create_trial

        rungs = {name: value for name, value in trial.system_attrs.items() if name.startswith(RUNG)}
        return create_trial(
            state=TrialState.WAITING,
            system_attrs={"fixed_params": trial.params, **rungs},
            user_attrs={
                "continues": self.folder_number(trial.number),
                **{name: True for name in (STOPPED,) if name in trial.user_attrs},
            },
            intermediate_values=trial.intermediate_values,
        )

    def folder_number(self, number: int) -> int:
        """The trial in whose folder this one works: itself, or the interrupted one that it continues."""
        trial = self.study.get_trials(deepcopy=False)[number]
        return int(trial.user_attrs.get("continues", number))

    @property
    def results(self) -> list[TrialResult]:
        """Every trial that came to an end, failed ones included, interrupted ones not."""
        trials = self.study.get_trials(deepcopy=False)
        return [read_result(trial.user_attrs[RESULT]) for trial in trials if RESULT in trial.user_attrs]

    @property
    def num_done(self) -> int:
        """Trials that came to an end without an error."""
        return sum(result.error is None for result in self.results)

    @property
    def num_remaining(self) -> int:
        """Trials left of the budget; those that an error ended are tried again by the next invocation.

        None are left when the time budget is spent, whatever invocation spent it, unless nothing succeeded so far.
        """
        num_done = self.num_done
        budget = self.block.time_budget_s
        if num_done and budget is not None and self.seconds_spent >= budget:
            return 0
        return max(0, self.block.num_trials - num_done)

    @property
    def seconds_spent(self) -> float:
        """Wall time in which trials of this study ran, over all invocations; trials side by side count once."""
        trials = self.study.get_trials(deepcopy=False)
        spans = sorted(
            (t.datetime_start, t.datetime_complete) for t in trials if t.datetime_start and t.datetime_complete
        )
        seconds, until = 0.0, datetime.min
        for start, end in spans:
            seconds += max(0.0, (end - max(start, until)).total_seconds())
            until = max(until, end)
        return seconds

    def ask(self, num_trials: int) -> list[optuna.trial.Trial]:
        """Draws settings for a Population."""
        return [self.study.ask(self.distributions) for _ in range(num_trials)]

    def should_stop(self, trial: optuna.trial.Trial, history: Sequence[Mapping[str, float]]) -> bool:
        """Reports a trial's last epoch to the scheduler; returns whether it stops the trial.

        What is compared is the best epoch so far, since that is what a trial is ranked by in the end.
        """
        if self.block.scheduler == "none":
            return False
        step, reported = len(history), self.study.get_trials(deepcopy=False)[trial.number].last_step
        if reported is not None and step <= reported:  # a trial that goes on passes its earlier epochs on again
            return step == reported and STOPPED in trial.user_attrs
        trial.report(max(history, key=self.ranking.key)[self.ranking.metric], step)
        stops = step < trial.params["epochs"] and trial.should_prune()
        if stops:
            trial.set_user_attr(STOPPED, True)  # a sweep that is killed before it can tell so does not train it on
        return stops

    def stopped_result(
        self, trial: optuna.trial.Trial, study: str, history: Sequence[Mapping[str, float]]
    ) -> TrialResult:
        """Returns what is known of a trial that was stopped after an epoch."""
        best = max(range(len(history)), key=lambda epoch: self.ranking.key(history[epoch]))
        return TrialResult(
            study=study,
            number=trial.number,
            setting=dict(trial.params),
            history=tuple(history),
            final=history[best],
            best_epoch=best,
            train_seconds=sum(epoch["time/epoch_s"] for epoch in history),
            images_per_second=statistics.median(epoch["train/images_per_second"] for epoch in history),
            pruned=True,
        )

    def tell(self, trial: optuna.trial.Trial, result: TrialResult) -> None:
        """Records a trial's end; one without a finite value failed, and is never left running."""
        trial.set_user_attr(RESULT, field_values(result))
        self._tell(trial.number, result)

    def _tell(self, number: int, result: TrialResult) -> None:
        from optuna.trial import TrialState

        if result.pruned:
            self.study.tell(number, state=TrialState.PRUNED)  # with the last value reported
        elif self.is_usable(result):
            self.study.tell(number, result.final[self.ranking.metric])
        else:
            self.study.tell(number, state=TrialState.FAIL)

    def is_usable(self, result: TrialResult) -> bool:
        """Whether a trial has a value to be ranked by."""
        return result.error is None and self.ranking.is_usable(result.final)

    def best(self) -> TrialResult:
        """Returns the trial with the best value; among equals the one with the lowest validation loss, then the first.

        Trials that were stopped early are not chosen, since their weights are not kept.

        Raises:
            TrialError: no trial ran to its end without an error.
        """
        results = self.results
        usable = [result for result in results if self.is_usable(result) and not result.pruned]
        if not usable:
            why = "; ".join(sorted({self._why_not(result) for result in results})[:3]) or "none was run"
            raise TrialError(f"{self.study.study_name}: no trial succeeded; {why}")
        return max(usable, key=lambda result: (self.ranking.key(result.final), -result.number))

    def _why_not(self, result: TrialResult) -> str:
        if result.pruned:
            return f"{self.block.scheduler} stopped some early"
        return result.error or f"{self.ranking.metric} was not a finite number"


def read_result(values: Mapping[str, Any]) -> TrialResult:
    """Reads a result out of Optuna's journal; that of version 0.1 has no study and keeps the costs under `details`."""
    found = {"study": "", **values, **values.get("details", {}), "history": tuple(values["history"])}
    found.pop("details", None)
    return TrialResult(**found)


def open_store(store: Path | str) -> optuna.storages.BaseStorage:
    """Opens what keeps Optuna's studies: a journal, in a file that is made where missing, or a PostgreSQL database.

    Raises:
        ConfigError: the database cannot be used.
    """
    import optuna
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if isinstance(store, Path):
        store.parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(str(store)))
    try:
        import psycopg

        with psycopg.connect(store, connect_timeout=SECONDS_TO_CONNECT) as connection:
            # Several sweeps may be the first at once, and Optuna makes its tables without a lock. This one ends with
            # the connection.
            connection.execute("SELECT pg_advisory_xact_lock(%s)", (SCHEMA_LOCK,))
            # psycopg 3, and a connection that the server has closed meanwhile is noticed before it is used.
            uri = f"postgresql+psycopg://{store.partition('://')[2]}"
            patience = {"connect_timeout": SECONDS_TO_CONNECT}
            return RDBStorage(uri, engine_kwargs={"pool_pre_ping": True, "connect_args": patience})
    except Exception as error:  # whatever the driver raises, from a wrong host to a missing right
        reason = " ".join(str(error).split())[:300]
        hint = "it needs a database of its own, since MLflow's has a table of the same name"
        raise ConfigError(f"tracking.optuna_uri: '{store}' cannot be used by Optuna ({reason}); {hint}") from error


def _key(setting: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(setting.items()))


def _sampler(kind: str, seed: int) -> optuna.samplers.BaseSampler:
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if kind == "tpe":
            # The constant liar keeps the settings of one Population, all asked for at once, apart.
            return optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        return optuna.samplers.RandomSampler(seed=seed)  # a grid's settings are enqueued, none is drawn


def _pruner(scheduler: Scheduler) -> optuna.pruners.BasePruner:
    import optuna

    if scheduler == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    if scheduler == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=MEDIAN_NEEDS, n_warmup_steps=1)
    return optuna.pruners.NopPruner()


def _distribution(dimension: Dimension) -> optuna.distributions.BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(dimension, Choices):
        return CategoricalDistribution(dimension.choices)
    if isinstance(dimension, FloatRange):
        return FloatDistribution(dimension.low, dimension.high, log=dimension.log)
    return IntDistribution(dimension.low, dimension.high, log=dimension.log)
