from types import SimpleNamespace

import optuna
import pytest

from raysweep.sweep.schedulers import pruner_of, stopped_result
from raysweep.training.ranking import Ranking


def epoch_of(accuracy, loss=1.0, images_per_second=50.0):
    return {
        "val/accuracy": accuracy,
        "val/loss": loss,
        "time/epoch_s": 2.0,
        "train/images_per_second": images_per_second,
    }


def test_the_result_of_a_stopped_trial_holds_its_best_epoch():
    trial = SimpleNamespace(number=7, params={"learning_rate": 0.1})
    history = [
        epoch_of(0.4, 1.0),
        epoch_of(0.6, 1.0),
        epoch_of(0.6, 0.9, 10.0),
        epoch_of(0.5, 0.1),
        epoch_of(0.6, 0.9, 99.0),
    ]
    stopped = stopped_result(trial, "study", history, Ranking("val/accuracy", "maximize"))
    assert (stopped.final, stopped.best_epoch) == (history[2], 2)
    assert (stopped.study, stopped.number, stopped.setting) == ("study", 7, {"learning_rate": 0.1})
    assert (stopped.train_seconds, stopped.images_per_second) == (10.0, 50.0)
    assert (stopped.history, stopped.pruned, stopped.checkpoint, stopped.error) == (tuple(history), True, None, None)


@pytest.mark.parametrize(
    ("scheduler", "pruner"),
    [
        ("asha", optuna.pruners.SuccessiveHalvingPruner),
        ("median", optuna.pruners.MedianPruner),
        ("none", optuna.pruners.NopPruner),
    ],
)
def test_each_scheduler_has_its_pruner(scheduler, pruner):
    assert type(pruner_of(scheduler, 1)) is pruner


@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_no_trial_is_stopped_before_the_first_rung(scheduler):
    study = optuna.create_study(direction="maximize", pruner=pruner_of(scheduler, 3))
    stopped = []
    for number in range(12):  # each is worse than all before
        trial = study.ask()
        for step in range(1, 10):
            trial.report(-number, step)
            if trial.should_prune():
                stopped.append(step)
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            study.tell(trial, -number)
    assert stopped
    assert min(stopped) == 3
