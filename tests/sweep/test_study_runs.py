from types import SimpleNamespace

import pytest

from raysweep.sweep.study_runs import run_name


@pytest.mark.parametrize(
    ("shots", "setting", "name"),
    [
        ("all", None, "dinov2 · fine_tune"),
        ("all", {"learning_rate": 3.1e-5, "epochs": 8}, "dinov2 · fine_tune · lr 3.1e-05 · 8 epochs"),
        ("all", {"weight_decay": 0.1}, "dinov2 · fine_tune"),
        (5, {"epochs": 8}, "5 shots · dinov2 · fine_tune · 8 epochs"),
    ],
)
def test_a_run_is_called_by_what_it_is(shots, setting, name):
    config = SimpleNamespace(shots=shots, encoder_name="dinov2", kind="fine_tune")
    assert run_name(config, setting) == name
