"""A sweep submitted to two nodes, with all that a cluster has: a token, a bucket, an MLflow server and PostgreSQL."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from nodes import TOKEN, running_nodes
from services import PASSWORD, mlflow_server, postgres, s3_server

from raysweep import predict
from raysweep.storage.copies import fetch, fetch_folder, local_path

EXPERIMENT = """
data: {source: 'sklearn://digits'}
encoders:
  - type: stacked_cnn
    image_size: 32
    config: {channels: [8, 16]}
  - type: dinov2
    use_pretrained: false
    image_size: 32
    config: {hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, patch_size: 8}
modes: [linear_probe, fine_tune]
search:
  linear_probe: {num_trials: 16}
  fine_tune: {num_trials: 2, space: {epochs: 3}}
  from_scratch: {num_trials: 2, space: {epochs: 3}}
train: {augmentation: {horizontal_flip: false}, precision: fp32}
"""
STUDIES = {"stacked_cnn-from_scratch": 2, "dinov2-linear_probe": 16, "dinov2-fine_tune": 2}
SAME = ("study", "num_trials", "best_params", "val_accuracy", "test_accuracy", "test_accuracy_low",
        "test_accuracy_high", "test_macro_f1", "num_test", "tied_with_best")  # fmt: skip


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory):
    """The same experiment by the same file: submitted to two nodes, and run on this machine."""
    folder = tmp_path_factory.mktemp("sweeps")
    (folder / "digits.yaml").write_text(EXPERIMENT)
    with postgres() as database, s3_server(folder, "sweeps") as s3, mlflow_server(folder, database) as mlflow:
        # What says where things are kept belongs to the nodes, not to the file.
        of_the_nodes = s3 | {
            "RAYSWEEP_STORAGE": "s3://sweeps/team",
            "RAYSWEEP_OPTUNA_URI": f"{database}/optuna",
            "PGPASSWORD": PASSWORD,
            "MLFLOW_TRACKING_URI": mlflow,
        }
        with running_nodes(1, of_the_nodes) as nodes:
            submit = [sys.executable, "-m", "raysweep.submit", "digits.yaml", "--no-pip", "--address", nodes.dashboard]
            token = os.environ | {"RAY_AUTH_TOKEN": TOKEN}
            submitted = subprocess.run(submit, cwd=folder, env=token, capture_output=True, text=True, check=False)
            run = [sys.executable, "-m", "raysweep.run", "digits.yaml"]
            with ThreadPoolExecutor(1) as beside:
                local = beside.submit(subprocess.run, run, cwd=folder, capture_output=True, text=True, check=False)
                again = subprocess.run(submit, cwd=folder, env=token, capture_output=True, text=True, check=False)
            seen = [path.name for path in nodes.folder.glob("*/scratch/s3/sweeps/team/.cache/features-*/*/rows-*")]
        patch = pytest.MonkeyPatch()
        for name, value in (of_the_nodes | {"RAYSWEEP_SCRATCH": str(folder / "scratch")}).items():
            patch.setenv(name, value)
        yield {"submitted": submitted, "again": again, "local": local.result(), "folder": folder, "seen": seen}
        patch.undo()


pytestmark = pytest.mark.end_to_end


def test_the_submission_shows_its_progress_and_its_leaderboard(sweeps):
    done = sweeps["submitted"]
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.partition("] ")[2] for line in done.stdout.splitlines() if line.startswith("[")]
    assert "Ray is up: 2 CPUs, 0 GPUs on 2 nodes" in lines
    assert "done: 20 new trials, 1 encoder passes" in lines
    assert "Leaderboard, ordered by validation" in done.stdout
    assert "predict    raysweep predict s3://sweeps/team/digits/models/" in done.stdout
    noise = ("WARNING", "View run", "Traceback", "DeprecationWarning")
    assert not [line for line in done.stdout.splitlines() if any(word in line for word in noise)]
    assert PASSWORD not in done.stdout + done.stderr
    assert TOKEN not in done.stdout + done.stderr


def test_two_nodes_give_what_this_machine_gives(sweeps):
    assert sweeps["local"].returncode == 0, sweeps["local"].stdout + sweeps["local"].stderr
    here = json.loads((sweeps["folder"] / "runs" / "digits" / "leaderboard.json").read_text())
    there = json.loads(fetch(local_path("s3://sweeps/team/digits/leaderboard.json")).read_text())
    assert len(here) == len(STUDIES) + 3  # and three baselines
    assert [{key: row[key] for key in SAME} for row in there] == [{key: row[key] for key in SAME} for row in here]


def test_a_submission_that_was_finished_does_nothing(sweeps):
    assert sweeps["again"].returncode == 0, sweeps["again"].stdout + sweeps["again"].stderr
    assert "done: 0 new trials, 0 encoder passes" in sweeps["again"].stdout


def test_the_models_come_from_the_bucket(sweeps, capsys, tmp_path):
    from PIL import Image

    Image.new("RGB", (16, 16)).save(tmp_path / "one.png")
    model = "s3://sweeps/team/digits/models/dinov2-linear_probe"
    assert predict.main([model, str(tmp_path / "one.png"), "--format", "json"]) == 0
    assert len(json.loads(capsys.readouterr().out)[0]["probabilities"]) == 10


def test_the_bucket_holds_the_sweep_and_the_nodes_what_they_used(sweeps):
    names = fetch_folder(local_path("s3://sweeps/team"), lambda name: not name.endswith(".safetensors"))
    assert {"digits/leaderboard.csv", "digits/experiment.resolved.yaml", "digits/quarantine.csv"} <= set(names)
    assert not [name for name in names if name.endswith("optuna.journal")], "Optuna has a database"
    cached = [name for name in names if name.startswith(".cache/features-") and name.endswith(".parquet")]
    assert set(sweeps["seen"]) == {name.rpartition("/")[2] for name in cached}


def test_mlflow_has_every_run_once(sweeps):
    import mlflow

    client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("digits")
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    levels = {level: [run for run in runs if run.data.tags["raysweep.level"] == level] for level in
              ("sweep", "study", "trial")}  # fmt: skip
    assert [len(found) for found in levels.values()] == [1, len(STUDIES) + 3, sum(STUDIES.values())]
    assert {run.info.status for run in runs} == {"FINISHED"}
    trial = levels["trial"][0]
    assert client.get_metric_history(trial.info.run_id, "val/accuracy")
    study = next(run for run in levels["study"] if run.info.run_name == "dinov2 · fine_tune")
    assert "checkpoint" in [file.path for file in client.list_artifacts(study.info.run_id)]


def test_optunas_studies_are_in_the_database(sweeps):
    import optuna

    from raysweep.sweep.trial_store import open_store

    store = open_store(os.environ["RAYSWEEP_OPTUNA_URI"])
    names = [study.study_name for study in optuna.get_all_study_summaries(store)]
    counts = {name: len(optuna.load_study(study_name=name, storage=store).trials) for name in names}
    # Sweep, place, study, signature: several sweeps share the database.
    named = {re.fullmatch(r"digits-[0-9a-f]{16}-(.+)-[0-9a-f]{16}", name)[1]: name for name in names}
    assert {study: counts[name] for study, name in named.items()} == STUDIES
