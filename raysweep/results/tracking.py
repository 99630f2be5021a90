"""MLflow: the only importer of it, and the only writer to it, from the driver.

Runs form a tree, sweep > study > trial. Each carries a `raysweep.key` tag and is looked up by it before it is created,
so that a resumed sweep goes on in the runs it had.
"""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysweep.errors import RaysweepError

if TYPE_CHECKING:
    from mlflow.entities import Run

PACKAGES = ("raysweep", "ray", "torch", "transformers", "mlflow", "optuna")
METRICS_PER_BATCH = 1_000  # the server's limit
KEY, LEVEL, PARENT = "raysweep.key", "raysweep.level", "mlflow.parentRunId"


class Tracker:
    """Writes one sweep to MLflow.

    Args:
        uri: MLflow tracking URI.
        experiment: name of the MLflow experiment; created when missing.
    """

    def __init__(self, uri: str, experiment: str) -> None:
        # MLflow sets its own logger's level when it is imported.
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        logging.getLogger("alembic").setLevel(logging.WARNING)
        import mlflow

        # The model flavours know no other way of being told.
        mlflow.set_tracking_uri(uri)
        self.uri = uri
        self.client = mlflow.MlflowClient(tracking_uri=uri)
        try:
            found = self.client.get_experiment_by_name(experiment)
            self.experiment_id = found.experiment_id if found else self.client.create_experiment(experiment)
            if found is not None and found.lifecycle_stage == "deleted":
                self.client.restore_experiment(found.experiment_id)
        except mlflow.MlflowException as error:
            raise RaysweepError(f"tracking.uri: '{uri}' cannot be used as an MLflow store ({error})") from error
        self._children: dict[str, dict[str, Run]] = {}
        self._open: set[str] = set()

    def start_run(
        self, key: str, name: str, level: str, parent: str | None = None, tags: Mapping[str, str] | None = None
    ) -> tuple[str, bool]:
        """Returns the run that carries `key` under `parent`, and whether it had to be created."""
        known = self._runs_under(parent)
        self_tags = {KEY: key, LEVEL: level, **(tags or {})}
        if key in known:
            run_id = known[key].info.run_id
            self.client.update_run(run_id, status="RUNNING", name=name)
            self._open.add(run_id)
            return run_id, False
        if parent is not None:
            self_tags[PARENT] = parent
        run = self.client.create_run(self.experiment_id, tags=self_tags, run_name=name)
        known[key] = run
        self._open.add(run.info.run_id)
        return run.info.run_id, True

    def _runs_under(self, parent: str | None) -> dict[str, Run]:
        """Runs of ours by key; found once, then kept up to date by `start_run`."""
        slot = parent or ""
        if slot not in self._children:
            level = "tags.`raysweep.level` = 'sweep'"
            where = f"tags.`{PARENT}` = '{parent}'" if parent else level
            self._children[slot], token = {}, None
            while True:
                page = self.client.search_runs([self.experiment_id], where, max_results=1000, page_token=token)
                self._children[slot] |= {run.data.tags[KEY]: run for run in page if KEY in run.data.tags}
                token = page.token
                if not token:
                    break
        return self._children[slot]

    def log_once(self, run_id: str, params: Mapping[str, Any], tags: Mapping[str, str] | None = None) -> None:
        """Logs parameters and tags in one call; a parameter that already stands must have the same value."""
        from mlflow.entities import Param, RunTag

        entries = [Param(name, str(value)[:6000]) for name, value in params.items()]
        self.client.log_batch(run_id, params=entries, tags=[RunTag(n, v) for n, v in (tags or {}).items()])

    def log_history(self, run_id: str, history: Sequence[Mapping[str, float]], first_epoch: int = 0) -> None:
        """Logs one dict of metrics per epoch; the step is the number of epochs done."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(name, value, now, epoch)
            for epoch, values in enumerate(history, start=first_epoch + 1)
            for name, value in values.items()
        ]
        for start in range(0, len(metrics), METRICS_PER_BATCH):
            self.client.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_BATCH])

    def log_metrics(self, run_id: str, metrics: Mapping[str, float | None]) -> None:
        """Logs final figures, leaving out those that there are none of."""
        known = {name: float(value) for name, value in metrics.items() if value is not None}
        self.log_history(run_id, [known], first_epoch=-1)

    def log_dataset(self, run_id: str, name: str, digest: str, source: str, profile: str) -> None:
        """Records what a run was trained on, as an MLflow dataset input."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(name=name[:500], digest=digest, source_type="raysweep", source=source, profile=profile)
        self.client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])

    def log_file(self, run_id: str, path: Path, folder: str | None = None) -> None:
        """Copies a file, or a folder's content, to the run's artifacts."""
        log = self.client.log_artifacts if path.is_dir() else self.client.log_artifact
        log(run_id, str(path), folder)

    def log_dict(self, run_id: str, value: Any, name: str) -> None:
        """Writes a JSON artifact."""
        self.client.log_dict(run_id, value, name)

    def log_model(self, run_id: str, folder: Path, classes: Sequence[str]) -> str:
        """Logs an exported model as a pyfunc: encoded images in, label and probabilities out. Returns its URI.

        By loader module, so that no pickle is written.
        """
        import mlflow.pyfunc
        from mlflow.models import Model, ModelSignature
        from mlflow.pyfunc import log_model  # noqa: F401  # registers the flavour
        from mlflow.types import ColSpec, DataType, Schema

        outputs = [ColSpec(DataType.string, "label"), ColSpec(DataType.double, "probability")]
        outputs += [ColSpec(DataType.double, f"probability_{name}") for name in classes]
        signature = ModelSignature(Schema([ColSpec(DataType.binary, "image")]), Schema(outputs))
        info = Model.log(
            artifact_path=None,
            name="model",
            flavor=mlflow.pyfunc,
            run_id=run_id,
            loader_module="raysweep.results.model",
            data_path=str(folder),
            signature=signature,
            pip_requirements=[f"{name}=={_version(name)}" for name in ("raysweep", "torch", "transformers", "pillow")],
        )
        return str(info.model_uri)

    def register(self, model_uri: str, name: str) -> str:
        """Registers a logged model; returns its version."""
        import mlflow

        return str(mlflow.register_model(model_uri, name).version)

    def finish(self, run_id: str, failed: bool = False) -> None:
        """Ends a run as FINISHED or FAILED."""
        self.client.set_terminated(run_id, status="FAILED" if failed else "FINISHED")
        self._open.discard(run_id)

    def fail_left_running(self, parent: str) -> None:
        """Ends runs under `parent` that an earlier, killed invocation left running."""
        for run in self._runs_under(parent).values():
            if run.info.status == "RUNNING" and run.info.run_id not in self._open:
                self.finish(run.info.run_id, failed=True)

    def close(self) -> None:
        """Ends every run that is still open as FAILED; called on the way out of a sweep, however it went."""
        for run_id in list(self._open):
            self.finish(run_id, failed=True)


def environment_tags() -> dict[str, str]:
    """Versions of what results depend on, and the git commit of the working directory."""
    tags = {f"version.{name}": _version(name) for name in PACKAGES}
    tags["version.python"] = platform.python_version()
    command = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return tags | ({"mlflow.source.git.commit": commit} if commit else {})


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
