from datetime import datetime

import pytest
from jobs import make_result, make_trial
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from raysweep.experiment.space import Choices, FloatRange, IntRange
from raysweep.sweep.optuna_trials import continuation_of, distribution_of, draw_numbers, seconds_worked


def trial_of(number, *, start=None, end=None, continues=None, **keys):
    """A trial as Optuna keeps it; times are seconds."""
    attributes = {} if continues is None else {"continues": continues}
    trial = create_trial(state=TrialState.WAITING, user_attrs=attributes | keys.pop("user_attrs", {}), **keys)
    trial.number = number
    trial.datetime_start = None if start is None else datetime.fromtimestamp(start)
    if end is not None:
        trial.set_user_attr("record", {"ended": float(end)})
    return trial


@pytest.mark.parametrize(
    ("dimension", "distribution"),
    [
        (Choices(choices=(1, 2)), CategoricalDistribution((1, 2))),
        (FloatRange(low=0.1, high=1.0, log=True), FloatDistribution(0.1, 1.0, log=True)),
        (IntRange(low=1, high=8), IntDistribution(1, 8)),
    ],
)
def test_each_dimension_has_its_distribution(dimension, distribution):
    assert distribution_of(dimension) == distribution


def test_continuations_have_the_number_of_their_first_draw():
    trials = [trial_of(0), trial_of(1), trial_of(2, continues=0), trial_of(3), trial_of(4, continues=0)]
    assert draw_numbers(trials) == [0, 1, 0, 2, 0]


def test_a_continuation_has_all_that_was_compared_and_the_first_folder():
    system = {"fixed_params": {"epochs": 3}, "completed_rung_0": 0.5, "other": 1}
    killed = trial_of(5, continues=2, user_attrs={"stopped": True, "record": {}}, system_attrs=system)
    killed.intermediate_values = {1: 0.5}
    again = continuation_of(killed)
    assert again.state == TrialState.WAITING
    assert again.user_attrs == {"continues": 2, "stopped": True}
    assert again.system_attrs == {"fixed_params": {"epochs": 3}, "completed_rung_0": 0.5}
    assert again.intermediate_values == {1: 0.5}


def test_time_counts_once_and_only_of_trials_that_ended():
    trials = [
        trial_of(0, start=100, end=110),
        trial_of(1, start=105, end=120),  # at the same time as the first
        trial_of(2, start=130),  # killed
        trial_of(3, start=200, end=203, continues=2),  # trained 8 seconds, of which 5 before the kill
    ]
    results = {number: make_result(make_trial(number), train_seconds=8.0) for number in (0, 1, 3)}
    assert seconds_worked(trials, results) == 20 + 8
