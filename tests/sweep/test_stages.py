from types import SimpleNamespace

import pytest

from raysweep.sweep import stages
from raysweep.sweep import tune_run as searcher
from raysweep.errors import ConfigError
from raysweep.experiment.config import Experiment
from raysweep.cluster.resources import Resources


def context_of(nodes=((2, 0),), **keys):
    """A sweep on a cluster whose nodes are those of a list that a test may change."""
    experiment = Experiment.model_validate(
        {"name": "x", "data": {"source": "s"}, "encoders": [{"type": "stacked_cnn"}], **keys}
    )

    class Ray:
        @property
        def resources_now(self):
            return Resources(sum(cpus for cpus, _ in nodes), 0, tuple(nodes))

    def encoder(config):
        raise AssertionError("an encoder was loaded first")

    said = []
    return SimpleNamespace(
        experiment=experiment, encoder=encoder, ray=Ray(), resources=Ray().resources_now, said=said,
        paths=SimpleNamespace(tune=None), progress=SimpleNamespace(warn=said.append),
    )  # fmt: skip


def test_a_database_that_cannot_be_used_shows_before_anything_is_made(monkeypatch):
    def refuse(store):
        raise ConfigError(f"tracking.optuna_uri: {store}")

    monkeypatch.setattr(stages, "open_store", refuse)
    with pytest.raises(ConfigError, match=r"tracking.optuna_uri: postgresql://h/x"):
        stages.check_studies(context_of(tracking={"optuna_uri": "postgresql://h/x"}))


@pytest.fixture
def num_runs(monkeypatch):
    """Begins a stage; returns what tells how many pieces of work go on at a time."""

    def begin(context):
        found = {}
        monkeypatch.setattr(searcher, "run_groups", lambda *_, **options: found.update(options))
        group = SimpleNamespace(
            first=SimpleNamespace(encoder=SimpleNamespace(load_ahead=lambda: None)), reserved_cpus=0
        )
        stages.run_stage(context, [group])
        return found["num_runs"]

    return begin


def test_nodes_are_counted_when_work_is_handed_out(num_runs):
    nodes = [(2, 0)]
    asked = num_runs(context_of(nodes))
    assert asked() == 2
    nodes.append((4, 0))
    assert asked() == 6


def test_an_autoscaler_sees_a_run_that_waits(num_runs):
    assert num_runs(context_of(resources={"wait_for_nodes_s": 60.0}))() == 3
    assert num_runs(context_of(resources={"wait_for_nodes_s": 60.0, "max_concurrent_trials": 2}))() == 2


def test_too_few_nodes_are_told_of_once(num_runs):
    nodes = [(1, 0), (1, 0)]
    context = context_of(nodes, resources={"num_workers": 2})
    asked = num_runs(context)
    assert asked() == 1
    assert context.said == []
    nodes.pop()
    assert [asked(), asked()] == [1, 1]
    assert context.said == ["too few nodes are there by now for a training run; waiting for others to join"]
