"""A study in Optuna: its next settings, the result of each trial, and the best trial.

The journal is the only record of a study: every trial that ended is in it. A resumed sweep opens it again, and starts a
new Tune run for the rest of the budget.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysweep.errors import TrialError
from raysweep.experiment.search_blocks import SearchBlock, population_size
from raysweep.experiment.space import Choices, Dimension, fit_to_space, grid, num_grid_points
from raysweep.sweep.optuna_trials import (
    CONTINUES,
    ENDED,
    RESULT,
    STOPPED,
    continuation_of,
    distribution_of,
    draw_numbers,
    folder_number_of,
    read_result,
    seconds_worked,
    setting_of,
    span_of,
)
from raysweep.sweep.schedulers import pruner_of
from raysweep.sweep.trial_store import open_store
from raysweep.training.ranking import Ranking
from raysweep.worker.job import TrialResult, field_values

if TYPE_CHECKING:
    import optuna

# Trials that TPE waits for: a quarter of the budget, so that a small one is not all chance. Optuna's default is 10.
MIN_STARTUP_TRIALS, MAX_STARTUP_TRIALS = 2, 10
MIN_TRIALS_OF_IMPORTANCE = 16  # fewer say nothing about which parameter matters
HEAD = "head"  # user attribute of a study: signature of the weights of its best head, by number of the trial


def open_optuna_study(
    store: Path | str | optuna.storages.BaseStorage,
    name: str,
    block: SearchBlock,
    space: Mapping[str, Dimension],
    ranking: Ranking,
    seed: int,
    warmup_fraction: float = 0.0,
) -> OptunaStudy:
    """Opens or creates a study, and enqueues its interrupted trials again.

    Args:
        store: holds the studies of all invocations; opened, or an argument of `open_store`.
        name: name of the study; unique, because it holds a signature of everything that the results depend on.
        block: sampler, scheduler and budget.
        space: search space from `study_space`.
        ranking: how trials are ranked.
        seed: seed of the sampler.
        warmup_fraction: share of a trial in which its learning rate rises, so that its scheduler does not judge it.

    Raises:
        ConfigError: the store cannot be used.
    """
    import optuna

    if block.sampler == "grid":  # an encoder without some feature source has fewer grid points
        block = block.model_copy(update={"num_trials": min(block.num_trials, num_grid_points(space))})
    opened = optuna.create_study(
        storage=open_store(store) if isinstance(store, Path | str) else store,
        study_name=name,
        direction=ranking.direction,
        pruner=pruner_of(block.scheduler, _first_rung(space, warmup_fraction)),
        load_if_exists=True,
    )
    study = OptunaStudy(opened, block, space, ranking, seed)
    study.continue_interrupted()
    study.enqueue_first()
    return study


class OptunaStudy:
    """An Optuna study with its budget; nothing is lost when the sweep is killed.

    Made by `open_optuna_study`, which describes the arguments.
    """

    def __init__(
        self, study: optuna.Study, block: SearchBlock, space: Mapping[str, Dimension], ranking: Ranking, seed: int
    ) -> None:
        from raysweep.sweep.sampling import SettingSampler

        self.study, self.block, self.space, self.ranking = study, block, dict(space), ranking
        self.distributions = {name: distribution_of(dimension) for name, dimension in space.items()}
        num_startup = min(MAX_STARTUP_TRIALS, max(MIN_STARTUP_TRIALS, block.num_trials // 4))
        self._sampler = SettingSampler(block.sampler, seed, self.distributions, ranking.direction, num_startup)
        self._results: dict[int, TrialResult] = {}
        self._read_results()

    def _read_results(self) -> None:
        for trial in self.study.get_trials(deepcopy=False):
            if RESULT in trial.user_attrs:
                self._results[trial.number] = read_result(trial.user_attrs[RESULT])

    def continue_interrupted(self) -> None:
        """Ends trials that an earlier invocation left running, and enqueues each again with its reported values."""
        from optuna.trial import TrialState

        trials = self.study.get_trials(deepcopy=False)
        for trial in [trial for trial in trials if trial.state == TrialState.RUNNING]:
            if trial.number in self._results:  # it had ended, but the sweep was killed before it told Optuna
                self._tell(trial.number, self._results[trial.number])
                continue
            # In this order a kill in between loses no setting. The next invocation finds the waiting trial.
            folder_number = folder_number_of(trial)
            if not any(other.user_attrs.get(CONTINUES) == folder_number for other in trials[trial.number + 1 :]):
                self.study.add_trial(continuation_of(trial))
            self.study.tell(trial.number, state=TrialState.FAIL)

    def enqueue_first(self) -> None:
        """Enqueues the recommended settings, or the grid, without those that need no trial: the budget may grow."""
        if self.block.sampler == "grid":
            first = grid(self.space)
        else:
            first = [fit_to_space(setting, self.space) for setting in self.block.mode.recommendations]
        needless = [setting_of(t) for t in self.study.get_trials(deepcopy=False) if not self._is_tried_again(t)]
        seen: dict[tuple[str, ...], set[tuple[Any, ...]]] = {}  # values of the keys of a setting, which may be a part
        # Not more than the budget, or one that waits would take the place of one that was interrupted.
        for setting in first[: self.block.num_trials]:
            names = tuple(setting)
            if names not in seen:
                seen[names] = {_values(other, names) for other in needless if other.keys() >= setting.keys()}
            if _values(setting, names) not in seen[names]:
                seen[names].add(_values(setting, names))
                self.study.enqueue_trial(setting)

    def _is_tried_again(self, trial: optuna.trial.FrozenTrial) -> bool:
        """Whether a trial leaves its setting untried: an error ended it, or it was interrupted and is over."""
        from optuna.trial import TrialState

        result = self._results.get(trial.number)
        return result.error is not None if result else trial.state == TrialState.FAIL

    @property
    def unfinished_folders(self) -> set[str]:
        """Names of the folders of trials that wait to be continued, or run."""
        trials = self.study.get_trials(deepcopy=False)
        return {str(folder_number_of(trial)) for trial in trials if not trial.state.is_finished()}

    def folder_number(self, number: int) -> int:
        """Returns the number that names a trial's folder: its own, or that of the trial that it continues."""
        return folder_number_of(self.study.get_trials(deepcopy=False)[number])

    @property
    def results(self) -> list[TrialResult]:
        """Results of all trials that ended: failed ones included, interrupted ones not."""
        return [self._results[number] for number in sorted(self._results)]

    @property
    def num_done(self) -> int:
        """Number of trials that ended without an error."""
        return sum(result.error is None for result in self.results)

    @property
    def num_remaining(self) -> int:
        """Number of trials left in the budget; the next invocation tries failed trials again.

        0 when all invocations together have spent the time budget, unless no trial has succeeded.
        """
        num_done = self.num_done
        budget = self.block.time_budget_s
        if num_done and budget is not None and self.seconds_spent >= budget:
            return 0
        return max(0, self.block.num_trials - num_done)

    def times(self) -> dict[int, tuple[float | None, float | None]]:
        """Returns when each trial that ended started and ended, in seconds since 1970; None where it is not known."""
        trials = self.study.get_trials(deepcopy=False)
        return {number: span_of(trials[number]) for number in self._results}

    @property
    def seconds_spent(self) -> float:
        """Time that was worked, over all invocations."""
        return seconds_worked(self.study.get_trials(deepcopy=False), self._results)

    def ask(self, num_trials: int) -> list[optuna.trial.Trial]:
        """Draws the settings of a Population, or of the rest of one that was interrupted."""
        if not num_trials:
            return []
        from optuna.samplers import PartialFixedSampler, RandomSampler
        from optuna.trial import TrialState

        trials = self.study.get_trials(deepcopy=False)
        draws = draw_numbers(trials)
        num_draws = len(set(draws))
        waiting = [trial for trial in trials if trial.state == TrialState.WAITING]
        if any(CONTINUES in trial.user_attrs for trial in waiting):
            # Further settings would have been drawn from the results of these.
            num_trials = min(num_trials, len(waiting) + -num_draws % population_size(self.block))
        self._sampler.start(sorted(trials, key=lambda trial: draws[trial.number]))
        asked = []
        for place in range(num_trials):
            given = waiting[place] if place < len(waiting) else None
            setting = setting_of(given) if given else {}
            if self.distributions.keys() <= setting.keys():
                self._sampler.add(setting)
            else:
                setting = self._sampler.draw(draws[given.number] if given else num_draws) | setting
                num_draws += given is None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # this sampler is experimental
                self.study.sampler = PartialFixedSampler(setting, RandomSampler(seed=0))
            asked.append(self.study.ask(self.distributions))
        return asked

    def head_weights(self, trial: int) -> str | None:
        """Returns the signature that `keep_head_weights` has kept for the head of a trial; None if there is none."""
        found: str | None = self.study.user_attrs.get(HEAD, {}).get(str(trial))
        return found

    def keep_head_weights(self, trial: int, weights: str) -> None:
        """Keeps the signature of the weights of a trial's head."""
        self.study.set_user_attr(HEAD, {str(trial): weights})

    def should_stop(self, trial: optuna.trial.Trial, history: Sequence[Mapping[str, float]]) -> bool:
        """Reports a trial's last epoch to the scheduler; returns whether it stops the trial.

        The reported value is that of the best epoch so far, because the best epoch ranks the trial in the end.
        """
        if self.block.scheduler == "none" or self.ranking.metric not in history[-1]:
            return False
        step, reported = len(history), self.study.get_trials(deepcopy=False)[trial.number].last_step
        if reported is not None and step <= reported:  # a continued trial passes its earlier epochs on again
            return step == reported and STOPPED in trial.user_attrs
        trial.report(max(history, key=self.ranking.key)[self.ranking.metric], step)
        stops = step < trial.params["epochs"] and trial.should_prune()
        if stops:
            trial.set_user_attr(STOPPED, True)  # after a kill, the next sweep does not train it further
        return stops

    def tell(self, trial: optuna.trial.Trial, result: TrialResult) -> None:
        """Records the end of a trial. A trial without a finite value fails, so that none stays RUNNING."""
        trial.set_user_attr(RESULT, field_values(result) | {ENDED: time.time()})
        self._results[trial.number] = result
        self._tell(trial.number, result)

    def _tell(self, number: int, result: TrialResult) -> None:
        from optuna.trial import TrialState

        if result.pruned:
            self.study.tell(number, state=TrialState.PRUNED)  # with the last reported value
        elif self.ranking.is_usable(trained := self._trained(result)):
            self.study.tell(number, trained[self.ranking.metric])
        else:
            self.study.tell(number, state=TrialState.FAIL)

    def _trained(self, result: TrialResult) -> Mapping[str, float]:
        """Returns the metrics that the sampler learns from. The start is the same for all trials."""
        if result.error is not None:
            return {}
        if result.best_epoch >= 0 or not result.history:
            return result.final
        return max(result.history, key=self.ranking.key)

    def is_usable(self, result: TrialResult) -> bool:
        """Whether a trial has a finite value to be ranked by."""
        return result.error is None and self.ranking.is_usable(result.final)

    def best(self) -> TrialResult:
        """Returns the trial with the best value; the lowest validation loss, then the lowest number break ties.

        Trials that were stopped early are left out, because their weights are deleted.

        Raises:
            TrialError: no trial ran to its end without an error.
        """
        results = self.results
        usable = [result for result in results if self.is_usable(result) and not result.pruned]
        if not usable:
            why = "; ".join(sorted({self._reason_unusable(result) for result in results})[:3]) or "none was run"
            raise TrialError(f"{self.study.study_name}: no trial succeeded; {why}")
        return max(usable, key=lambda result: (self.ranking.key(result.final), -result.number))

    def importances(self) -> dict[str, float]:
        """Returns how much each hyperparameter decides whether a trial is among the best; the shares add up to 1.

        By PED-ANOVA (Watanabe et al. 2023), which takes milliseconds; Optuna's default takes seconds for 64 trials.
        Empty for few trials, or where their values are all alike.
        """
        from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
        from optuna.trial import TrialState

        values = {trial.value for trial in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))}
        if len(values) < 2 or self.num_done < MIN_TRIALS_OF_IMPORTANCE:
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # this evaluator is experimental
            found = get_param_importances(self.study, evaluator=PedAnovaImportanceEvaluator())
        return {name: float(share) for name, share in found.items()}

    def _reason_unusable(self, result: TrialResult) -> str:
        if result.pruned:
            return f"{self.block.scheduler} stopped some early"
        return result.error or f"{self.ranking.metric} was not a finite number"


def _first_rung(space: Mapping[str, Dimension], warmup_fraction: float) -> int:
    """Returns the epoch after which trials are first compared: the first one after the warm-up."""
    epochs = space["epochs"]
    num_epochs = max(epochs.choices, key=float) if isinstance(epochs, Choices) else epochs.high
    return math.ceil(float(num_epochs) * warmup_fraction) + 1


def _values(setting: Mapping[str, Any], names: Iterable[str]) -> tuple[Any, ...]:
    return tuple(setting[name] for name in names)
