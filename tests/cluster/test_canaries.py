"""The canary search: secrets in the environment of a sweep are found in nothing that it, Ray or MLflow writes.

Two sweeps, one with a Ray of its own and one that joins two nodes. Searched are all files of Ray's sessions while the
sweep runs and after it, command lines, Ray's state API, the MLflow store, the folder of the sweep, and what is printed.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest
import yaml
from nodes import TOKEN, running_nodes

pytestmark = [pytest.mark.end_to_end, pytest.mark.slow]

NAMES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN", "HF_TOKEN",
         "HUGGING_FACE_HUB_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "PGPASSWORD", "DATABASE_URL",
         "AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_ACCESS_KEY", "GITHUB_TOKEN", "WANDB_API_KEY",
         "KAGGLE_KEY")  # fmt: skip
CANARIES = {name: f"canary{number:02d}of7e1f" for number, name in enumerate(NAMES)}
MARK = b"of7e1f"
EXPERIMENT = {
    "name": "canaries",
    "data": {"source": "sklearn://digits"},
    "encoders": [
        {
            "type": "dinov2",
            "use_pretrained": False,
            "image_size": 16,
            "config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8},
        }
    ],
    "modes": ["linear_probe", "fine_tune"],
    "search": {
        "linear_probe": {"num_trials": 8, "space": {"epochs": 5}},
        "fine_tune": {"num_trials": 1, "space": {"epochs": 1}},
    },
    "train": {"augmentation": {"horizontal_flip": False}, "precision": "fp32"},
}
STATE = ("actors", "tasks", "workers", "nodes", "jobs", "runtime_envs", "placement_groups", "objects", "cluster_events")


class Search:
    """Searches files; remembers where canaries were found, and how much was read."""

    def __init__(self) -> None:
        self.found: set[str] = set()
        self.files: set[str] = set()

    def folder(self, folder: Path) -> None:
        for path in folder.rglob("*"):
            try:
                if path.is_file():
                    self.files.add(str(path))
                    self.text(str(path), path.read_bytes())
            except OSError:  # removed meanwhile, or a socket
                continue

    def command_lines(self) -> None:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                self.text(str(path), path.read_bytes())
            except OSError:
                continue

    def text(self, name: str, content: bytes) -> None:
        if MARK in content:
            self.found.add(name)


def run_sweep(folder: Path, search: Search, session_folder: Path, **variables: str) -> None:
    """Runs the sweep, and searches Ray's files as long as they exist."""
    (folder / "canaries.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    process = subprocess.Popen(
        [sys.executable, "-m", "raysweep.run", "canaries.yaml", "--verbose"],
        cwd=folder, env=os.environ | CANARIES | variables, stdout=(folder / "output").open("w"),
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    while process.poll() is None:
        search.folder(session_folder)
        search.command_lines()
        time.sleep(0.2)
    assert process.returncode == 0, (folder / "output").read_text()[-3000:]
    search.folder(folder)


@pytest.fixture
def short():
    """A folder with a path that is short enough for Ray's sockets."""
    folder = Path(tempfile.mkdtemp(prefix="c", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_the_search_finds_a_canary(tmp_path):
    search = Search()
    (tmp_path / "log").write_text(f"env_vars: {CANARIES['HF_TOKEN']}")
    search.folder(tmp_path)
    assert search.found == {str(tmp_path / "log")}


def test_a_sweep_with_a_ray_of_its_own_writes_no_secret(tmp_path, short):
    search = Search()
    run_sweep(tmp_path, search, short, TMPDIR=str(short))
    assert search.found == set()
    assert {"raylet.out", "gcs_server.out", "mlflow.db"} <= {Path(name).name for name in search.files}


def test_a_sweep_on_two_nodes_writes_no_secret(tmp_path):
    search = Search()
    with running_nodes(1) as nodes:
        scratch = str(nodes.folder / "0" / "scratch")
        run_sweep(tmp_path, search, nodes.folder, RAY_ADDRESS=nodes.gcs, RAYSWEEP_SCRATCH=scratch, **nodes.environment)
        search.folder(nodes.folder)
        for name in [*(f"/api/v0/{kind}?detail=true&limit=1000" for kind in STATE), "/api/jobs/"]:
            request = urllib.request.Request(nodes.dashboard + name, headers={"Authorization": f"Bearer {TOKEN}"})
            with urllib.request.urlopen(request, timeout=30) as answer:
                content = answer.read()
            assert b"result" in content or b"[" in content, content
            search.text(name, content)
    assert search.found == set()
    assert {"raylet.out", "gcs_server.out", "mlflow.db"} <= {Path(name).name for name in search.files}
