import copy
import pickle
from dataclasses import fields
from typing import get_args, get_type_hints

import pytest

from raysweep.experiment.modes import MODES, Mode, ModeName
from raysweep.experiment.space import RULES, Choices, fit_to_space

every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


def test_the_table_holds_every_mode_under_its_name_in_the_order_of_running():
    assert tuple(MODES) == get_args(ModeName) == ("linear_probe", "fine_tune", "from_scratch")
    assert [mode.name for mode in MODES.values()] == list(MODES)


def test_a_probe_runs_before_the_modes_that_start_from_it():
    names = list(MODES)
    probes = [names.index(mode.name) for mode in MODES.values() if mode.reads == "features"]
    started = [names.index(mode.name) for mode in MODES.values() if mode.starts_from == "best_head"]
    assert max(probes) < min(started)


@every_mode
def test_only_words_that_the_types_list_are_used(mode):
    hints = get_type_hints(Mode)
    for name in ("name", "reads", "trains", "starts_from"):
        assert getattr(mode, name) in get_args(hints[name])


@every_mode
def test_what_trains_on_features_trains_the_head_only(mode):
    reads_features = mode.reads == "features"
    assert (mode.trains == "head") == reads_features
    assert ("features" in mode.dimensions) == reads_features
    assert mode.trains_together == reads_features


@every_mode
def test_recommendations_lie_in_the_default_space(mode):
    assert set(mode.default_space) <= set(mode.dimensions)
    assert mode.recommendations
    for setting in mode.recommendations:
        assert fit_to_space(setting, mode.default_space) == setting
        assert set(setting) == set(mode.default_space)


@every_mode
def test_dimensions_have_rules_and_the_defaults_keep_them(mode):
    assert set(mode.dimensions) <= set(RULES)
    for name, dimension in mode.default_space.items():
        ends = dimension.choices if isinstance(dimension, Choices) else (dimension.low, dimension.high)
        assert [RULES[name].complaint(value) for value in ends] == [None] * len(ends)


@every_mode
def test_every_mode_searches_the_learning_rate_and_the_epochs(mode):
    assert {"learning_rate", "epochs"} <= set(mode.default_space)


def test_probe_default_leaves_features_to_the_encoder():
    assert "features" not in MODES["linear_probe"].default_space


def test_modes_are_frozen_and_survive_being_sent_to_another_process():
    mode = MODES["fine_tune"]
    with pytest.raises(AttributeError):
        mode.num_trials = 1
    assert pickle.loads(pickle.dumps(mode)) == copy.deepcopy(mode) == mode
    assert {pickle.loads(pickle.dumps(mode)): 1}[mode] == 1
    assert len({hash(mode) for mode in MODES.values()}) == len(MODES)
    assert all(field.name in Mode.__slots__ for field in fields(Mode))
