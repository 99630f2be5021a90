import pytest
from pydantic import ValidationError

from raysweep.errors import ConfigError
from raysweep.experiment.modes import MODES
from raysweep.experiment.search_blocks import (
    FineTuneSearch,
    FromScratchSearch,
    LinearProbeSearch,
    SearchBlock,
    SearchConfig,
    complete_space,
    population_size,
    study_space,
)
from raysweep.experiment.space import Choices, FloatRange, IntRange, grid, num_grid_points
from raysweep.experiment.studies import BASELINES

LINEAR_PROBE, FINE_TUNE, FROM_SCRATCH = MODES["linear_probe"], MODES["fine_tune"], MODES["from_scratch"]
SOURCES = ["cls", "cls+mean"]


def probe(**keys):
    return LinearProbeSearch.model_validate(keys)


# Blocks


def test_each_mode_has_a_block_under_its_name():
    assert list(SearchConfig.model_fields) == list(MODES)
    for mode in MODES.values():
        block = SearchConfig().block(mode)
        assert isinstance(block, SearchBlock)
        assert block.mode is mode
        assert block.num_trials == mode.num_trials
        assert block.space == mode.default_space


def test_all_baselines_are_fitted_by_default():
    assert LinearProbeSearch().baselines == BASELINES == ("knn", "ridge", "logistic")


@pytest.mark.parametrize("block", [FineTuneSearch, FromScratchSearch])
def test_trials_with_a_run_of_their_own_are_no_population(block):
    assert block(population=1).population == 1
    with pytest.raises(ValidationError, match="only heads of linear_probe train together, found 2; leave it out"):
        block(population=2)


# Completed spaces


def test_complete_space_keeps_what_is_given_and_fills_the_rest():
    given = {"epochs": Choices(choices=(7,))}
    space = complete_space(FINE_TUNE, given, "tpe")
    assert space == {**FINE_TUNE.default_space, **given}
    assert list(space) == ["learning_rate", "epochs", "weight_decay", "layer_decay", "augmentation_strength"]


def test_grid_fixes_default_ranges_at_the_recommendation():
    given = {"learning_rate": Choices(choices=(0.1, 0.01)), "epochs": IntRange(low=3, high=5)}
    space = complete_space(LINEAR_PROBE, given, "grid")
    assert space["weight_decay"] == Choices(choices=(1e-4,))
    points = grid(space)
    assert len(points) == num_grid_points(space) == 2 * 3 * 2
    assert points[0] == {"learning_rate": 0.1, "epochs": 3, "weight_decay": 1e-4, "normalize": "none"}
    assert len({tuple(point.items()) for point in points}) == len(points)


def test_grid_refuses_a_range_of_real_numbers():
    given = {"learning_rate": FloatRange(low=0.1, high=0.2), "weight_decay": FloatRange(low=0.1, high=0.2)}
    with pytest.raises(ValidationError) as error:
        complete_space(LINEAR_PROBE, given, "grid")
    assert [detail["loc"] for detail in error.value.errors()] == [("learning_rate",), ("weight_decay",)]


@pytest.mark.parametrize(("mode", "expected"), [(FINE_TUNE, 20), (FROM_SCRATCH, 60)])
@pytest.mark.parametrize("sampler", ["tpe", "grid"])
def test_a_scheduler_has_every_trial_train_as_long(mode, sampler, expected):
    space = complete_space(mode, {"learning_rate": Choices(choices=(0.1,))}, sampler, "asha")
    assert space["epochs"] == Choices(choices=(expected,))
    assert complete_space(mode, space, sampler, "asha") == space, "as it is read from the resolved YAML"
    assert complete_space(mode, {"epochs": Choices(choices=(7,))}, "tpe", "median")["epochs"].choices == (7,)


@pytest.mark.parametrize("epochs", [IntRange(low=3, high=5), Choices(choices=(3, 5))])
def test_a_scheduler_refuses_schedules_of_several_lengths(epochs):
    with pytest.raises(ValidationError, match=r"asha compares trials epoch by epoch.*epochs: 5") as error:
        complete_space(FINE_TUNE, {"epochs": epochs}, "tpe", "asha")
    assert [detail["loc"] for detail in error.value.errors()] == [("epochs",)]


# Studies


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (probe(num_trials=64), 16),
        (probe(num_trials=16), 8),
        (probe(num_trials=5), 5),
        (probe(num_trials=1000), 64),
        (probe(num_trials=64, population=3), 3),
        (probe(num_trials=2, population=3), 2),
        (FineTuneSearch(num_trials=8), 1),
        (FromScratchSearch(), 1),
    ],
)
def test_population_sizes(block, expected):
    assert population_size(block) == expected


def test_features_are_those_that_the_encoder_has():
    assert study_space(probe(), SOURCES, "dinov2")["features"].choices == ("cls", "cls+mean")
    grid = probe(sampler="grid", space={"learning_rate": 0.1})
    assert study_space(grid, SOURCES, "dinov2")["features"].choices == ("cls",)
    asked = probe(space={"features": {"choices": ["pooler", "cls+mean"]}})
    assert study_space(asked, SOURCES, "dinov2")["features"].choices == ("cls+mean",)
    assert "features" not in study_space(FineTuneSearch(), SOURCES, "dinov2")
    assert "augmentation_strength" in study_space(FineTuneSearch(), SOURCES, "dinov2")
    assert "augmentation_strength" not in study_space(FineTuneSearch(), SOURCES, "dinov2", augments=False)


def test_features_that_the_encoder_lacks_are_refused():
    asked = probe(space={"features": {"choices": ["pooler", "projected"]}})
    with pytest.raises(ConfigError) as error:
        study_space(asked, SOURCES, "dinov2-small")
    assert str(error.value) == (
        "search.linear_probe.space.features: dinov2-small has no pooler, projected; accepted: cls, cls+mean"
    )
