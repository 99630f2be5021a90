"""A small sweep on handwritten digits that faults are tried on: how it runs, and what is wrong with what it leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.figures import ROOT
from benchmarks.sweeps import REMOVED_PREFIXES

EXPERIMENT: dict[str, Any] = {
    "name": "digits",
    "data": {"source": "sklearn://digits"},
    "encoders": [
        {"type": "stacked_cnn", "image_size": 16, "config": {"channels": [8, 16]}},
        {
            "type": "dinov2",
            "use_pretrained": False,
            "image_size": 16,
            "config": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8},
        },
    ],
    "modes": ["linear_probe", "fine_tune"],
    "search": {
        "linear_probe": {"num_trials": 16, "space": {"epochs": {"low": 5, "high": 20}}},
        "fine_tune": {"num_trials": 2, "space": {"epochs": 2}},
        "from_scratch": {"num_trials": 2, "space": {"epochs": 3}},
    },
    # Not the precision that a measurement finds faster: the next measurement may find another one.
    "train": {"augmentation": {"min_crop_scale": 0.7, "horizontal_flip": False}, "precision": "fp32"},
}
BUDGET = {"dinov2-linear_probe": 16, "dinov2-fine_tune": 2, "stacked_cnn-from_scratch": 2}
EXACT = ("best_params", "val_accuracy", "test_accuracy", "test_macro_f1", "num_trials", "num_test")
MEASURED = ("time/", "memory/", "gpu/", "train/images_per_second")  # work that is done again costs something else
POLL_S, TIMEOUT_S = 0.02, 300


@dataclass(frozen=True)
class Ended:
    """How a run of the command ended."""

    status: int
    stderr: str
    seconds: float


class SmallSweep:
    """The sweep of one folder: its command can be run, interrupted and run again."""

    def __init__(self, folder: Path, experiment: dict[str, Any] = EXPERIMENT) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "digits.yaml").write_text(yaml.safe_dump(experiment))
        self.num_runs = 0

    @property
    def root(self) -> Path:
        """The folder of its results."""
        return self.folder / "runs" / "digits"

    def copy(self, folder: Path) -> SmallSweep:
        """Returns the same sweep, with all that it has so far, in another folder."""
        shutil.copytree(self.folder, folder)
        return SmallSweep(folder)

    def start(self, *arguments: str, **environment: str) -> Running:
        """Starts the command, in a session of its own."""
        self.num_runs += 1
        log = self.folder / f"stderr-{self.num_runs}.txt"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(REMOVED_PREFIXES)}
        environment = kept | {"PYTHONPATH": str(ROOT)} | environment
        with log.open("w") as errors, (self.folder / f"stdout-{self.num_runs}.txt").open("w") as output:
            process = psutil.Popen(
                [sys.executable, "-m", "raysweep.run", "digits.yaml", *arguments],
                cwd=self.folder, env=environment, stdout=output, stderr=errors, start_new_session=True,
            )  # fmt: skip
        return Running(process, log, time.monotonic())

    def run(self, *arguments: str, **environment: str) -> Ended:
        """Runs the command to its end."""
        return self.start(*arguments, **environment).wait()

    def rows(self) -> dict[str, dict[str, Any]]:
        """The leaderboard by study, with the figures that no repetition may change."""
        rows = json.loads((self.root / "leaderboard.json").read_text())
        return {row["study"]: {name: row[name] for name in EXACT} for row in rows}

    def problems(self, expected: dict[str, dict[str, Any]]) -> list[str]:
        """Lists all that is lost, doubled, wrong or left behind; empty when the sweep ended as if uninterrupted."""
        return [*self._wrong_rows(expected), *self._wrong_trials(), *self._wrong_runs(), *self._left_behind()]

    def _wrong_rows(self, expected: dict[str, dict[str, Any]]) -> Iterator[str]:
        found = self.rows()
        if found.keys() != expected.keys():
            yield f"rows {sorted(found)}"
        for study in found.keys() & expected.keys():
            for name, value in expected[study].items():
                if found[study][name] != value:
                    yield f"{study}: {name} is {found[study][name]}, uninterrupted {value}"

    def _wrong_trials(self) -> Iterator[str]:
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        store = JournalStorage(JournalFileBackend(str(self.root / "optuna.journal")))
        found = {study.study_name.rpartition("-")[0]: study._study_id for study in store.get_all_studies()}
        if found.keys() != BUDGET.keys():
            yield f"studies {sorted(found)}"
        for name in found.keys() & BUDGET.keys():
            trials = store.get_all_trials(found[name])
            done = [json.dumps(trial.params, sort_keys=True) for trial in trials if trial.state.name == "COMPLETE"]
            open_trials = [trial.number for trial in trials if not trial.state.is_finished()]
            if len(done) != BUDGET[name]:
                yield f"{name}: {len(done)} trials of {BUDGET[name]}"
            yield from (f"{name}: {setting} ran {times} times" for setting, times in Counter(done).items() if times > 1)
            if open_trials:
                yield f"{name}: trials {open_trials} have not ended"

    def _wrong_runs(self) -> Iterator[str]:
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{self.folder}/mlflow.db")
        experiment = client.get_experiment_by_name("digits")
        runs = client.search_runs([experiment.experiment_id], max_results=5_000)
        yield from (f"run {run.info.run_name} is {run.info.status}" for run in runs if run.info.status == "RUNNING")
        for key, times in Counter(run.data.tags.get("raysweep.key") for run in runs).items():
            if times > 1 or key is None:
                yield f"MLflow has {times} runs of {key}"
        trials = [run for run in runs if run.data.tags.get("raysweep.level") == "trial"]
        finished = [run for run in trials if run.info.status == "FINISHED"]
        if len(finished) != sum(BUDGET.values()):
            yield f"MLflow has {len(finished)} finished trials of {sum(BUDGET.values())}"
        yield from (f"run {run.info.run_name} has no parameters" for run in trials if not run.data.params)
        for run in runs:
            histories = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
            twice = [
                name
                for name, points in histories.items()
                if len({point.step for point in points}) < len(points) and not name.startswith(MEASURED)
            ]
            if twice and run.info.status == "FINISHED":
                yield f"run {run.info.run_name}: {', '.join(twice)} logged twice"
        models = client.search_logged_models([experiment.experiment_id], max_results=100)
        for name, times in Counter(model.source_run_id for model in models).items():
            if times > 1:
                yield f"run {name} has {times} models"

    def _left_behind(self) -> Iterator[str]:
        for path in self.root.rglob("*"):
            if path.name == "last.safetensors" or (path.name.startswith(".") and path.name != ".lock"):
                yield f"{path.relative_to(self.root)} is left behind"


@dataclass
class Running:
    """A run of the command that has been started."""

    process: psutil.Popen
    log: Path
    started: float

    @property
    def stderr(self) -> str:
        """What it has said so far."""
        return self.log.read_text(errors="replace")

    def wait(self, timeout: float = TIMEOUT_S) -> Ended:
        """Waits for its end.

        Raises:
            TimeoutError: it has not ended in time; it is killed then.
        """
        try:
            status = self.process.wait(timeout)
        except psutil.TimeoutExpired:
            self.kill()
            raise TimeoutError(f"still running after {timeout} s:\n{self.stderr[-3000:]}") from None
        return Ended(int(status), self.stderr, time.monotonic() - self.started)

    def wait_until(self, *, says: str = "", seconds: float = 0) -> bool:
        """Waits until it has said a text, and then some seconds; returns whether it still runs."""
        deadline = time.monotonic() + TIMEOUT_S
        while says not in self.stderr and self.process.is_running() and time.monotonic() < deadline:
            if self.process.poll() is not None:
                return False
            time.sleep(POLL_S)
        time.sleep(seconds)
        return self.process.poll() is None

    def kill(self) -> None:
        """Ends the driver as a power cut does; what it has started ends by itself, or with the next run."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)

    def find(self, text: str) -> psutil.Process | None:
        """Returns a process that it has started, directly or not, and whose title or command line holds a text."""
        for child in self.process.children(recursive=True):
            try:
                if text in " ".join(child.cmdline()) or text in child.name():
                    return child
            except psutil.Error:
                continue
        return None

    def wait_for(self, text: str, timeout: float = TIMEOUT_S) -> psutil.Process:
        """Waits for such a process.

        Raises:
            LookupError: the run has ended without it, or the time is over.
        """
        deadline = time.monotonic() + timeout
        while self.process.poll() is None and time.monotonic() < deadline:
            if found := self.find(text):
                return found
            time.sleep(POLL_S)
        raise LookupError(f"no process '{text}':\n{self.stderr[-3000:]}")
