import json
from dataclasses import replace

import pytest
from states import make_tested

from raysweep.errors import DataError
from raysweep.results.leaderboard import ClassMetrics, Row
from raysweep.storage.paths import read_json, write_json
from raysweep.sweep.outcome import Outcome, read_outcome, write_outcome
from raysweep.training.evaluation import TestMetrics

ROW = Row(
    study="dinov2-linear_probe",
    encoder="dinov2",
    mode="linear_probe",
    shots="all",
    num_seeds=1,
    num_trials=2,
    best_params={"learning_rate": 0.01, "epochs": 20, "weight_decay": 1e-4, "normalize": "none", "features": "pooled"},
    val_accuracy=0.75,
    test_accuracy=2 / 3,
    test_accuracy_low=1 / 3,
    test_accuracy_high=1.0,
    test_macro_f1=2 / 3,
    num_test=9,
    encoder_passes=1,
    train_seconds=5.0,
    study_seconds=2.0,
    peak_memory_bytes=10**9,
    peak_gpu_memory_bytes=0,
    images_per_second=60.0,
    mlflow_run_id="run1",
    model_path="models/dinov2-linear_probe",
    test_largest_class=1 / 3,
    test_smallest_class=1 / 3,
)
TEST = TestMetrics(
    values={"accuracy": 2 / 3, "macro_f1": 2 / 3, "loss": 0.8847780095206367},
    num_rows=9,
    num_seeds=1,
    accuracy_low=1 / 3,
    accuracy_high=1.0,
    accuracies=(2 / 3,),
    confusion_matrix=((2, 1, 0), (0, 2, 1), (1, 0, 2)),
    hits=("111111000",),
)
PROBE = Outcome(
    row=ROW,
    validation={"val/accuracy": 0.75, "val/loss": 1.0, "val/macro_f1": 0.4},
    test=TEST,
    checkpoint="studies/dinov2-linear_probe/key/trials/1/best.safetensors",
    best_trial=1,
    num_records=2,
    model_uri="models:/m-1",
)
BASELINE = Outcome(
    row=replace(
        ROW,
        study="dinov2-knn-5shot",
        mode="knn",
        shots=5,
        num_seeds=2,
        num_trials=4,
        best_params={"k": 10, "features": "pooled"},
        model_path=None,
    ),
    validation={"val/accuracy": 0.7, "val/loss": 1.0, "val/macro_f1": 0.6},
    test=replace(TEST, num_seeds=2, accuracies=(1.0, 2 / 3), hits=("111111111", "111111000")),
    checkpoint=None,
)


NOW = make_tested().metrics
PER_CLASS = {"a": ClassMetrics(0.5, None), "b": ClassMetrics(None, 1.0)}
TESTED = replace(PROBE, test=NOW, row=replace(ROW, test_metrics=NOW.values, test_per_class=PER_CLASS))


@pytest.mark.parametrize("outcome", [PROBE, BASELINE, TESTED])
def test_an_outcome_is_read_as_it_was_written(tmp_path, outcome):
    path = tmp_path / "new" / "result.json"
    assert read_outcome(path) is None
    write_outcome(path, outcome)
    assert read_outcome(path) == outcome
    (first, *_), values = outcome.test.accuracies, read_json(path)
    assert (values["row"]["study"], values["test"]["accuracies"][0]) == (outcome.row.study, first)


# As version 0.1 wrote them, key by key.

PROBE_0_1 = """{
  "row": {
    "study": "dinov2-linear_probe", "encoder": "dinov2", "mode": "linear_probe", "shots": "all", "num_seeds": 1,
    "best_params": {
      "learning_rate": 0.01, "epochs": 20, "weight_decay": 0.0001, "normalize": "none", "features": "pooled"
    },
    "val_accuracy": 0.75, "test_accuracy": 0.6666666666666666, "test_accuracy_low": 0.3333333333333333,
    "test_accuracy_high": 1.0, "test_macro_f1": 0.6666666666666666, "num_test": 9, "study_seconds": 2.0,
    "mlflow_run_id": "run1", "num_trials": 2, "encoder_passes": 1, "train_seconds": 5.0,
    "peak_memory_bytes": 1000000000, "peak_gpu_memory_bytes": 0, "images_per_second": 60.0,
    "model_path": "models/dinov2-linear_probe"
  },
  "val_metric": 0.75,
  "validation": {"val/accuracy": 0.75, "val/loss": 1.0, "val/macro_f1": 0.4},
  "correct": [true, true, true, true, true, true, false, false, false],
  "test": {
    "loss": 0.8847780095206367, "accuracy": 0.6666666666666666, "macro_f1": 0.6666666666666666, "num_rows": 9,
    "num_seeds": 1, "accuracy_low": 0.3333333333333333, "accuracy_high": 1.0, "accuracies": [0.6666666666666666],
    "confusion_matrix": [[2, 1, 0], [0, 2, 1], [1, 0, 2]]
  },
  "model_uri": "models:/m-1",
  "num_records": 2,
  "best_trial": 1,
  "checkpoint": "studies/dinov2-linear_probe/key/trials/1/best.safetensors"
}
"""


def baseline_of_0_1():
    """A baseline had no `num_records`; with several few-shot seeds, `correct` had shares."""
    values = json.loads(PROBE_0_1)
    del values["num_records"]
    values["row"] |= {
        "study": "dinov2-knn-5shot",
        "mode": "knn",
        "shots": 5,
        "num_seeds": 2,
        "num_trials": 4,
        "best_params": {"k": 10, "features": "pooled"},
        "model_path": None,
    }
    values["test"] |= {"num_seeds": 2, "accuracies": [1.0, 2 / 3]}
    return values | {
        "val_metric": 0.7,
        "validation": {"val/accuracy": 0.7, "val/loss": 1.0, "val/macro_f1": 0.6},
        "correct": [1.0] * 6 + [0.5] * 3,
        "model_uri": None,
        "best_trial": None,
        "checkpoint": None,
    }


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (json.loads(PROBE_0_1), PROBE),
        # It stored only the share of right models, not which of them are right.
        (baseline_of_0_1(), replace(BASELINE, test=replace(BASELINE.test, hits=()))),
    ],
)
def test_an_outcome_of_version_0_1_is_read_as_the_same_figures(tmp_path, values, expected):
    path = tmp_path / "result.json"
    write_json(path, values)
    outcome = read_outcome(path)
    assert outcome == expected
    kinds = {name: type(value) for name, value in expected.row.best_params.items()}
    assert {name: type(value) for name, value in outcome.row.best_params.items()} == kinds
    write_outcome(path, outcome)
    assert read_outcome(path) == expected, "it is written anew as of this version"


@pytest.mark.parametrize("damage", [{"row": {}}, {"test": {}}, {"row": None}])
def test_a_result_that_cannot_be_read_is_named_with_a_way_out(tmp_path, damage):
    path = tmp_path / "result.json"
    path.write_text(json.dumps({"row": {}, "test": {}, "validation": {}, "correct": []} | damage))
    with pytest.raises(DataError, match=r"result\.json: not a result that this version can read .*; delete it"):
        read_outcome(path)
