import math
import pickle
from dataclasses import FrozenInstanceError

import pytest

from raysweep.training.ranking import Ranking

FIRST, LOWER, HIGHER = (
    {"val/accuracy": accuracy, "val/loss": loss} for accuracy, loss in ((0.5, 2.0), (0.5, 1.0), (0.6, 9.0))
)
DIRECTIONS = ("maximize", "minimize")


def ranked(ranking, *candidates, **more):
    """Places of the candidates, the best first."""
    return sorted(range(len(candidates)), key=lambda index: ranking.key(candidates[index], **more), reverse=True)


def test_the_metric_and_its_direction_decide():
    assert ranked(Ranking(), LOWER, HIGHER) == [1, 0], "whatever the loss is"
    assert ranked(Ranking("val/accuracy", "minimize"), LOWER, HIGHER) == [0, 1]
    assert ranked(Ranking("val/loss", "minimize"), FIRST, LOWER, HIGHER) == [1, 0, 2]
    assert ranked(Ranking("val/loss", "maximize"), FIRST, LOWER, HIGHER) == [2, 0, 1]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_ties_go_to_the_lower_loss(direction):
    ranking = Ranking("val/accuracy", direction)
    assert ranking.key(LOWER) > ranking.key(FIRST)
    assert ranking.key(FIRST) == ranking.key(dict(FIRST)), "the caller decides between these"


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_another_metric_can_decide_between_equals(direction):
    ranking = Ranking("val/accuracy", direction)
    rough, fine = ({"val/accuracy": 0.5, "val/loss": 1 - error, "squared_error": error} for error in (0.4, 0.3))
    assert ranked(ranking, rough, fine) == [0, 1]
    assert ranked(ranking, rough, fine, tie_breaker="squared_error") == [1, 0]
    assert ranking.key({"val/accuracy": 0.5, "squared_error": 0.4}, "squared_error")[0] == ranking.key(FIRST)[0]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_comes_last(direction, broken):
    ranking = Ranking("val/accuracy", direction)
    without_value, without_loss = {"val/accuracy": broken, "val/loss": 0.1}, {"val/accuracy": 0.5, "val/loss": broken}
    assert ranking.key(without_value) < ranking.key(FIRST)
    assert ranking.key(without_loss) < ranking.key(FIRST)
    assert ranking.key(without_value) < ranking.key(without_loss)
    assert not any(math.isnan(value) for value in ranking.key(without_value) + ranking.key(without_loss))


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_what_can_be_ranked_by(broken):
    assert Ranking().is_usable({"val/accuracy": 0.5})
    assert Ranking().is_usable({"val/accuracy": 0.5, "val/loss": broken})
    assert not Ranking().is_usable({"val/accuracy": broken, "val/loss": 0.1})
    assert not Ranking("val/loss", "minimize").is_usable({"val/accuracy": 0.5, "val/loss": broken})
    assert not Ranking().is_usable({"val/loss": 0.1}), "as of a trial that has failed"


def test_a_metric_that_is_missing_is_not_ranked_as_if_it_were_bad():
    with pytest.raises(KeyError):
        Ranking("val/macro_f1").key(FIRST)


def test_without_the_tie_breaker_a_tie_is_lost():
    assert ranked(Ranking(), {"val/accuracy": 0.5}, FIRST) == [1, 0]
    assert ranked(Ranking(), LOWER, {"val/accuracy": 0.6}) == [1, 0]


def test_a_ranking_is_a_value():
    ranking = Ranking("val/loss", "minimize")
    assert pickle.loads(pickle.dumps(ranking)) == ranking == Ranking("val/loss", "minimize") != Ranking()
    with pytest.raises(FrozenInstanceError):
        ranking.metric = "val/accuracy"


@pytest.mark.parametrize(
    ("studies", "trials"),
    [
        (Ranking(), Ranking("val/loss", "minimize")),
        (Ranking("val/macro_f1"), Ranking("val/macro_f1")),
        (Ranking("val/loss", "minimize"), Ranking("val/loss", "minimize")),
    ],
)
def test_within_a_study_accuracy_gives_way_to_loss(studies, trials):
    assert studies.within_study == trials
