import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from functools import partial

import mlflow
import mlflow.pyfunc
import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from PIL import Image

from raysweep.encoders.build import build_encoder
from raysweep.encoders.head import Classifier, Head
from raysweep.errors import RaysweepError
from raysweep.results import tracking
from raysweep.results.environment import environment_tags
from raysweep.results.logged_model import log_model
from raysweep.results.mlflow_store import convert_mlflow_errors
from raysweep.results.model import export_model, load_model
from raysweep.results.tracking import LoggedOutcome, LoggedTrial, open_tracker

pytestmark = pytest.mark.process

ROWS = [{"train/loss": 1.0, "val/accuracy": 0.5}, {"train/loss": 0.5, "val/accuracy": 0.75}]


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    """One store for the module, since making its tables takes seconds; every test has its own experiment in it."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture
def new_tracker(uri, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)  # artifacts of a local store go below the working directory
    before = mlflow.get_tracking_uri()
    yield lambda: open_tracker(uri, request.node.name)
    mlflow.set_tracking_uri(before)


def runs_of(tracker, **where):
    filters = " and ".join(f"tags.`{name}` = '{value}'" for name, value in where.items())
    return list(tracker.client.search_runs([tracker.experiment_id], filters))


def status(tracker, run_id):
    return tracker.client.get_run(run_id).info.status


def start_tree(tracker):
    """A sweep run with two studies of two trials each; returns run ids by key."""
    runs = {"sweep": tracker.start_run("sweep", "beans", "sweep")[0]}
    for study in ("probe", "tune"):
        runs[study] = tracker.start_run(study, study, "study", parent=runs["sweep"])[0]
        for number in range(2):
            key = f"{study}/{number}"
            runs[key] = tracker.start_run(key, f"{study}-{number}", "trial", parent=runs[study])[0]
    return runs


def test_runs_form_a_tree(new_tracker):
    tracker = new_tracker()
    runs = start_tree(tracker)
    assert len(set(runs.values())) == 7
    found = {run.info.run_id: run for run in runs_of(tracker)}
    assert found.keys() == set(runs.values())
    for key, parent in [("probe", "sweep"), ("tune", "sweep"), ("probe/0", "probe"), ("tune/1", "tune")]:
        assert found[runs[key]].data.tags["mlflow.parentRunId"] == runs[parent]
    assert "mlflow.parentRunId" not in found[runs["sweep"]].data.tags
    levels = [run.data.tags["raysweep.level"] for run in found.values()]
    assert sorted(levels) == ["study"] * 2 + ["sweep"] + ["trial"] * 4
    assert found[runs["probe/1"]].info.run_name == "probe-1"


def test_a_resumed_sweep_goes_on_in_the_runs_it_had(new_tracker):
    first = new_tracker()
    runs = start_tree(first)
    for run_id in runs.values():
        first.finish(run_id)
    again = new_tracker()
    assert start_tree(again) == runs
    assert len(runs_of(again)) == 7
    studies = {"probe", "tune"}
    assert {status(again, run_id) for key, run_id in runs.items() if key not in studies} == {"RUNNING"}
    assert {status(again, runs[key]) for key in studies} == {"FINISHED"}, "until there is work left"
    again.reopen(runs["probe"])
    assert status(again, runs["probe"]) == "RUNNING"
    assert again.start_run("sweep", "beans", "sweep") == (runs["sweep"], False)
    assert again.start_run("probe/2", "probe-2", "trial", parent=runs["probe"])[1]


def test_the_same_key_under_another_parent_is_another_run(new_tracker):
    tracker = new_tracker()
    sweeps = [tracker.start_run(key, key, "sweep")[0] for key in ("a", "b")]
    studies = [tracker.start_run("study", "study", "study", parent=parent) for parent in sweeps]
    assert studies[0][0] != studies[1][0]
    assert all(created for _, created in studies)


def test_more_runs_than_a_page_are_all_found(new_tracker, monkeypatch):
    first = new_tracker()
    sweep = first.start_run("sweep", "sweep", "sweep")[0]
    runs = [first.start_run(f"s/{number}", "t", "trial", parent=sweep)[0] for number in range(5)]
    again = new_tracker()
    search = again.client.search_runs
    monkeypatch.setattr(
        again.client, "search_runs", lambda *where, **more: search(*where, **{**more, "max_results": 2})
    )
    assert [again.start_run(f"s/{number}", "t", "trial", parent=sweep) for number in range(5)] == [
        (run_id, False) for run_id in runs
    ]


def test_histories_params_and_metrics(new_tracker):
    tracker = new_tracker()
    run_id, _ = tracker.start_run("key", "name", "sweep", tags={"version.x": "1"})
    tracker.log_once(run_id, {"learning_rate": 0.003, "features": "cls+mean"}, {"raysweep.error": "long " * 9_000})
    tracker.log_once(run_id, {"learning_rate": 0.003})
    tracker.log_history(run_id, ROWS)
    tracker.log_history(run_id, [{"train/loss": float("nan"), "val/accuracy": 0.8}], first_epoch=2)
    tracker.log_history(run_id, [{"train/loss": None, "val/macro_f1": np.float32(0.5)}], first_epoch=3)
    tracker.log_metrics(run_id, {"test/accuracy": 0.7, "memory": None, "count": 3})
    run = tracker.client.get_run(run_id)
    assert run.data.params == {"learning_rate": "0.003", "features": "cls+mean"}
    assert run.data.tags["version.x"] == "1"
    assert run.data.tags["raysweep.error"].startswith("long long")
    curve = [(point.step, point.value) for point in tracker.client.get_metric_history(run_id, "val/accuracy")]
    assert curve == [(1, 0.5), (2, 0.75), (3, 0.8)]
    assert np.isnan(tracker.client.get_metric_history(run_id, "train/loss")[-1].value)
    assert (run.data.metrics["test/accuracy"], run.data.metrics["count"]) == (0.7, 3.0)
    assert "memory" not in run.data.metrics


def test_a_parameter_keeps_its_value(new_tracker):
    tracker = new_tracker()
    run_id, _ = tracker.start_run("key", "name", "sweep")
    tracker.log_once(run_id, {"epochs": 5})
    with pytest.raises(MlflowException, match="epochs"):
        tracker.log_once(run_id, {"epochs": 6})


def test_long_histories_go_in_several_calls(new_tracker, monkeypatch):
    monkeypatch.setattr(tracking, "METRICS_PER_BATCH", 3)
    tracker = new_tracker()
    run_id, _ = tracker.start_run("key", "name", "sweep")
    tracker.log_history(run_id, [{"a": float(epoch), "b": 0.0} for epoch in range(4)])
    steps = [point.step for point in tracker.client.get_metric_history(run_id, "a")]
    assert steps == [1, 2, 3, 4]


def test_the_dataset_is_an_input(new_tracker):
    tracker = new_tracker()
    run_id, _ = tracker.start_run("key", "name", "sweep")
    tracker.log_dataset(run_id, "beans " * 100, "0123456789abcdef", "hf://datasets/x/beans", "{'train': 3}")
    (entry,) = tracker.client.get_run(run_id).inputs.dataset_inputs
    assert (entry.dataset.digest, entry.dataset.source) == ("0123456789abcdef", "hf://datasets/x/beans")
    assert entry.dataset.profile == "{'train': 3}"
    assert [(tag.key, tag.value) for tag in entry.tags] == [("mlflow.data.context", "training")]


def test_files_folders_and_dicts_become_artifacts(new_tracker, tmp_path):
    tracker = new_tracker()
    run_id, _ = tracker.start_run("key", "name", "sweep")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("a")
    tracker.log_file(run_id, tmp_path / "folder" / "a.txt")
    tracker.log_file(run_id, tmp_path / "folder", "copies")
    tracker.log_dict(run_id, {"labels": ["a b", "c/d"]}, "matrix.json")
    paths = {item.path for item in tracker.client.list_artifacts(run_id)}
    assert paths == {"a.txt", "copies", "matrix.json"}
    assert [item.path for item in tracker.client.list_artifacts(run_id, "copies")] == ["copies/a.txt"]


# Trials


def start_study(tracker):
    sweep = tracker.start_run("sweep", "beans", "sweep")[0]
    return tracker.start_run("study", "probe", "study", parent=sweep)[0]


def trial_of(tracker, study, key="s/0"):
    (run,) = [run for run in runs_of(tracker, **{"mlflow.parentRunId": study}) if run.data.tags["raysweep.key"] == key]
    return run


def curve(tracker, run, name):
    return [(point.step, point.value) for point in tracker.client.get_metric_history(run.info.run_id, name)]


SETTING = {"learning_rate": 0.003, "epochs": 2}


def test_a_trial_that_is_over_is_logged_whole(new_tracker, monkeypatch):
    monkeypatch.setattr(tracking, "METRICS_PER_BATCH", 3)
    tracker = new_tracker()
    study = start_study(tracker)
    tracker.log_trial(study, "s/0", "probe-0", LoggedTrial(SETTING, ROWS, ROWS[-1], status="FINISHED"))
    run = trial_of(tracker, study)
    assert (run.info.run_name, run.info.status, run.data.tags["raysweep.level"]) == ("probe-0", "FINISHED", "trial")
    assert run.data.params == {"learning_rate": "0.003", "epochs": "2"}
    assert curve(tracker, run, "val/accuracy") == [(1, 0.5), (2, 0.75)]
    assert curve(tracker, run, "train/loss") == [(1, 1.0), (2, 0.5)]
    assert run.data.metrics["best/val/accuracy"] == 0.75
    assert "best/train/loss" not in run.data.metrics


def test_a_trial_that_failed_says_why(new_tracker):
    tracker = new_tracker()
    study = start_study(tracker)
    tracker.log_trial(study, "s/0", "probe-0", LoggedTrial(SETTING, [], {}, status="FAILED", error="lost " * 2_000))
    run = trial_of(tracker, study)
    assert run.info.status == "FAILED"
    assert run.data.tags["raysweep.error"].startswith("lost lost")
    assert run.data.params["epochs"] == "2"


def test_a_trial_that_was_stopped_early_is_killed_and_says_so(new_tracker):
    tracker = new_tracker()
    study = start_study(tracker)
    tracker.log_epoch(study, "s/0", "tune-0", SETTING, 0, ROWS[0])
    tracker.log_trial(study, "s/0", "tune-0", LoggedTrial(SETTING, [], ROWS[0], status="KILLED", first_epoch=1))
    run = trial_of(tracker, study)
    assert (run.info.status, run.data.tags["raysweep.pruned"]) == ("KILLED", "true")
    assert run.data.metrics["best/val/accuracy"] == 0.5
    assert curve(tracker, run, "val/accuracy") == [(1, 0.5)]


def test_epochs_of_a_running_trial_come_one_by_one_and_once(new_tracker):
    tracker = new_tracker()
    study = start_study(tracker)
    for epoch, metrics in enumerate(ROWS):
        tracker.log_epoch(study, "s/0", "tune-0", SETTING, epoch, metrics)
    run = trial_of(tracker, study)
    assert (run.info.status, run.data.params["epochs"]) == ("RUNNING", "2")
    tracker.log_trial(study, "s/0", "tune-0", LoggedTrial(SETTING, [], ROWS[-1], status="FINISHED", first_epoch=2))
    run = trial_of(tracker, study)
    assert (run.info.status, run.data.metrics["best/val/accuracy"]) == ("FINISHED", 0.75)
    assert curve(tracker, run, "val/accuracy") == [(1, 0.5), (2, 0.75)]


def test_epochs_that_were_not_seen_follow_those_that_were(new_tracker):
    tracker = new_tracker()
    study = start_study(tracker)
    tracker.log_epoch(study, "s/0", "tune-0", SETTING, 0, ROWS[0])
    tracker.log_trial(
        study, "s/0", "tune-0", LoggedTrial(SETTING, ROWS[1:], ROWS[-1], status="FINISHED", first_epoch=1)
    )
    assert curve(tracker, trial_of(tracker, study), "val/accuracy") == [(1, 0.5), (2, 0.75)]


def test_catching_up_logs_what_is_missing_or_was_cut_short_and_nothing_twice(new_tracker):
    killed = new_tracker()
    study = start_study(killed)
    whole = LoggedTrial(SETTING, ROWS, ROWS[-1], status="FINISHED")
    lost = LoggedTrial(SETTING, [], {}, status="FAILED", error="out of memory")
    killed.log_trial(study, "s/0", "t-0", whole)
    killed.log_trial(study, "s/1", "t-1", lost)
    diverged = LoggedTrial(SETTING, ROWS, {"val/accuracy": float("nan")}, status="FAILED")
    killed.log_trial(study, "s/5", "t-5", diverged)
    killed.start_run("s/2", "t-2", "trial", study)  # and was killed before it logged more
    stopped = LoggedTrial(SETTING, ROWS, ROWS[-1], status="KILLED")
    killed.log_trial(study, "s/6", "t-6", stopped)
    killed.finish(killed.start_run("s/7", "t-7", "trial", study)[0], "FAILED")  # as the next sweep found it
    again = new_tracker()
    assert start_study(again) == study
    trials = (whole, lost, whole, whole, lost, diverged, stopped, stopped)
    again.log_missing_trials(study, [(f"s/{number}", f"t-{number}", trial) for number, trial in enumerate(trials)])
    runs = {run.info.run_name: run for run in runs_of(again, **{"mlflow.parentRunId": study})}
    statuses = {name: run.info.status for name, run in sorted(runs.items())}
    assert list(statuses) == [f"t-{number}" for number in range(8)]
    ends = ["FINISHED", "FAILED", "FINISHED", "FINISHED", "FAILED", "FAILED", "KILLED", "KILLED"]
    assert list(statuses.values()) == ends
    for name in ("t-0", "t-2", "t-3", "t-5", "t-6", "t-7"):
        assert curve(again, runs[name], "val/accuracy") == [(1, 0.5), (2, 0.75)]


# How runs end


def test_runs_left_running_by_a_killed_sweep_end_failed(new_tracker):
    killed = new_tracker()
    runs = start_tree(killed)
    killed.finish(runs["probe/0"])
    again = new_tracker()
    study = again.start_run("probe", "probe", "study", parent=runs["sweep"])[0]
    going_on = again.start_run("probe/1", "probe-1", "trial", parent=study)[0]
    again.fail_unfinished_runs(runs["sweep"])
    again.fail_unfinished_runs(study)
    assert status(again, study) == status(again, going_on) == "RUNNING"
    assert status(again, runs["tune"]) == "FAILED"
    assert status(again, runs["probe/0"]) == "FINISHED"


def test_a_run_that_went_on_and_finished_stays_finished(new_tracker):
    runs = start_tree(new_tracker())
    again = new_tracker()
    study = again.start_run("probe", "probe", "study", parent=runs["sweep"])[0]
    again.finish(study)
    again.fail_unfinished_runs(runs["sweep"])
    assert status(again, study) == "FINISHED"


def test_close_fails_what_is_still_open(new_tracker):
    tracker = new_tracker()
    runs = start_tree(tracker)
    tracker.finish(runs["probe/0"])
    tracker.finish(runs["probe/1"], "FAILED")
    tracker.close()
    assert status(tracker, runs["probe/0"]) == "FINISHED"
    others = [run_id for key, run_id in runs.items() if key != "probe/0"]
    assert {status(tracker, run_id) for run_id in others} == {"FAILED"}
    tracker.close()


def test_a_store_that_has_gone_away_does_not_hide_why_a_sweep_ends(new_tracker, monkeypatch):
    tracker = new_tracker()
    start_tree(tracker)
    calls = []

    def gone(run_id, status, end_time):
        calls.append(run_id)
        raise MlflowException("no answer")

    monkeypatch.setattr(tracker.client, "set_terminated", gone)
    tracker.close()
    assert len(calls) == 1


# Stores


@pytest.fixture
def own_uri(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = mlflow.get_tracking_uri()
    yield
    mlflow.set_tracking_uri(before)


@pytest.mark.parametrize(
    "bad", ["http://127.0.0.1:9", "mongodb://127.0.0.1/x", "sqlite:////dev/null/no/mlflow.db", "postgresql://h/x"]
)
def test_a_store_that_cannot_be_used_is_named_at_once(bad, own_uri, monkeypatch):
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    started = time.monotonic()
    with pytest.raises(RaysweepError, match=f"^tracking.uri: '{bad}' cannot be used as an MLflow store"):
        open_tracker(bad, "x")
    assert time.monotonic() - started < 30
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


def test_a_store_in_a_folder_that_is_not_there_is_refused_and_makes_none(own_uri, tmp_path):
    with pytest.raises(RaysweepError, match=r"^tracking\.uri: .*no such folder: 'mistyped/folder'"):
        open_tracker("sqlite:///mistyped/folder/mlflow.db", "x")
    assert list(tmp_path.iterdir()) == []


def test_what_the_user_set_for_retries_stays(own_uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    with pytest.raises(RaysweepError):
        open_tracker("http://127.0.0.1:9", "x")
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "1"


def test_a_deleted_experiment_is_taken_back(new_tracker):
    first = new_tracker()
    first.client.delete_experiment(first.experiment_id)
    again = new_tracker()
    assert again.experiment_id == first.experiment_id
    assert again.start_run("key", "name", "sweep")[1]


# Models


def test_a_logged_model_predicts_on_bytes(new_tracker, tmp_path, uri):
    classes = ("angular leaf spot", "bean/rust", 'healthy: "ü"')
    encoder = build_encoder({"type": "stacked_cnn", "config": {"channels": [4]}, "image_size": 16}, seed=0)
    head = Head(4, 3)
    head.bias.data[1] = 1.0
    export_model(tmp_path / "model", Classifier(encoder, head, "pooled"), classes, {})
    tracker = new_tracker()
    run_id, _ = tracker.start_run("key", "name", "sweep")
    model_uri = log_model(tracker.client, run_id, tmp_path / "model", classes)
    mlflow.set_tracking_uri(uri)
    loaded = mlflow.pyfunc.load_model(model_uri)
    assert loaded.metadata.run_id == run_id
    assert loaded.metadata.get_input_schema().input_names() == ["image"]
    buffer = io.BytesIO()
    Image.new("RGB", (20, 30), "green").save(buffer, "PNG")
    frame = loaded.predict(pd.DataFrame({"image": [buffer.getvalue()] * 2}))
    assert list(frame.columns) == loaded.metadata.get_output_schema().input_names()
    assert frame["label"].tolist() == ["bean/rust"] * 2
    model = load_model(tmp_path / "model")
    expected = model.probabilities([model.preprocess(buffer.getvalue())])[0]
    np.testing.assert_allclose(frame.iloc[0, 2:].to_numpy(float), expected, rtol=1e-6)
    assert tracker.register(model_uri, "winner") == "1"
    assert tracker.register(model_uri, "winner") == "1", "the same model is registered once"
    assert log_model(tracker.client, run_id, tmp_path / "model", classes) == model_uri, "the same model is logged once"
    export_model(tmp_path / "model", Classifier(encoder, Head(4, 3), "pooled"), classes, {"trial": 2})
    assert tracker.register(log_model(tracker.client, run_id, tmp_path / "model", classes), "winner") == "2"


def exported_model(folder, about=None):
    """A small model folder."""
    encoder = build_encoder({"type": "stacked_cnn", "config": {"channels": [4]}, "image_size": 16}, seed=0)
    export_model(folder, Classifier(encoder, Head(4, 2), "pooled"), ("a", "b"), about or {})
    return folder


HOSTILE = """
import sys
from pathlib import Path
import mlflow
from raysweep.results.tracking import LoggedOutcome, open_tracker

mlflow.autolog(silent=True)
uri, folder = sys.argv[1:]
client = mlflow.MlflowClient(uri, registry_uri=uri)
client.delete_experiment("0")
other = client.create_experiment("other")
mlflow.set_tracking_uri(uri)
with mlflow.start_run(experiment_id=other):
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    tracker = open_tracker(uri, "mine")
    sweep = tracker.start_run("sweep", "sweep", "sweep")[0]
    run_id = tracker.start_run("study", "study", "study", sweep, params={"lr": 1})[0]
    outcome = LoggedOutcome({"test/accuracy": 0.5}, {}, {}, ("a", "b"), model=folder)
    model_uri = tracker.log_outcome(run_id, outcome).model_uri
    assert tracker.register(model_uri, "winner") == "1"
    mlflow.set_tracking_uri(uri)  # where the program's own run ends
"""


@pytest.fixture
def serve(tmp_path):
    """Starts an MLflow server on a store; its address."""
    started = []

    def start(uri):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--port", str(port)]
        started.append(subprocess.Popen(command, cwd=tmp_path, start_new_session=True))
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                return f"http://127.0.0.1:{port}"
            except OSError:
                assert time.monotonic() < deadline, "the server does not start"
                time.sleep(0.2)

    yield start
    for process in started:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("where", ["sqlite", pytest.param("server", marks=pytest.mark.slow)])
def test_everything_gets_into_the_own_experiment_whatever_the_environment_says(where, tmp_path, request, own_uri):
    exported_model(tmp_path / "model")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    open_tracker(uri, "mine")
    if where == "server":
        uri = request.getfixturevalue("serve")(uri)
    hostile = {
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
        "MLFLOW_REGISTRY_URI": "http://127.0.0.1:9",
        "MLFLOW_EXPERIMENT_ID": "4711",
        "MLFLOW_EXPERIMENT_NAME": "elsewhere",
        "MLFLOW_ENABLE_ASYNC_LOGGING": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }
    command = [sys.executable, "-c", HOSTILE, uri, str(tmp_path / "model")]
    environment = {**os.environ, **hostile}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    client = mlflow.MlflowClient(uri, registry_uri=uri)
    mine = client.get_experiment_by_name("mine").experiment_id
    others = [experiment.experiment_id for experiment in client.search_experiments(view_type=3)]
    (model,) = client.search_logged_models(others)
    assert (model.experiment_id, str(model.status), model.params) == (mine, "READY", {"lr": "1"})
    (study,) = client.search_runs([mine], "tags.`raysweep.level` = 'study'")
    assert (study.info.status, model.source_run_id) == ("FINISHED", study.info.run_id)
    assert [output.model_id for output in study.outputs.model_outputs] == [model.model_id]
    version = client.get_model_version("winner", "1")
    assert (version.source, version.run_id) == (model.artifact_location, study.info.run_id)
    assert len(client.search_runs(others)) == 3, "the other one is that of the hostile program"
    assert os.listdir(tmp_path / "mlruns") == [mine] if where == "sqlite" else True


# Calls that were cut short


OUTCOME = LoggedOutcome(
    {"test/accuracy": 0.5, "time/train_s": 3.0, "test/loss": float("nan"), "val/loss": float("inf")},
    {"labels": ["a", "b"], "counts": [[1, 0], [0, 1]]},
    {"raysweep.best_trial": "0"},
    ("a", "b"),
    params={"lr": 1},
)


def points_of(tracker, run_id):
    """The number of logged points of each metric, the logged models, and the artifacts of a run."""
    run = tracker.client.get_run(run_id)
    history = {name: len(tracker.client.get_metric_history(run_id, name)) for name in run.data.metrics}
    models = tracker.client.search_logged_models([tracker.experiment_id], f"source_run_id = '{run_id}'")
    outputs = {output.model_id for output in run.outputs.model_outputs} if run.outputs else set()
    return history, [(str(model.status), model.model_id in outputs) for model in models]


class Killed(BaseException):
    pass


STEPS = [
    "create_run", "log_batch", "log_dict", "log_artifact", "create_logged_model", "log_model_artifacts", "log_outputs",
    "finalize_logged_model", "set_terminated",
]  # fmt: skip


@pytest.mark.parametrize(
    ("step", "has_answered"),
    [
        *((step, True) for step in STEPS),
        ("log_batch", False),
        ("log_model_artifacts", False),
        ("set_terminated", False),
    ],
)
def test_a_study_that_was_cut_short_anywhere_is_logged_once_and_whole(
    new_tracker, tmp_path, monkeypatch, step, has_answered
):
    outcome = replace(OUTCOME, model=str(exported_model(tmp_path / "model")), checkpoint=str(tmp_path / "best"))
    (tmp_path / "best").write_text("weights")

    def log(tracker):
        sweep = tracker.start_run("sweep", "sweep", "sweep")[0]
        run_id = tracker.start_run("study", "study", "study", sweep, params={"encoder": "e"})[0]
        logged = tracker.log_outcome(run_id, outcome)
        assert logged.run_id == run_id
        return run_id, logged.model_uri

    killed = new_tracker()
    before, count = getattr(killed.client, step), []

    def interrupted(*arguments, **options):
        count.append(step)
        last = {"create_run": 2, "log_batch": 3}.get(step, 1)
        if len(count) < last:
            return before(*arguments, **options)
        if has_answered:
            before(*arguments, **options)
        raise Killed

    monkeypatch.setattr(killed.client, step, interrupted)
    with pytest.raises(Killed):
        log(killed)
    run_id, model_uri = log(new_tracker())
    tracker = new_tracker()
    assert log(tracker) == (run_id, model_uri)
    assert len(runs_of(tracker)) == 2
    assert tracker.client.get_run(run_id).data.params == {"encoder": "e", "lr": "1"}
    assert status(tracker, run_id) == "FINISHED"
    assert points_of(tracker, run_id) == (dict.fromkeys(OUTCOME.metrics, 1), [("READY", True)])
    paths = {item.path for item in tracker.client.list_artifacts(run_id)}
    assert paths == {"confusion_matrix.json", "confusion_matrix.svg", "checkpoint"}


def test_an_outcome_that_has_changed_is_logged_again(new_tracker):
    tracker = new_tracker()
    run_id = tracker.start_run("study", "study", "study")[0]
    tracker.log_outcome(run_id, OUTCOME)
    tracker.log_outcome(run_id, replace(OUTCOME, metrics={**OUTCOME.metrics, "test/accuracy": 0.6}))
    history, _ = points_of(tracker, run_id)
    assert history == {**dict.fromkeys(OUTCOME.metrics, 1), "test/accuracy": 2}
    assert tracker.client.get_run(run_id).data.metrics["test/accuracy"] == 0.6


def test_runs_of_trials_have_the_tags_of_their_study_and_the_times_of_their_work(new_tracker):
    tracker = new_tracker()
    study, _ = tracker.start_run("s", "s", "study", tags={"raysweep.encoder": "dinov2"})
    params = {"encoder": "dinov2", "learning_rate": 0.1}
    tracker.log_trial(study, "s/0", "t", LoggedTrial(params, [], {}, status="FINISHED", started=1000.5, ended=1007.0))
    (run,) = runs_of(tracker, **{"raysweep.level": "trial"})
    assert run.data.tags["raysweep.encoder"] == "dinov2"
    assert run.data.params == {"encoder": "dinov2", "learning_rate": "0.1"}
    assert (run.info.start_time, run.info.end_time) == (1_000_500, 1_007_000)


def test_a_study_ends_when_its_work_ends_and_not_with_the_sweep(new_tracker):
    tracker = new_tracker()
    sweep = tracker.start_run("sweep", "sweep", "sweep")[0]
    run_id = tracker.start_run("s", "s", "study", sweep)[0]
    tracker.log_outcome(run_id, replace(OUTCOME, ended=5000.0))
    tracker.finish(run_id)
    assert tracker.client.get_run(run_id).info.end_time == 5_000_000
    again = new_tracker()
    assert again.start_run("s", "renamed", "study", sweep) == (run_id, False)
    again.log_outcome(run_id, OUTCOME)
    info = again.client.get_run(run_id).info
    assert (info.run_name, info.status, info.end_time) == ("renamed", "FINISHED", 5_000_000)


def test_a_better_setting_makes_a_new_run_with_the_trials_of_the_old_one(new_tracker):
    tracker = new_tracker()
    sweep = tracker.start_run("sweep", "sweep", "sweep")[0]
    old = tracker.start_run("s", "s", "study", sweep, params={"encoder": "e"})[0]
    tracker.log_trial(old, "s/0", "t", LoggedTrial(SETTING, ROWS, ROWS[-1], status="FINISHED"))
    assert tracker.log_outcome(old, OUTCOME).run_id == old
    again = new_tracker()
    again.start_run("sweep", "sweep", "sweep")
    again.start_run("s", "s", "study", sweep)
    new = again.log_outcome(old, replace(OUTCOME, params={"lr": 2})).run_id
    found = {run.info.run_id: run for run in runs_of(again)}
    assert old not in found
    assert found[new].data.params == {"encoder": "e", "lr": "2"}
    assert found[new].info.status == "FINISHED"
    assert found[new].data.metrics["test/accuracy"] == 0.5
    (trial,) = runs_of(again, **{"raysweep.level": "trial"})
    assert trial.data.tags["mlflow.parentRunId"] == new
    assert new_tracker().start_run("s", "s", "study", sweep) == (new, False)


@pytest.mark.parametrize("moment", ["log_batch", "set_tag", "delete_run"])
def test_a_replacement_that_was_cut_off_goes_on(new_tracker, monkeypatch, moment):
    tracker = new_tracker()
    sweep = tracker.start_run("sweep", "sweep", "sweep")[0]
    old = tracker.start_run("s", "s", "study", sweep)[0]
    tracker.log_trial(old, "s/0", "t", LoggedTrial(SETTING, ROWS, ROWS[-1], status="FINISHED"))
    tracker.log_outcome(old, OUTCOME)
    killed = new_tracker()
    killed.start_run("sweep", "sweep", "sweep")
    killed.start_run("s", "s", "study", sweep)

    def die(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(killed.client, moment, die)
    with pytest.raises(KeyboardInterrupt):
        killed.log_outcome(old, replace(OUTCOME, params={"lr": 2}))
    again = new_tracker()
    again.start_run("sweep", "sweep", "sweep")
    assert again.start_run("s", "s", "study", sweep) == (old, False), "the old run is still there"
    new = again.log_outcome(old, replace(OUTCOME, params={"lr": 2})).run_id
    (study,) = runs_of(again, **{"raysweep.level": "study"})
    assert (study.info.run_id, study.data.params["lr"]) == (new, "2")
    (trial,) = runs_of(again, **{"raysweep.level": "trial"})
    assert trial.data.tags["mlflow.parentRunId"] == new


def test_a_model_has_the_metrics_of_its_study_on_the_dataset_and_the_name_of_it(new_tracker, tmp_path):
    tracker = new_tracker()
    sweep = tracker.start_run("sweep", "sweep", "sweep")[0]
    tracker.log_dataset(sweep, "beans", "fingerprint", "images/beans", "{}")
    run_id = tracker.start_run("s", "s", "study", sweep)[0]
    outcome = replace(OUTCOME, model=str(exported_model(tmp_path / "model")), name="dinov2/probe")
    logged = tracker.log_outcome(run_id, outcome)
    model = tracker.client.get_logged_model(logged.model_uri.removeprefix("models:/"))
    assert (model.name, model.experiment_id) == ("dinov2-probe", tracker.experiment_id)
    linked = {metric.key: (metric.value, metric.dataset_name, metric.dataset_digest) for metric in model.metrics}
    assert linked["test/accuracy"] == (0.5, "beans", "fingerprint")
    version = tracker.register(logged.model_uri, "named-for-best")
    assert tracker.client.get_model_version_by_alias("named-for-best", "best").version == int(version)


def test_the_saved_view_is_of_studies_and_its_link_leads_to_the_pages_for_machine_learning(new_tracker):
    tracker = new_tracker()
    path = tracker.save_view()
    state = json.loads(tracker.client.get_experiment(tracker.experiment_id).tags["mlflow.sharedViewState.leaderboard"])
    tree = start_tree(tracker)
    found = tracker.client.search_runs([tracker.experiment_id], state["searchFilter"])
    assert {run.info.run_id for run in found} == {tree["probe"], tree["tune"]}
    assert path.startswith(f"/#/experiments/{tracker.experiment_id}/runs?workflowType=machine_learning&")
    assert path.endswith("viewStateShareKey=leaderboard")


@pytest.mark.parametrize("num_calls", range(1, 5))
def test_a_trial_that_was_cut_short_anywhere_is_logged_once_and_whole(new_tracker, monkeypatch, num_calls):
    monkeypatch.setattr(tracking, "METRICS_PER_BATCH", 3)
    trial = LoggedTrial(SETTING, ROWS, ROWS[-1], status="KILLED", error="stopped")
    killed = new_tracker()
    study, left = start_study(killed), [num_calls]

    def interrupt(before, *arguments, **options):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return before(*arguments, **options)

    for name in ("create_run", "log_batch", "set_terminated"):
        monkeypatch.setattr(killed.client, name, partial(interrupt, getattr(killed.client, name)))
    if num_calls < 4:
        with pytest.raises(Killed):
            killed.log_trial(study, "s/0", "t-0", trial)
    else:
        killed.log_trial(study, "s/0", "t-0", trial)
    again = new_tracker()
    again.log_missing_trials(start_study(again), [("s/0", "t-0", trial)])
    run = trial_of(again, study)
    assert (run.info.status, run.data.tags["raysweep.error"]) == ("KILLED", "stopped")
    assert run.data.params == {name: str(value) for name, value in SETTING.items()}
    assert curve(again, run, "val/accuracy") == [(1, 0.5), (2, 0.75)]
    assert curve(again, run, "train/loss") == [(1, 1.0), (2, 0.5)]
    assert curve(again, run, "best/val/accuracy") == [(0, 0.75)]


def test_a_dataset_is_an_input_once(new_tracker):
    for _ in range(2):
        tracker = new_tracker()
        run_id = tracker.start_run("key", "name", "sweep")[0]
        tracker.log_dataset(run_id, "beans", "0123456789abcdef", "hf://datasets/x/beans", "{}")
    assert len(tracker.client.get_run(run_id).inputs.dataset_inputs) == 1


def test_abandoned_runs_of_the_same_root_are_ended_and_others_are_left_alone(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    killed = open_tracker(uri, "beans")
    runs = {}
    for root in ("/data/runs/beans", "/data/runs/other"):
        sweep, _ = killed.start_run(f"sweep {root}", "beans", "sweep", tags=environment_tags(root))
        study, _ = killed.start_run("study", "probe", "study", parent=sweep)
        trial, _ = killed.start_run("study/0", "probe-0", "trial", parent=study)
        runs[root] = (sweep, study, trial)
    later = open_tracker(uri, "beans")
    later.start_run("another sweep", "beans", "sweep", tags=environment_tags("/data/runs/beans"))
    later.fail_unfinished_sweeps("/data/runs/beans")
    statuses = {root: [later.client.get_run(run).info.status for run in ids] for root, ids in runs.items()}
    assert statuses == {"/data/runs/beans": ["FAILED"] * 3, "/data/runs/other": ["RUNNING"] * 3}


def test_errors_of_the_store_in_mid_sweep_are_told_clearly():
    with pytest.raises(RaysweepError, match="the same command goes on"), convert_mlflow_errors("http://tracking"):
        raise mlflow.MlflowException("the disk is full")


def test_two_sweeps_that_start_on_a_new_store_at_once_both_get_it(tmp_path):
    code = "import sys; from raysweep.results.tracking import open_tracker; open_tracker(sys.argv[1], sys.argv[2])"
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    started = [subprocess.Popen([sys.executable, "-c", code, uri, name]) for name in ("first", "second")]
    assert [process.wait(120) for process in started] == [0, 0]
    names = {experiment.name for experiment in mlflow.MlflowClient(uri).search_experiments()}
    assert {"first", "second"} <= names
