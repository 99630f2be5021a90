from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from states import make_state, make_tested

from raysweep.cluster.resources import Resources
from raysweep.errors import ConfigError, DataError
from raysweep.experiment.config import Experiment
from raysweep.images.index import BadRow
from raysweep.results.leaderboard import Row
from raysweep.results.tracking import Tracker
from raysweep.sweep import stages, tune_run
from raysweep.sweep.outcome import Outcome
from raysweep.training.ranking import Ranking


def state_of(nodes=((2, 0),), **keys):
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
        stages.check_studies(state_of(tracking={"optuna_uri": "postgresql://h/x"}))


@pytest.fixture
def num_runs(monkeypatch):
    """Begins a stage; returns what tells how many pieces of work go on at a time."""

    def begin(state):
        found = {}
        monkeypatch.setattr(tune_run, "run_groups", lambda *_, **options: found.update(options))
        group = SimpleNamespace(
            first=SimpleNamespace(encoder=SimpleNamespace(load_ahead=lambda: None)), reserved_cpus=0
        )
        stages.run_stage(state, [group])
        return found["num_runs"]

    return begin


def test_nodes_are_counted_when_work_is_handed_out(num_runs):
    nodes = [(2, 0)]
    asked = num_runs(state_of(nodes))
    assert asked() == 2
    nodes.append((4, 0))
    assert asked() == 6


def test_an_autoscaler_sees_a_run_that_waits(num_runs):
    assert num_runs(state_of(resources={"wait_for_nodes_s": 60.0}))() == 3
    assert num_runs(state_of(resources={"wait_for_nodes_s": 60.0, "max_concurrent_trials": 2}))() == 2


def test_too_few_nodes_are_told_of_once(num_runs):
    nodes = [(1, 0), (1, 0)]
    state = state_of(nodes, resources={"num_workers": 2})
    asked = num_runs(state)
    assert asked() == 1
    assert state.said == []
    nodes.pop()
    assert [asked(), asked()] == [1, 1]
    assert state.said == ["too few nodes are there by now for a training run; waiting for others to join"]


# The winner

ROW = Row(
    study="study",
    encoder="dinov2",
    mode="linear_probe",
    shots="all",
    num_seeds=1,
    num_trials=1,
    best_params={},
    val_accuracy=0.5,
    test_accuracy=0.5,
    test_accuracy_low=0.4,
    test_accuracy_high=0.6,
    test_macro_f1=0.5,
    num_test=30,
    encoder_passes=1,
    train_seconds=1.0,
    study_seconds=1.0,
    peak_memory_bytes=1,
    peak_gpu_memory_bytes=0,
    images_per_second=1.0,
    mlflow_run_id="run",
    model_path="model",
)


def outcome_of(name, accuracy, loss=1.0, *, shots="all", test_accuracy=0.5, has_model=True):
    return Outcome(
        row=replace(ROW, study=name, shots=shots, val_accuracy=accuracy, test_accuracy=test_accuracy),
        validation={"val/accuracy": accuracy, "val/loss": loss, "val/macro_f1": 0.5},
        test=make_tested().metrics,
        checkpoint="checkpoint" if has_model else None,
        model_uri=f"models:/{name}" if has_model else None,
    )


def winner_of(*outcomes, metric="val/accuracy", direction="maximize"):
    found = stages.best_by_validation(SimpleNamespace(ranking=Ranking(metric, direction)), outcomes)
    return None if found is None else found.row.study


def test_the_winner_is_the_best_by_validation_whatever_the_test_says():
    outcomes = [outcome_of("a", 0.7, test_accuracy=0.9), outcome_of("b", 0.8), outcome_of("c", 0.6)]
    assert winner_of(*outcomes) == "b"


def test_of_studies_that_are_equally_accurate_the_one_with_the_lower_validation_loss_wins():
    outcomes = [
        outcome_of("a", 0.8, 0.5),
        outcome_of("b", 0.8, 0.3),
        outcome_of("c", 0.8, 0.4),
        outcome_of("d", 0.7, 0),
    ]
    assert winner_of(*outcomes) == winner_of(*reversed(outcomes)) == "b"
    assert winner_of(outcome_of("a", 0.8, float("nan")), outcome_of("b", 0.8, 9.0)) == "b"
    assert winner_of(outcome_of("a", 0.8, 0.5), outcome_of("b", 0.8, 0.5)) == "a", "the first of those that are alike"


def test_the_winner_is_chosen_by_the_metric_of_the_experiment_and_in_its_direction():
    outcomes = [outcome_of("a", 0.9, 0.5), outcome_of("b", 0.8, 0.3)]
    assert winner_of(*outcomes, metric="val/loss", direction="minimize") == "b"


def test_the_winner_has_a_model_and_the_most_training_images():
    outcomes = [outcome_of("knn", 0.95, has_model=False), outcome_of("a", 0.7), outcome_of("b", 0.9, shots=10)]
    assert winner_of(*outcomes) == "a"
    assert winner_of(outcome_of("a", 0.9, shots=5), outcome_of("b", 0.7, shots=10)) == "b"
    assert winner_of(outcome_of("knn", 0.9, has_model=False), outcome_of("b", 0.9, shots=10)) is None


def test_a_sweep_of_this_method_keeps_its_run(tmp_path):
    state = make_state(tmp_path)
    stages.start_sweep_run(state)
    (sent,) = state.recorder.of(Tracker.start_run)
    assert sent[0] == "84124e50819168b2", "the key as it was when METHOD was raised"


def test_only_a_sweep_with_folds_has_them_in_its_key(tmp_path):
    keys = []
    for number, folds in enumerate((None, 5, 6)):
        state = make_state(tmp_path / str(number), data={"source": "s", "folds": folds})
        stages.start_sweep_run(state)
        keys.append(state.recorder.of(Tracker.start_run)[0][0])
    assert len(set(keys)) == 3
    assert keys[0] == "84124e50819168b2"


def test_folds_that_a_class_has_too_few_images_for_are_refused(tmp_path):
    """Each of three classes has 40 images."""
    state = make_state(tmp_path, data={"source": "s", "folds": 20})
    stages.check_folds(state)
    state.bad_rows = {number: BadRow(number, f"{number}.png", "broken") for number in range(40, 61)}
    expected = r"data.folds: 20, but class 'b' has 19 images in all splits; each fold needs one"
    with pytest.raises(DataError, match=expected):
        stages.check_folds(state)
    with pytest.raises(DataError, match=expected):
        stages.check_studies(state)
    state.bad_rows = {}
    state.index = replace(state.index, groups=np.arange(120, dtype=np.int32) // 4)
    with pytest.raises(DataError, match=r"class 'a' has 10 groups of images in all splits"):
        stages.check_folds(state)
    stages.check_folds(make_state(tmp_path, data={"source": "s"}))


@pytest.mark.parametrize("keys", [{"modes": ["fine_tune"]}, {"search": {"linear_probe": {"baselines": []}}}])
def test_folds_that_judge_nothing_are_refused(tmp_path, keys):
    state = make_state(tmp_path, data={"source": "s", "folds": 5}, **keys)
    with pytest.raises(ConfigError, match=r"data.folds: 5, but folds judge only knn, ridge and logistic"):
        stages.check_studies(state)
