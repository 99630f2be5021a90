import pytest
from pydantic import ValidationError

from raysweep.experiment.space import (
    Choices,
    FloatRange,
    IntRange,
    fit_to_space,
    num_grid_points,
    read_dimension,
)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("epochs", 10, Choices(choices=(10,))),
        ("epochs", {"low": 5, "high": 50}, IntRange(low=5, high=50)),
        ("learning_rate", {"low": 1e-4, "high": 1, "log": True}, FloatRange(low=1e-4, high=1.0, log=True)),
        ("features", "cls", Choices(choices=("cls",))),
        ("features", {"choices": ["cls", "cls+mean"]}, Choices(choices=("cls", "cls+mean"))),
        ("weight_decay", 0, Choices(choices=(0.0,))),
    ],
)
def test_read_dimension(name, value, expected):
    assert read_dimension(name, value) == expected


def test_a_whole_learning_rate_becomes_a_float():
    (rate,) = read_dimension("learning_rate", 1).choices
    assert type(rate) is float


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0),
        ("learning_rate", {"low": 0.1, "high": 0.1}),
        ("learning_rate", {"low": 0.1, "high": 0.01}),
        ("learning_rate", {"low": float("nan"), "high": 1}),
        ("learning_rate", {"low": 1e-4, "high": float("inf")}),
        ("learning_rate", "fast"),
        ("learning_rate", True),
        ("weight_decay", -0.1),
        ("weight_decay", {"low": 0, "high": 0.1, "log": True}),
        ("layer_decay", 1.01),
        ("layer_decay", {"low": 0.5, "high": 1.5}),
        ("epochs", 2.5),
        ("epochs", {"low": 0, "high": 5}),
        ("epochs", {"low": 1, "high": 5.5}),
        ("epochs", {"low": 1, "high": 5, "choices": [1]}),
        ("epochs", {"choices": []}),
        ("epochs", {"choices": [3, 3]}),
        ("epochs", None),
        ("features", ["cls"]),
        ("features", "patches"),
        ("normalize", {"low": 1, "high": 2}),
    ],
)
def test_wrong_dimensions_are_refused(name, value):
    with pytest.raises((ValidationError, ValueError)):
        read_dimension(name, value)


def test_weight_decay_may_be_zero_without_log():
    assert read_dimension("weight_decay", {"low": 0, "high": 0.1}) == FloatRange(low=0.0, high=0.1)


def test_fit_to_space_clips_rounds_and_snaps():
    space = {
        "learning_rate": FloatRange(low=1e-2, high=1e-1),
        "epochs": IntRange(low=2, high=8),
        "weight_decay": Choices(choices=(0.0, 0.1)),
        "features": Choices(choices=("mean", "cls")),
        "normalize": Choices(choices=("l2",)),
    }
    setting = {"learning_rate": 3e-3, "epochs": 15, "weight_decay": 0.02, "normalize": "standardize", "layer_decay": 1}
    fitted = {"learning_rate": 1e-2, "epochs": 8, "weight_decay": 0.0, "features": "mean", "normalize": "l2"}
    assert fit_to_space(setting, space) == fitted


def test_fit_to_space_leaves_unset_ranges_to_the_sampler():
    assert fit_to_space({}, {"epochs": IntRange(low=1, high=3)}) == {}


def test_counting_a_huge_grid_does_not_list_it():
    assert num_grid_points({"epochs": IntRange(low=1, high=10**12)}) == 10**12
