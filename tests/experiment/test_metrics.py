import subprocess
import sys
from typing import get_args

import pytest
from pydantic import ValidationError

from raysweep.experiment.config import Experiment, experiment_schema
from raysweep.experiment.metrics import (
    METRICS,
    TEST_METRICS,
    VALIDATION_METRICS,
    Direction,
    ValidationMetric,
    validation_key,
)


def experiment(**keys):
    return Experiment(name="x", data={"source": "x"}, encoders=[{"type": "dinov2"}], **keys)


def test_the_table():
    assert {name for name, direction in TEST_METRICS.items() if direction == "minimize"} == {
        "brier", "loss", "ece", "calibrated_ece"
    }  # fmt: skip
    assert set(TEST_METRICS) - set(METRICS) == {"auroc", "ece", "calibrated_ece"}
    assert set(METRICS.values()) <= set(get_args(Direction))
    assert validation_key("macro_f1") == "val/macro_f1"
    assert list(VALIDATION_METRICS) == [f"val/{name}" for name in METRICS]


@pytest.mark.parametrize("name", METRICS)
def test_an_experiment_may_rank_by_every_metric(name):
    found = experiment(metric=validation_key(name))
    assert found.metric == f"val/{name}"
    assert found.direction == METRICS[name]


@pytest.mark.parametrize("metric", ["accuracy", "test/accuracy", "val/f1", "val/auroc", "val/ece"])
def test_other_metrics_are_refused(metric):
    with pytest.raises(ValidationError):
        experiment(metric=metric)


def test_the_schema_lists_the_table():
    assert experiment_schema()["properties"]["metric"]["enum"] == list(VALIDATION_METRICS)
    assert get_args(ValidationMetric) == tuple(VALIDATION_METRICS)


def test_the_module_needs_no_package():
    check = (
        "import sys, raysweep.experiment.metrics; print([m for m in ('pydantic', 'torch', 'ray') if m in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "[]"
