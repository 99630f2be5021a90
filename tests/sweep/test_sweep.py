"""Whole sweeps on real handwritten digits: some as a user runs them, the others in this process on one Ray.

The start of Ray, and of a process that imports torch, takes longer than these sweeps.
"""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import numpy as np
import optuna
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from PIL import Image
from safetensors.torch import load_file

from raysweep.cluster.session import ray_session
from raysweep.errors import ConfigError
from raysweep.run import main
from raysweep.sweep.sweep import only_sweep_in

pytestmark = pytest.mark.end_to_end

TINY_DINOV2 = {
    "type": "dinov2",
    "use_pretrained": False,
    "image_size": 16,
    "config": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8},
}
EXPERIMENT = {
    "name": "digits",
    "data": {"source": "sklearn://digits"},
    "encoders": [{"type": "stacked_cnn", "image_size": 16, "config": {"channels": [8, 16]}}, TINY_DINOV2],
    "modes": ["linear_probe", "fine_tune"],
    "search": {
        "linear_probe": {"num_trials": 20, "space": {"epochs": {"low": 5, "high": 20}}},
        "fine_tune": {"num_trials": 1, "space": {"epochs": 2}},
        "from_scratch": {"num_trials": 2, "space": {"epochs": 3}},
    },
    # Not the precision that a measurement finds faster: on a busy machine it may find another one the next time.
    "train": {"augmentation": {"min_crop_scale": 0.7, "horizontal_flip": False}, "precision": "fp32"},
}


def run(folder: Path, *arguments: str, experiment: dict = EXPERIMENT) -> subprocess.CompletedProcess[str]:
    (folder / "digits.yaml").write_text(yaml.safe_dump(experiment))
    return subprocess.run(command(*arguments), check=False, cwd=folder, capture_output=True, text=True, timeout=400)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "raysweep.run", "digits.yaml", *arguments]


def leaderboard(folder: Path) -> dict[str, dict]:
    rows = json.loads((folder / "runs" / "digits" / "leaderboard.json").read_text())
    return {row["study"]: row for row in rows}


def runs_by_level(folder: Path) -> dict[str, list]:
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    found = client.search_runs([client.get_experiment_by_name("digits").experiment_id], max_results=1000)
    return {
        level: [run for run in found if run.data.tags["raysweep.level"] == level]
        for level in ("sweep", "study", "trial")
    }


@pytest.fixture(scope="module")
def shared_ray():
    with ray_session(verbose=False):
        yield


@pytest.fixture
def run_here(shared_ray, monkeypatch, capfd):
    """Does what `run` does, in this process."""

    def run_in(folder: Path, *arguments: str, experiment: dict = EXPERIMENT) -> subprocess.CompletedProcess[str]:
        (folder / "digits.yaml").write_text(yaml.safe_dump(experiment))
        monkeypatch.chdir(folder)
        capfd.readouterr()
        status = main(["digits.yaml", *arguments])
        said = capfd.readouterr()
        return subprocess.CompletedProcess(arguments, status, said.out, said.err)

    return run_in


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    done = run(folder)
    assert done.returncode == 0, done.stderr
    (folder / "stdout.txt").write_text(done.stdout)
    (folder / "stderr.txt").write_text(done.stderr)
    return folder


def test_every_study_gets_a_row_with_honest_figures(finished: Path):
    rows = leaderboard(finished)
    probes = {"dinov2-linear_probe", "dinov2-knn", "dinov2-ridge", "dinov2-logistic"}
    assert set(rows) == probes | {"stacked_cnn-from_scratch", "dinov2-fine_tune"}
    for row in rows.values():
        assert row["test_accuracy_low"] <= row["test_accuracy"] <= row["test_accuracy_high"]
        assert (row["num_test"], row["num_seeds"]) == (359, 1)
        assert row["train_seconds"] > 0
        assert row["study_seconds"] >= 0
        assert row["peak_memory_bytes"] > 10**8
    probe = rows["dinov2-linear_probe"]
    assert probe["num_trials"] == 20
    assert probe["encoder_passes"] == 1
    assert probe["test_accuracy"] > 0.5, "even random features tell digits apart"
    searched = {"learning_rate", "epochs", "weight_decay", "features", "normalize"}
    assert set(probe["best_params"]) == searched | {"fitted_to"}
    for name, parameter in (("dinov2-knn", "k"), ("dinov2-ridge", "strength"), ("dinov2-logistic", "strength")):
        assert rows[name]["test_accuracy"] > 0.5
        assert parameter in rows[name]["best_params"]
        assert rows[name]["best_params"]["fitted_to"] == "train+validation"
    assert rows["dinov2-knn"]["model_path"] is None, "its images are its model"


def test_outputs_are_all_there_and_the_terminal_shows_them(finished: Path):
    root = finished / "runs" / "digits"
    for name in ("leaderboard.csv", "experiment.resolved.yaml", "quarantine.csv"):
        assert (root / name).stat().st_size > 0
    stdout, stderr = (finished / "stdout.txt").read_text(), (finished / "stderr.txt").read_text()
    assert "dinov2" in stdout
    assert "raysweep predict" in stdout
    assert f"report     {root.relative_to(finished)}/report.html" in stdout
    assert " is first on validation; its test accuracy is " in stdout
    assert "23 new trials, 1 encoder passes" in stderr
    assert "encoder pass (dinov2): 1,797 images" in stderr
    assert "Traceback" not in stderr
    assert "ray::" not in stderr, "Ray's own chatter is for --verbose"


def test_the_report_shows_every_study(finished: Path):
    root = finished / "runs" / "digits"
    page, rows = (root / "report.html").read_text(), leaderboard(finished)
    assert "Left out" not in page
    assert page.count("<summary>") == len(rows) + 1, "one a study, and the experiment"
    assert page.count("Most confident mistakes") == len(rows)
    predictions = pq.read_table(root / "predictions.parquet").to_pandas()
    for study, own in predictions.groupby("study"):
        assert (own["label"] == own["prediction"]).mean() == pytest.approx(rows[study]["test_accuracy"])
    assert set(predictions["study"]) == set(rows)
    assert pq.read_table(root / "trials.parquet").num_rows == 23


def test_mlflow_has_the_tree_with_curves_and_artifacts(finished: Path):
    levels = runs_by_level(finished)
    assert {level: len(runs) for level, runs in levels.items()} == {"sweep": 1, "study": 6, "trial": 23}
    assert {run.info.status for runs in levels.values() for run in runs} == {"FINISHED"}
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{finished}/mlflow.db")
    for trial in levels["trial"]:
        curve = client.get_metric_history(trial.info.run_id, "val/accuracy")
        assert [point.step for point in curve] == list(range(1, int(trial.data.params["epochs"]) + 1))
    (sweep,) = levels["sweep"]
    assert sweep.inputs.dataset_inputs
    assert sweep.data.tags["version.ray"]
    artifacts = {file.path for file in client.list_artifacts(sweep.info.run_id)}
    assert {"experiment.resolved.yaml", "leaderboard.json"} <= artifacts
    for study in levels["study"]:
        name = f"{study.data.params['encoder']}-{study.data.params['mode']}"
        assert study.data.metrics["test/accuracy"] == leaderboard(finished)[name]["test_accuracy"]
        setting = leaderboard(finished)[name]["best_params"]
        assert setting
        assert {key: str(value) for key, value in setting.items()}.items() <= study.data.params.items()
        names = {file.path for file in client.list_artifacts(study.info.run_id)}
        wanted = {"confusion_matrix.json", "confusion_matrix.svg"} | ({"checkpoint"} if name != "dinov2-knn" else set())
        assert wanted <= names


@pytest.mark.parametrize("study", ["dinov2-linear_probe", "dinov2-ridge", "dinov2-logistic"])
def test_exported_models_predict_what_the_leaderboard_says(finished: Path, tmp_path: Path, study: str):
    from sklearn.datasets import load_digits

    digits = load_digits()
    files = []
    for number in range(40):
        files.append(tmp_path / f"{number}.png")
        Image.fromarray((digits.images[number] / 16 * 255).astype(np.uint8)).save(files[-1])
    row = leaderboard(finished)[study]
    model = f"runs/digits/{row['model_path']}"
    predict = [sys.executable, "-m", "raysweep.predict", model, *map(str, files), "--format", "json"]
    done = subprocess.run(predict, check=False, capture_output=True, text=True, cwd=finished, timeout=120)
    assert done.returncode == 0, done.stderr
    predictions = json.loads(done.stdout)
    hits = [p["label"] == str(target) for p, target in zip(predictions, digits.target, strict=False)]
    assert np.mean(hits) > 0.5
    assert all(abs(sum(p["probabilities"].values()) - 1) < 1e-3 for p in predictions)


def test_the_same_sweep_again_does_nothing_and_more_trials_add_only_those(finished: Path):
    before = leaderboard(finished)
    again = run(finished)
    assert again.returncode == 0, again.stderr
    assert "0 new trials, 0 encoder passes" in again.stderr
    assert {name: row["test_accuracy"] for name, row in leaderboard(finished).items()} == {
        name: row["test_accuracy"] for name, row in before.items()
    }
    for cache in (finished / "runs" / ".cache").glob("features-*"):
        shutil.rmtree(cache)  # as the error of a damaged one advises
    more = run(finished, "--set", "search.linear_probe.num_trials=24")
    assert more.returncode == 0, more.stderr
    assert "4 new trials, 1 encoder passes" in more.stderr, "a cache that is made again costs no trial"
    assert leaderboard(finished)["dinov2-linear_probe"]["num_trials"] == 24


def test_going_back_to_an_earlier_experiment_brings_its_models_back(run_here, finished: Path):
    weights = finished / "runs" / "digits" / "models" / "dinov2-linear_probe" / "model.safetensors"
    all_trials = ("--set", "search.linear_probe.num_trials=24")
    before, rows = weights.read_bytes(), leaderboard(finished)
    other = run_here(
        finished, "--set", "modes=[linear_probe]", "--set", "seed=7", "--set", "search.linear_probe.num_trials=4"
    )
    assert other.returncode == 0, other.stderr
    assert weights.read_bytes() != before
    back = run_here(finished, *all_trials)
    assert back.returncode == 0, back.stderr
    assert "0 new trials, 0 encoder passes" in back.stderr
    assert weights.read_bytes() == before
    assert {name: row["test_accuracy"] for name, row in leaderboard(finished).items()} == {
        name: row["test_accuracy"] for name, row in rows.items()
    }


def test_a_new_store_is_told_everything_again(run_here, finished: Path):
    done = run_here(finished, "--set", "search.linear_probe.num_trials=24", "--set", "tracking.uri=sqlite:///other.db")
    assert done.returncode == 0, done.stderr
    assert "0 new trials" in done.stderr
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{finished}/other.db")
    runs = client.search_runs([client.get_experiment_by_name("digits").experiment_id], max_results=1000)
    assert sorted(run.data.tags["raysweep.level"] for run in runs) == ["study"] * 6 + ["sweep"] + ["trial"] * 27
    for row in leaderboard(finished).values():
        assert client.get_run(row["mlflow_run_id"]).data.metrics["test/accuracy"] == row["test_accuracy"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "terminated"])
def test_a_stopped_sweep_goes_on_and_leaves_no_run_running(tmp_path: Path, number: signal.Signals):
    experiment = EXPERIMENT | {"encoders": EXPERIMENT["encoders"][:1]}
    slow = ("--set", "search.from_scratch.space.epochs=20", "--set", "train.early_stopping_patience=20")
    (tmp_path / "digits.yaml").write_text(yaml.safe_dump(experiment))
    process = subprocess.Popen(command(*slow), cwd=tmp_path, stderr=subprocess.DEVNULL, start_new_session=True)
    checkpoints = tmp_path / "runs" / "digits" / "studies"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("*/*/trials/*/last.safetensors")):
        assert time.monotonic() < deadline, "no epoch was finished in two minutes"
        assert process.poll() is None, "the sweep ended before it could be killed"
        time.sleep(0.2)
    if number == signal.SIGKILL:
        os.killpg(process.pid, number)
        process.wait()
    else:
        process.send_signal(number)
        assert process.wait(60) == 128 + number
        assert "RUNNING" not in {run.info.status for runs in runs_by_level(tmp_path).values() for run in runs}
    done = run(tmp_path, *slow, experiment=experiment)
    assert done.returncode == 0, done.stderr
    assert leaderboard(tmp_path)["stacked_cnn-from_scratch"]["num_trials"] == 2
    levels = runs_by_level(tmp_path)
    assert len(levels["sweep"]) == len(levels["study"]) == 1
    statuses = [trial.info.status for trial in levels["trial"]]
    assert statuses.count("FINISHED") == 2
    assert "RUNNING" not in statuses


def test_few_shot_figures_are_over_several_draws_and_two_encoders_share_one_pass(run_here, tmp_path: Path):
    wider = TINY_DINOV2 | {"config": TINY_DINOV2["config"] | {"hidden_size": 48}}
    experiment = EXPERIMENT | {
        "data": {"source": "sklearn://digits", "shots": [5, "all"]},
        "encoders": [TINY_DINOV2, wider],
        "modes": ["linear_probe"],
    }
    done = run_here(tmp_path, "--set", "search.linear_probe.num_trials=4", experiment=experiment)
    assert done.returncode == 0, done.stderr
    assert "encoder pass (dinov2, dinov2-2): 1,797 images" in done.stderr
    assert done.stderr.count("1,797 images in ") == 2, "what was found, and one pass"
    assert "16 new trials, 2 encoder passes" in done.stderr
    rows = leaderboard(tmp_path)
    assert len(rows) == 16
    for encoder, mode in itertools.product(("dinov2", "dinov2-2"), ("linear_probe", "knn", "ridge", "logistic")):
        few, whole = rows[f"{encoder}-{mode}-5shot"], rows[f"{encoder}-{mode}"]
        assert few["test_accuracy"] < whole["test_accuracy"]
        assert (few["num_seeds"], whole["num_seeds"]) == (5, 1)
        (result,) = (tmp_path / "runs" / "digits" / "studies" / few["study"]).glob("*/result.json")
        accuracies = json.loads(result.read_text())["test"]["accuracies"]
        assert len(set(accuracies)) > 1, "each draw has its own head"
        assert few["test_accuracy"] == pytest.approx(np.mean(accuracies))
    few_studies = [study for study in runs_by_level(tmp_path)["study"] if study.data.params["shots"] == "5"]
    assert len(few_studies) == 8
    assert {study.data.params["num_train"] for study in few_studies} == {"50"}
    assert {study.data.params["num_test"] for study in few_studies} == {"359"}


def test_two_workers_give_what_one_gives(run_here, tmp_path: Path):
    experiment = EXPERIMENT | {"encoders": [TINY_DINOV2]}
    scores = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        small = ("--set", "search.linear_probe.num_trials=4", "--set", f"resources.num_workers={workers}")
        done = run_here(folder, *small, experiment=experiment)
        assert done.returncode == 0, done.stderr
        scores.append({name: row["val_accuracy"] for name, row in leaderboard(folder).items()})
    for name, score in scores[0].items():
        assert scores[1][name] == pytest.approx(score, abs=0.02)
    exported = "runs/digits/models/dinov2-fine_tune/model.safetensors"
    one, two = (load_file(tmp_path / workers / exported) for workers in ("1", "2"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-3, msg=name)


def test_without_disk_for_pixels_a_sweep_gives_the_same(run_here, finished: Path, tmp_path: Path):
    experiment = EXPERIMENT | {"encoders": EXPERIMENT["encoders"][:1]}
    no_disk = ("--set", "resources.pixel_disk_gb=0")
    done = run_here(tmp_path, *no_disk, experiment=experiment)
    assert done.returncode == 0, done.stderr
    assert "pixels are decoded anew in every epoch" in done.stderr
    assert "pixels are decoded anew" not in (finished / "stderr.txt").read_text()
    assert not list(tmp_path.rglob("rows-*.arrow"))
    found, expected = (leaderboard(folder)["stacked_cnn-from_scratch"] for folder in (tmp_path, finished))
    for key in ("best_params", "val_accuracy", "test_accuracy", "test_accuracy_low", "test_accuracy_high"):
        assert found[key] == expected[key]
    all_cpus = ("--set", f"resources.cpus_per_worker={max(2, len(os.sched_getaffinity(0)))}")
    refused = run_here(tmp_path, *no_disk, *all_cpus, "--set", "storage=elsewhere", experiment=experiment)
    assert refused.returncode == 1
    assert "1 for decoding" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "trainble=false"), "unknown key"),
        (("--set", "data.source=no_such_folder"), "no_such_folder"),
        (("--set", "resources.num_workers=1000"), "1000 CPUs"),
    ],
)
def test_errors_name_what_is_wrong(run_here, tmp_path: Path, arguments: tuple[str, ...], message: str):
    done = run_here(tmp_path, *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_has_one_sweep_at_a_time(tmp_path: Path):
    with only_sweep_in(tmp_path / "x"):
        with pytest.raises(ConfigError, match="x: another sweep is running here"), only_sweep_in(tmp_path / "x"):
            pass
        with only_sweep_in(tmp_path / "y"):
            pass
    with only_sweep_in(tmp_path / "x"):
        pass


@pytest.mark.parametrize(
    ("num_workers", "rates"),
    [(1, [3e-3, 1e-7, 1e-6, 1e-2, 1e-5, 3e-7]), (2, [3e-3, 1e-7, 1e-2])],
)
def test_a_scheduler_stops_hopeless_trials_and_chooses_one_that_ran_to_its_end(
    run_here, tmp_path: Path, num_workers: int, rates: list[float]
):
    block = {"scheduler": "asha", "sampler": "grid", "space": {"epochs": 6, "learning_rate": {"choices": rates}}}
    experiment = EXPERIMENT | {
        "encoders": EXPERIMENT["encoders"][:1],
        "search": {"from_scratch": block},
        "train": EXPERIMENT["train"] | {"early_stopping_patience": 6},
        "resources": {"num_workers": num_workers, "max_concurrent_trials": 1},
    }
    done = run_here(tmp_path, experiment=experiment)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    (study,) = (tmp_path / "runs" / "digits" / "studies" / "stacked_cnn-from_scratch").iterdir()
    (journal,) = (tmp_path / "runs").rglob("optuna.journal")
    storage = JournalStorage(JournalFileBackend(str(journal)))
    trials = optuna.load_study(study_name=f"stacked_cnn-from_scratch-{study.name}", storage=storage).get_trials()
    epochs = {trial.params["learning_rate"]: len(trial.intermediate_values) for trial in trials}
    pruned = {trial.params["learning_rate"] for trial in trials if trial.state.name == "PRUNED"}
    assert {rate for rate in rates if rate < 1e-4} <= pruned
    assert all(1 <= epochs[rate] < 6 for rate in pruned)
    assert all(epochs[rate] == 6 for rate in rates if rate not in pruned)
    assert f"{len(pruned)} of {len(rates)} trials stopped early (asha)" in done.stderr
    row = leaderboard(tmp_path)["stacked_cnn-from_scratch"]
    assert row["best_params"]["learning_rate"] not in pruned
    assert (row["num_trials"], row["encoder_passes"]) == (len(rates), sum(epochs.values()))
    assert row["test_accuracy"] > 0.5
    levels = runs_by_level(tmp_path)
    killed = [trial for trial in levels["trial"] if trial.info.status == "KILLED"]
    assert {float(trial.data.params["learning_rate"]) for trial in killed} == pruned
    assert all(trial.data.tags["raysweep.pruned"] == "true" for trial in killed)
    assert {trial.info.status for trial in levels["trial"]} == {"KILLED", "FINISHED"}
    assert len(list(study.glob("trials/*/*.safetensors"))) == 1, "of all but the chosen trial no weights are kept"
    again = run_here(tmp_path, experiment=experiment)
    assert again.returncode == 0, again.stderr
    assert "0 new trials" in again.stderr
    assert len(runs_by_level(tmp_path)["trial"]) == len(rates)
