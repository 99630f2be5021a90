"""The search for one encoder and mode: an Optuna study that Ray Tune works through, Population by Population.

The only importer of optuna. The study in its journal is the truth: every trial told is there, a resumed sweep opens
it again and goes on, and Tune is started afresh for what is left of the budget.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raysweep.errors import ConfigError, TrialError, did_you_mean
from raysweep.experiment.config import SearchBlock
from raysweep.experiment.space import (
    Choices,
    Dimension,
    FloatRange,
    Scheduler,
    Setting,
    fit_to_space,
    grid,
    num_grid_points,
    recommended,
)

if TYPE_CHECKING:
    import optuna

MAX_POPULATION = 64
MIN_POPULATION = 8
POPULATIONS_PER_STUDY = 4

SECONDS_TO_CONNECT = 10
SCHEMA_LOCK = 0x7261797377656570  # "raysweep"
RUNG = "completed_rung_"  # where Optuna's asha notes, in a trial's system attributes, what it has compared
STOPPED = "stopped"  # user attribute of a trial that its scheduler wants stopped
MEDIAN_NEEDS = 4  # trials that ran to their end, before others are compared with them


@dataclass(frozen=True)
class TrialRecord:
    """One finished trial. `final` holds the metrics it is ranked by; `error` says why there are none.

    A scheduler ended one that is `pruned`: `history` is what it reported, and it has no checkpoint.
    """

    number: int
    setting: Setting
    final: dict[str, float]
    history: list[dict[str, float]]
    checkpoint: str | None
    details: dict[str, float]
    error: str | None = None
    pruned: bool = False


def study_space(block: SearchBlock, sources: Sequence[str], encoder_name: str) -> dict[str, Dimension]:
    """The search space of a study: the block's, with `features` narrowed to what the encoder has.

    Raises:
        ConfigError: none of the feature sources asked for is one of the encoder's.
    """
    space = dict(block.space)
    if block.mode != "linear_probe":
        return space
    if "features" not in space:
        # A grid tries just the default source, so that its size is what the experiment file says.
        space["features"] = Choices(choices=tuple(sources[:1] if block.sampler == "grid" else sources))
        return space
    wanted = space["features"]
    assert isinstance(wanted, Choices)
    offered = tuple(source for source in wanted.choices if source in sources)
    if not offered:
        asked, hint = ", ".join(map(str, wanted.choices)), did_you_mean(str(wanted.choices[0]), sources)
        raise ConfigError(f"search.linear_probe.space.features: {encoder_name} has no {asked}; {hint}")
    return space | {"features": Choices(choices=offered)}


def population_size(block: SearchBlock) -> int:
    """How many trials train together: for `auto`, enough rounds that later ones learn from earlier ones."""
    if block.mode != "linear_probe":
        return 1
    if block.population != "auto":
        return min(block.population, block.num_trials)
    wanted = math.ceil(block.num_trials / POPULATIONS_PER_STUDY)
    return min(max(wanted, MIN_POPULATION), MAX_POPULATION, block.num_trials)


class Search:
    """An Optuna study with its budget: asks for settings, is told results, survives being killed.

    Args:
        store: what `open_store` takes; holds the studies of all invocations.
        name: of the study; made unique by the signature of all that its results depend on.
        block: sampler, scheduler and budget.
        space: from `study_space`.
        metric: key among a trial's final metrics that is optimised.
        direction: `maximize` or `minimize`.
        seed: of the sampler.
    """

    def __init__(
        self,
        store: Path | str,
        name: str,
        block: SearchBlock,
        space: Mapping[str, Dimension],
        metric: str,
        direction: Literal["maximize", "minimize"],
        seed: int,
    ) -> None:
        import optuna

        if block.sampler == "grid":  # an encoder that lacks a feature source has fewer points than the block
            block = block.model_copy(update={"num_trials": min(block.num_trials, num_grid_points(space))})
        self.block, self.space, self.metric, self.direction = block, dict(space), metric, direction
        self.distributions = {name: _distribution(dimension) for name, dimension in space.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self.optuna_study = optuna.create_study(
                storage=open_store(store),
                study_name=name,
                direction=direction,
                sampler=_sampler(block.sampler, seed),
                pruner=_pruner(block.scheduler),
                load_if_exists=True,
            )
        past = self.optuna_study.get_trials(deepcopy=False)
        # A resumed sampler must not draw again what it drew before.
        self.optuna_study.sampler = _sampler(block.sampler, seed + len(past))
        self._enqueue_first(past)
        self._continue_interrupted()

    def _enqueue_first(self, past: Sequence[optuna.trial.FrozenTrial]) -> None:
        """Enqueues the recommendations, or the grid, as far as they are not there: the budget may have grown."""
        failed = {record.number for record in self.records if record.error is not None}
        known = [t.system_attrs.get("fixed_params", t.params) for t in past if t.number not in failed]
        if self.block.sampler == "grid":
            first = grid(self.space)[: self.block.num_trials]
        else:
            first = [fit_to_space(setting, self.space) for setting in recommended(self.block.mode)]
        seen = {_key(setting) for setting in known}
        for setting in first:
            if _key(setting) not in seen:
                seen.add(_key(setting))
                self.optuna_study.enqueue_trial(setting)

    def _continue_interrupted(self) -> None:
        from optuna.trial import TrialState

        for trial in self.optuna_study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            if "record" in trial.user_attrs:  # it was over; what was cut short is telling so
                self._tell(trial.number, TrialRecord(**trial.user_attrs["record"]))
                continue
            self.optuna_study.tell(trial.number, state=TrialState.FAIL)
            self.optuna_study.add_trial(self._continuation(trial))

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
        trial = self.optuna_study.get_trials(deepcopy=False)[number]
        return int(trial.user_attrs.get("continues", number))

    @property
    def records(self) -> list[TrialRecord]:
        """Every trial that came to an end, failed ones included, interrupted ones not."""
        trials = self.optuna_study.get_trials(deepcopy=False)
        return [TrialRecord(**trial.user_attrs["record"]) for trial in trials if "record" in trial.user_attrs]

    @property
    def num_done(self) -> int:
        """Trials that came to an end without an error."""
        return sum(record.error is None for record in self.records)

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
        trials = self.optuna_study.get_trials(deepcopy=False)
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
        return [self.optuna_study.ask(self.distributions) for _ in range(num_trials)]

    def should_stop(self, trial: optuna.trial.Trial, history: Sequence[dict[str, float]]) -> bool:
        """Reports a trial's last epoch to the scheduler; returns whether it stops the trial.

        What is compared is the best epoch so far, since that is what a trial is ranked by in the end.
        """
        if self.block.scheduler == "none":
            return False
        step, reported = len(history), self.optuna_study.get_trials(deepcopy=False)[trial.number].last_step
        if reported is not None and step <= reported:  # a trial that goes on passes its earlier epochs on again
            return step == reported and STOPPED in trial.user_attrs
        trial.report(max(history, key=self._rank)[self.metric], step)
        stops = step < trial.params["epochs"] and trial.should_prune()
        if stops:
            trial.set_user_attr(STOPPED, True)  # a sweep that is killed before it can tell so does not train it on
        return stops

    def stopped_record(self, trial: optuna.trial.Trial, history: list[dict[str, float]]) -> TrialRecord:
        """What is known of a trial that was stopped after an epoch."""
        best = max(range(len(history)), key=lambda epoch: self._rank(history[epoch]))
        details = {
            "best_epoch": best,
            "train_seconds": sum(epoch["time/epoch_s"] for epoch in history),
            "images_per_second": statistics.median(epoch["train/images_per_second"] for epoch in history),
        }
        return TrialRecord(trial.number, dict(trial.params), history[best], history, None, details, pruned=True)

    def tell(self, trial: optuna.trial.Trial, record: TrialRecord) -> None:
        """Records a trial's end; one without a finite value failed, and is never left running."""
        trial.set_user_attr("record", vars(record))
        self._tell(trial.number, record)

    def _tell(self, number: int, record: TrialRecord) -> None:
        from optuna.trial import TrialState

        if record.pruned:
            self.optuna_study.tell(number, state=TrialState.PRUNED)  # with the last value reported
        elif self._is_usable(record):
            self.optuna_study.tell(number, record.final[self.metric])
        else:
            self.optuna_study.tell(number, state=TrialState.FAIL)

    def _is_usable(self, record: TrialRecord) -> bool:
        return record.error is None and math.isfinite(record.final.get(self.metric, math.nan))

    def best(self) -> TrialRecord:
        """The trial with the best value; among equals the one with the lowest validation loss, then the first.

        Trials that were stopped early are not chosen: there are no weights of theirs.

        Raises:
            TrialError: no trial ran to its end without an error.
        """
        records = self.records
        usable = [record for record in records if self._is_usable(record) and not record.pruned]
        if not usable:
            why = "; ".join(sorted({self._why_not(record) for record in records})[:3]) or "none was run"
            raise TrialError(f"{self.optuna_study.study_name}: no trial succeeded; {why}")
        return max(usable, key=lambda record: (self._rank(record.final), -record.number))

    def _why_not(self, record: TrialRecord) -> str:
        if record.pruned:
            return f"{self.block.scheduler} stopped some early"
        return record.error or f"{self.metric} was not a finite number"

    def _rank(self, metrics: Mapping[str, float]) -> tuple[float, float]:
        """Larger is better: the metric, then the lower validation loss, as the training loop ranks epochs."""
        sign = 1 if self.direction == "maximize" else -1
        value, loss = sign * metrics[self.metric], -metrics["val/loss"]
        return value if math.isfinite(value) else -math.inf, loss if math.isfinite(loss) else -math.inf


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


def make_record(number: int, setting: Setting, result: dict[str, Any] | None, error: str) -> TrialRecord:
    """Turns what `worker.train_worker` returned for a trial, or why it returned nothing, into a record."""
    if result is None:
        return TrialRecord(number, setting, {}, [], None, {}, error)
    details = ("best_epoch", "train_seconds", "images_per_second", "peak_memory_bytes", "peak_gpu_memory_bytes")
    return TrialRecord(
        number,
        setting,
        result["final"],
        result["history"],
        result["checkpoint"],
        {key: result[key] for key in details},
    )
