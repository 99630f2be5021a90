import json
import math
import pickle
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace

import numpy as np
import pytest
from jobs import make_job, make_trial, test_work, train_work

from raysweep.images.pass_tasks import IndexReference
from raysweep.images.rows import Draws
from raysweep.training.augment import Augmentation
from raysweep.training.evaluation import TestMetrics, evaluate_test
from raysweep.worker import job as module
from raysweep.worker.job import (
    BaselineFit,
    EpochReport,
    Job,
    StudySpec,
    TestResult,
    TestWork,
    TrainWork,
    TrialResult,
    TrialSpec,
    WorkReport,
    field_values,
    from_tune,
    to_tune,
)

METRICS = {"val/accuracy": 0.1 + 0.2, "val/macro_f1": math.nan, "val/loss": math.inf, "train/loss": -math.inf}
SETTING = {"learning_rate": 1.0, "epochs": 5, "weight_decay": 1e-30, "features": "5", "normalize": "none"}
RESULT = TrialResult(
    study="study",
    number=3,
    setting=SETTING,
    history=({"val/accuracy": 1.0}, METRICS),
    final=METRICS,
    best_epoch=1,
    checkpoint="s3://bucket/best.safetensors",
    train_seconds=12.5,
    images_per_second=1e9,
    peak_memory_bytes=2**40,
    peak_gpu_memory_bytes=7,
)
FAILED = TrialResult("study", 4, SETTING, error='RuntimeError: "out of memory" (bean 🫘)')
PRUNED = TrialResult("study", 5, SETTING, (METRICS,), METRICS, 0, pruned=True)
TEST_METRICS = TestMetrics(
    values={"accuracy": 0.5, "macro_f1": math.nan, "loss": math.inf},
    num_rows=2,
    num_seeds=1,
    accuracy_low=0.0,
    accuracy_high=1.0,
    accuracies=(0.5,),
    confusion_matrix=((1, 0), (1, 0)),
    hits=("10",),
)
FIT = BaselineFit({"k": 10, "features": "cls"}, 4, METRICS, None, 0.25, 2**33)
REPORTS = [
    WorkReport(),
    WorkReport(trials=(RESULT, FAILED, PRUNED)),
    WorkReport(tested={"probe": TestResult(TEST_METRICS, 9), "knn": TestResult(TEST_METRICS, fit=FIT)}),
    WorkReport(tested={"lost": TestResult(error="TrialError: gone")}),
    WorkReport(error="RuntimeError: no message"),
    EpochReport(3, 0, METRICS),
]
DRAWS = Draws(np.arange(6).reshape(2, 3), np.arange(4).reshape(2, 2))
RECORDS = [
    *REPORTS,
    RESULT,
    FIT,
    TestResult(TEST_METRICS, fit=FIT),
    make_trial(2, continues=1),
    train_work(make_trial(), make_trial(1), micro_batch_size=8),
    test_work(checkpoints={"study": "best.safetensors"}, baselines=("knn",)),
    StudySpec("study-2shot", "folder", DRAWS, "ridge"),
    make_job(studies=("study", StudySpec("few", "folder/few", DRAWS)), loop={"augmentation": Augmentation(0.5, True)}),
    make_job("fine_tune", index=IndexReference("reference", "image"), head="best.safetensors"),
]


def spelled(value):
    """All that a record holds, in text: NaN is like NaN there, and 5 unlike 5.0."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{value.tolist()}"
    if is_dataclass(value):
        return f"{type(value).__name__}({', '.join(f'{n}={spelled(v)}' for n, v in field_values(value).items())})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {spelled(one)}' for key, one in value.items())}}}"
    if isinstance(value, tuple):
        return f"({', '.join(map(spelled, value))})"
    return repr(value)


def named(value):
    return type(value).__name__


def test_there_is_a_record_of_every_kind():
    kinds = {kind for kind in vars(module).values() if is_dataclass(kind) and kind.__module__ == module.__name__}
    assert kinds == {type(record) for record in RECORDS}
    assert len(kinds) == 10


@pytest.mark.parametrize("record", RECORDS, ids=named)
def test_what_crosses_a_process_is_the_same_there(record):
    assert spelled(pickle.loads(pickle.dumps(record))) == spelled(record)


@pytest.mark.parametrize("record", RECORDS, ids=named)
def test_what_crosses_a_process_cannot_be_changed(record):
    first, *_ = fields(record)
    with pytest.raises(FrozenInstanceError):
        setattr(record, first.name, None)
    with pytest.raises((AttributeError, TypeError)):
        record.another = None


# Through Tune


@pytest.mark.parametrize("report", REPORTS, ids=named)
def test_reports_survive_tune(report):
    result = {"training_iteration": 1, "config/work": "...", **to_tune(report)}
    assert spelled(from_tune(type(report), result)) == spelled(report)


def test_a_report_is_one_text_that_tune_cannot_flatten():
    for report in REPORTS:
        ((name, text),) = to_tune(report).items()
        assert name == type(report).__name__
        assert isinstance(text, str)
        assert list(json.loads(text)) == [one.name for one in fields(report)]


def test_a_result_without_a_report_holds_none():
    assert from_tune(WorkReport, None) is None
    assert from_tune(WorkReport, {}) is None
    assert from_tune(WorkReport, to_tune(EpochReport(3, 0, METRICS))) is None
    assert from_tune(EpochReport, to_tune(WorkReport())) is None


def test_numbers_keep_their_kind():
    result = from_tune(WorkReport, to_tune(WorkReport(trials=(RESULT,)))).trials[0]
    assert {name: type(value) for name, value in result.setting.items()} == {
        "learning_rate": float, "epochs": int, "weight_decay": float, "features": str, "normalize": str,
    }  # fmt: skip
    assert (type(result.number), type(result.train_seconds), type(result.peak_memory_bytes)) == (int, float, int)
    assert type(from_tune(EpochReport, to_tune(EpochReport(3, 0, METRICS))).epoch) is int
    # A history holds numbers of one kind, whatever the loop has put into it.
    counted = from_tune(EpochReport, to_tune(EpochReport(3, 0, {"train/micro_batch_size": 8})))
    assert counted.metrics == {"train/micro_batch_size": 8}


def test_metrics_of_a_test_survive_tune_as_they_are_computed():
    metrics = evaluate_test([np.eye(3, dtype=np.float32)] * 2, np.array([0, 1, 1]))
    report = WorkReport(tested={"study": TestResult(metrics)})
    assert from_tune(WorkReport, to_tune(report)) == report


@pytest.mark.parametrize("report", [WorkReport(trials=({"number": 3},)), WorkReport(tested={"a": None})])
def test_a_report_of_another_shape_is_not_taken(report):
    with pytest.raises(ValueError, match="WorkReport"):
        from_tune(WorkReport, to_tune(report))


def test_what_json_cannot_hold_is_not_sent():
    with pytest.raises(TypeError):
        to_tune(EpochReport(3, 0, {"val/accuracy": np.zeros(2)}))


def test_field_values_are_not_copied():
    values = field_values(RESULT)
    assert list(values) == [one.name for one in fields(TrialResult)]
    assert values["history"] is RESULT.history
    assert TrialResult(**values) == RESULT


# What jobs and works say of themselves


def test_a_job_counts_the_rows_of_all_splits():
    assert make_job().num_rows == 36
    assert isinstance(replace(make_job(), num_classes=7), Job)


def test_a_trial_that_continues_another_works_in_its_folder():
    assert TrialSpec("study", 4, SETTING, None, "stop").folder_name == "4"
    assert TrialSpec("study", 4, SETTING, 0, "stop").folder_name == "0"


def test_a_work_names_its_studies_once_in_their_order():
    trials = [make_trial(number, study) for number, study in ((7, "b"), (0, "a"), (8, "b"))]
    work = TrainWork("group", 0.0, tuple(trials))
    assert (work.studies, work.error_folder) == (("b", "a"), "7")
    tested = TestWork("group", 0.0, {"b": "best", "a": "best"}, ("knn",))
    assert (tested.studies, tested.error_folder) == (("b", "a", "knn"), "test")
