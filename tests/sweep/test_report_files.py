import io
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from run_folder import CLASSES, make_run, make_test_rows
from states import make_state, text_of

from raysweep.results.sweep_record import TrialRecord, read_record, read_trials, write_trials
from raysweep.storage.test_rows import read_test_rows, write_test_rows
from raysweep.sweep import report_files
from raysweep.sweep.report_files import sweep_record
from raysweep.worker.job import TrialResult


def test_test_rows_are_read_as_they_were_written(tmp_path):
    rows = make_test_rows()
    write_test_rows(tmp_path / "rows.parquet", rows)
    found = read_test_rows(tmp_path / "rows.parquet")
    for name in ("ids", "labels", "predicted", "probabilities"):
        np.testing.assert_array_equal(getattr(found, name), getattr(rows, name))
    assert found.probabilities.dtype == np.float32


def test_trials_are_read_as_they_were_written(tmp_path):
    trials = [
        TrialRecord("a", 0, "done", {"learning_rate": 0.5}, {"val/loss": 1.5}, {"val/loss": [2.0, 1.5]}, 1, 3.0),
        TrialRecord("b", 1, "failed", {"features": "cls"}, {}, {}, -1, 0.0),
    ]
    write_trials(tmp_path / "trials.parquet", trials)
    assert read_trials(tmp_path / "trials.parquet") == trials
    write_trials(tmp_path / "none.parquet", [])
    assert read_trials(tmp_path / "none.parquet") == []


def test_a_trial_keeps_its_curves_without_times():
    history = ({"val/loss": 2.0, "time/epoch_s": 1.0}, {"val/loss": 1.0, "time/epoch_s": 1.0})
    trial = report_files._trial_record(TrialResult("s", 4, {"epochs": 2}, history, {"val/loss": 1.0}, 1))
    assert (trial.number, trial.state, trial.history) == (4, "done", {"val/loss": [2.0, 1.0]})
    stopped = TrialResult("s", 4, {"epochs": 2}, pruned=True)
    assert report_files._trial_record(stopped).state == "stopped"
    assert report_files._trial_record(TrialResult("s", 4, {}, error="x")).state == "failed"


def test_predictions_have_every_test_image_of_every_study(tmp_path):
    table = pq.read_table(make_run(tmp_path).predictions).to_pandas()
    assert table["study"].value_counts().to_dict() == {"cnn-fine_tune": 30, "dino-linear_probe": 30}
    first = table[table["study"] == "cnn-fine_tune"].iloc[29]
    assert (first["row_id"], first["label"], first["prediction"]) == (29, "cat", "ant")
    assert first["image"] == str(tmp_path / "images" / "29.png")
    probabilities = table[[f"probability_{name}" for name in CLASSES]].to_numpy()
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-6)
    assert first["confidence"] == probabilities[29].max()


def test_thumbnails_are_those_of_the_most_confident_mistakes(tmp_path):
    table = pq.read_table(make_run(tmp_path).thumbnails).to_pydict()
    assert table["row_id"] == list(range(24, 30))
    image = Image.open(io.BytesIO(table["jpeg"][5]))
    assert max(image.size) <= report_files.THUMBNAIL_SIDE
    assert np.abs(np.array(image)[5, 5] - [29, 0, 200]).max() < 6


def test_an_image_that_is_gone_leaves_its_place_empty(tmp_path, monkeypatch):
    read = report_files.read_image_bytes

    def without_one(paths, *arguments):
        return read([path.replace("29.png", "gone.png") for path in paths], *arguments)

    monkeypatch.setattr(report_files, "read_image_bytes", without_one)
    assert pq.read_table(make_run(tmp_path).thumbnails)["row_id"].to_pylist() == list(range(24, 29))


def test_the_record_says_what_the_sweep_was(tmp_path):
    record = read_record(make_run(tmp_path).sweep_record)
    assert record.counts["test"] == {"ant": 10, "bee": 10, "cat": 10}
    assert record.warnings == ("a warning",)
    assert record.encoders["cnn"].num_features == 4
    assert record.metric == "val/accuracy"
    assert record.versions["raysweep"]


@pytest.mark.parametrize("error", [None, ValueError("error: a reason"), OSError("error: a reason")])
def test_a_report_that_cannot_be_made_ends_no_sweep(tmp_path, monkeypatch, error):
    state = make_state(tmp_path)

    def write(*_):
        if error:
            raise error

    monkeypatch.setattr(report_files, "write_tables", write)

    def fail(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "error: a reason")

    monkeypatch.setattr(report_files.subprocess, "run", fail)
    report_files.make_report(state, [])
    assert "no report could be made: error: a reason" in text_of(state)


@pytest.mark.parametrize("most", [0, 2, 100])
def test_the_most_confident_mistakes_come_first(most):
    assert report_files.most_confident_mistakes(make_test_rows(), most).tolist() == [29, 28, 27, 26, 25, 24][:most]


@pytest.mark.parametrize("words", [["x.yaml", "--set", "a=[1, 2]"], ["run", "x.yaml", "--set", "a=[1, 2]"]])
def test_the_command_can_be_pasted(monkeypatch, tmp_path, words):
    monkeypatch.setattr(sys, "argv", ["raysweep", *words])
    record = sweep_record(make_state(tmp_path), [])
    assert record.command_line == "python -m raysweep.run x.yaml --set 'a=[1, 2]'"
