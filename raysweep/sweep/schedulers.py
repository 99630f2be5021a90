"""Schedulers of trials: Optuna's pruner, and the result of a trial that it stopped."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from raysweep.experiment.space import Scheduler
from raysweep.training.ranking import Ranking
from raysweep.worker.job import TrialResult

if TYPE_CHECKING:
    import optuna

MEDIAN_STARTUP_TRIALS = 4  # trials that must run to their end before others are compared with them


def pruner_of(scheduler: Scheduler, first_rung: int) -> optuna.pruners.BasePruner:
    """Returns Optuna's pruner of a scheduler. ASHA: Li et al. 2020; median stopping rule: Golovin et al. 2017.

    Args:
        scheduler: `asha`, `median` or `none`.
        first_rung: number of epochs after which trials are first compared. In a warm-up the lowest rates look best.
    """
    import optuna

    if scheduler == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=first_rung, reduction_factor=3)
    if scheduler == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=MEDIAN_STARTUP_TRIALS, n_warmup_steps=first_rung)
    return optuna.pruners.NopPruner()


def stopped_result(
    trial: optuna.trial.Trial, study: str, history: Sequence[Mapping[str, float]], ranking: Ranking
) -> TrialResult:
    """Returns the result of a trial that its scheduler stopped, from its epochs so far."""
    best = max(range(len(history)), key=lambda epoch: ranking.key(history[epoch]))
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
