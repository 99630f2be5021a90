"""Trials as Optuna keeps them: their attributes, their settings and results, and the time that they took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from raysweep.experiment.space import Choices, Dimension, FloatRange, Setting
from raysweep.worker.job import TrialResult

if TYPE_CHECKING:
    import optuna

RUNG_PREFIX = "completed_rung_"  # prefix of the system attributes in which Optuna's ASHA stores compared values
STOPPED = "stopped"  # user attribute of a trial that its scheduler stops
RESULT = "record"  # user attribute of a trial that has ended: its TrialResult, and when it ended
ENDED = "ended"  # the latter's key: `time.time()`
CONTINUES = "continues"  # user attribute: number of the interrupted trial that a trial continues


def distribution_of(dimension: Dimension) -> optuna.distributions.BaseDistribution:
    """Returns Optuna's distribution of a hyperparameter."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(dimension, Choices):
        return CategoricalDistribution(dimension.choices)
    if isinstance(dimension, FloatRange):
        return FloatDistribution(dimension.low, dimension.high, log=dimension.log)
    return IntDistribution(dimension.low, dimension.high, log=dimension.log)


def read_result(values: Mapping[str, Any]) -> TrialResult:
    """Reads a result from Optuna's journal. In version 0.1 it has no study, and its costs are under `details`."""
    found = {"study": "", **values, **values.get("details", {}), "history": tuple(values["history"])}
    found.pop("details", None)
    found.pop(ENDED, None)
    return TrialResult(**found)


def setting_of(trial: optuna.trial.FrozenTrial) -> Setting:
    """Returns what is known of a trial's setting: what was enqueued, and what was drawn."""
    return {**trial.system_attrs.get("fixed_params", {}), **trial.params}


def folder_number_of(trial: optuna.trial.FrozenTrial) -> int:
    """Returns the number that names a trial's folder: its own, or that of the trial that it continues."""
    return int(trial.user_attrs.get(CONTINUES, trial.number))


def continuation_of(trial: optuna.trial.FrozenTrial) -> optuna.trial.FrozenTrial:
    """Returns a waiting trial as from `enqueue_trial`, plus the reported values: no epoch is compared twice."""
    from optuna.trial import TrialState, create_trial

    rungs = {name: value for name, value in trial.system_attrs.items() if name.startswith(RUNG_PREFIX)}
    return create_trial(
        state=TrialState.WAITING,
        system_attrs={"fixed_params": setting_of(trial), **rungs},
        user_attrs={
            CONTINUES: folder_number_of(trial),
            **{name: True for name in (STOPPED,) if name in trial.user_attrs},
        },
        intermediate_values=trial.intermediate_values,
    )


def draw_numbers(trials: Sequence[optuna.trial.FrozenTrial]) -> list[int]:
    """Returns the number of each trial in a sweep that nobody interrupted: continuations have that of their first."""
    numbers: list[int] = []
    num_continuations = 0
    for trial in trials:
        first = trial.user_attrs.get(CONTINUES)
        numbers.append(trial.number - num_continuations if first is None else numbers[first])
        num_continuations += first is not None
    return numbers


def seconds_worked(trials: Iterable[optuna.trial.FrozenTrial], results: Mapping[int, TrialResult]) -> float:
    """Returns the wall time with a running trial; parallel trials count once.

    Of an interrupted trial, the epochs that its continuation did not train again count.

    Args:
        trials: trials of all invocations.
        results: results of those that ended, by number.
    """
    spans = []
    for trial in trials:
        if (result := results.get(trial.number)) is None or trial.datetime_start is None:
            continue
        complete = trial.datetime_complete.timestamp() if trial.datetime_complete else 0.0
        end = float(trial.user_attrs[RESULT].get(ENDED, complete))
        seconds = end - trial.datetime_start.timestamp()
        if CONTINUES in trial.user_attrs:
            seconds = max(seconds, result.train_seconds)
        spans.append((end - seconds, end))
    return _covered(spans)


def span_of(trial: optuna.trial.FrozenTrial) -> tuple[float | None, float | None]:
    """Returns when a trial started and ended, in seconds since 1970; None where it is not known."""
    started, completed = trial.datetime_start, trial.datetime_complete
    ended = trial.user_attrs.get(RESULT, {}).get(ENDED, completed.timestamp() if completed else None)
    return started.timestamp() if started else None, ended


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Returns the length of the union of spans of time."""
    seconds, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        seconds += max(0.0, end - max(start, until))
        until = max(until, end)
    return seconds
