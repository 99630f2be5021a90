"""Draws the settings of a study's trials.

A setting depends on the seed, on the number of its draw and on the results so far, and on nothing else: a sweep that
was killed draws what it would have drawn. Trials that run side by side end in any order, so theirs may differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from raysweep.experiment.metrics import Direction
from raysweep.experiment.space import Setting

# TPE compares a new setting with at most so many trials, or each of thousands would take longer than the one before.
MAX_COMPARED = 250
MAX_BEST = 25  # TPE models the best tenth, at most 25 trials, apart from the others


class SettingSampler:
    """Draws settings for one round of questions.

    Args:
        kind: `tpe`, `random` or `grid`. All settings of a grid are enqueued; what they leave open is random.
        seed: seed of the study.
        distributions: Optuna's distribution of each hyperparameter.
        direction: `maximize` or `minimize`.
        num_startup: number of trials that must have ended before TPE draws; until then, settings are random.
    """

    def __init__(
        self,
        kind: str,
        seed: int,
        distributions: Mapping[str, BaseDistribution],
        direction: Direction,
        num_startup: int,
    ) -> None:
        self._kind, self._seed, self._direction, self._num_startup = kind, seed, direction, num_startup
        self._distributions = dict(distributions)
        self._study = optuna.create_study(direction=direction)

    def start(self, trials: Sequence[FrozenTrial]) -> None:
        """Begins a round: later draws learn from these trials, which are in the order of their draws."""
        self._study = optuna.create_study(direction=self._direction)
        if self._kind == "tpe":
            self._study.add_trials([self._without_details(trial) for trial in self._compared(trials)])

    def draw(self, number: int) -> Setting:
        """Returns the setting of a draw. Until the next `start` it counts as running."""
        seed = int.from_bytes(hashlib.sha256(f"{self._seed}/{number}".encode()).digest()[:4], "big")
        if self._kind == "tpe":
            self._study.sampler = _Tpe(seed, self._distributions, self._num_startup)
        else:
            self._study.sampler = optuna.samplers.RandomSampler(seed=seed)
        return dict(self._study.ask(self._distributions).params)

    def add(self, setting: Mapping[str, Any]) -> None:
        """Adds a running trial whose setting was given."""
        if self._kind == "tpe":
            running = create_trial(state=TrialState.RUNNING, params=dict(setting), distributions=self._distributions)
            self._study.add_trial(running)

    def _compared(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Returns the trials that TPE learns from: the best and the latest, and those that run."""
        ended = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
        chosen = {trial.number for trial in ended[-(MAX_COMPARED - MAX_BEST) :]}
        if len(ended) > MAX_COMPARED:
            chosen |= {trial.number for trial in sorted(ended, key=self._badness)[:MAX_BEST]}
        else:
            chosen = {trial.number for trial in ended}
        return [trial for trial in trials if trial.number in chosen or trial.state == TrialState.RUNNING]

    def _badness(self, trial: FrozenTrial) -> tuple[bool, float]:
        """Returns a sort key: the smallest is the best; as in TPE, trials that were stopped early come last."""
        value = trial.value if trial.value is not None else float("inf")
        return trial.state == TrialState.PRUNED, -value if self._direction == "maximize" else value

    def _without_details(self, trial: FrozenTrial) -> FrozenTrial:
        """Returns what TPE reads of a trial. Optuna copies trials, and their results are long."""
        names = self._distributions.keys() & trial.params.keys()
        return create_trial(
            state=trial.state,
            value=trial.value if trial.state == TrialState.COMPLETE else None,
            params={name: trial.params[name] for name in self._distributions if name in names},
            distributions={name: self._distributions[name] for name in self._distributions if name in names},
            intermediate_values=trial.intermediate_values,
        )


class _Tpe(optuna.samplers.TPESampler):
    """TPE whose search space is given: Optuna's would find it anew in the trials, at every draw."""

    def __init__(self, seed: int, distributions: Mapping[str, BaseDistribution], num_startup: int) -> None:
        # The constant liar makes the settings of a Population differ, although all are asked for at once.
        super().__init__(seed=seed, constant_liar=True, n_startup_trials=num_startup)
        self._given = {name: one for name, one in distributions.items() if not one.single()}

    def infer_relative_search_space(
        self,
        study: optuna.Study,  # noqa: ARG002
        trial: FrozenTrial,  # noqa: ARG002
    ) -> dict[str, BaseDistribution]:
        """Returns the distributions to draw from together."""
        return self._given
