"""MLflow: only this module imports it and writes to it.

Runs form a tree: sweep > study > trial. Each run has a tag `raysweep.key`. A run is searched by this tag before it is
created, so that a resumed sweep continues its runs.
"""

from __future__ import annotations

import io
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock

from raysweep.errors import RaysweepError
from raysweep.results.environment import ROOT_TAG, package_version

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

METRICS_PER_BATCH = 1_000  # the server's limit
MAX_TAG_LENGTH = 5_000  # the server's limit
MODEL_URI = "raysweep.model_uri"
# Without this tag, the UI shows its pages for language models first.
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
SOURCE_TAGS = {"mlflow.source.name": "raysweep", "mlflow.source.type": "LOCAL"}
RunStatus = Literal["FINISHED", "FAILED", "KILLED"]
KEY, LEVEL, PARENT = "raysweep.key", "raysweep.level", "mlflow.parentRunId"


@dataclass(frozen=True)
class LoggedTrial:
    """A trial that ended, for MLflow: `history` from `first_epoch` on, and `final`, the metrics that rank it.

    If a scheduler stopped the trial early, its status is KILLED.
    """

    setting: Mapping[str, Any]
    history: Sequence[Mapping[str, float]]
    final: Mapping[str, float]
    status: RunStatus
    error: str | None = None
    first_epoch: int = 0


def open_tracker(uri: str, experiment: str) -> Tracker:
    """Opens an MLflow store.

    Args:
        uri: MLflow tracking URI.
        experiment: name of the MLflow experiment; created if missing.

    Raises:
        RaysweepError: the store does not exist, or cannot be reached.
    """
    # MLflow sets its logger's level when it is imported.
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    # Otherwise MLflow prints the URL of every run.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    import mlflow

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    # The model flavours read only this global URI.
    mlflow.set_tracking_uri(uri)
    # A store raises many types, from a missing driver to a folder that cannot be created; the cause is the URI.
    try:
        _check_postgresql_answers(uri)
        with _without_retries(), _schema_lock(uri):
            client = mlflow.MlflowClient(tracking_uri=uri)
            client.get_experiment_by_name(experiment)
        return Tracker(client, _experiment_id(client, experiment))
    except Exception as error:
        raise RaysweepError(f"tracking.uri: '{uri}' cannot be used as an MLflow store ({error})") from error


def _experiment_id(client: MlflowClient, name: str) -> str:
    """Returns the id of an experiment; creates or restores it if needed."""
    from mlflow import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, tags=EXPERIMENT_TAGS))
        except MlflowException:  # another sweep has just created it
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


class Tracker:
    """Writes one sweep to MLflow; made by `open_tracker`.

    Args:
        client: client of the store.
        experiment_id: id of the MLflow experiment.
    """

    def __init__(self, client: MlflowClient, experiment_id: str) -> None:
        self.client, self.experiment_id = client, experiment_id
        self._children: dict[str, dict[str, Run]] = {}
        self._open: set[str] = set()

    def start_run(
        self, key: str, name: str, level: str, parent: str | None = None, tags: Mapping[str, str] | None = None
    ) -> tuple[str, bool]:
        """Returns the id of the run with `key` under `parent`, and whether it was created now."""
        known = self._runs_under(parent)
        own_tags = {KEY: key, LEVEL: level, **SOURCE_TAGS, **(tags or {})}
        if key in known:
            run_id = known[key].info.run_id
            self.client.update_run(run_id, status="RUNNING", name=name)
            self._open.add(run_id)
            return run_id, False
        if parent is not None:
            own_tags[PARENT] = parent
        run = self.client.create_run(self.experiment_id, tags=own_tags, run_name=name)
        known[key] = run
        self._open.add(run.info.run_id)
        return run.info.run_id, True

    def _runs_under(self, parent: str | None) -> dict[str, Run]:
        """Returns raysweep's runs by key; searched once, then updated by `start_run`."""
        parent_key = parent or ""
        if parent_key not in self._children:
            level = "tags.`raysweep.level` = 'sweep'"
            where = f"tags.`{PARENT}` = '{parent}'" if parent else level
            self._children[parent_key], token = {}, None
            while True:
                page = self.client.search_runs([self.experiment_id], where, max_results=1000, page_token=token)
                self._children[parent_key] |= {run.data.tags[KEY]: run for run in page if KEY in run.data.tags}
                token = page.token
                if not token:
                    break
        return self._children[parent_key]

    def log_once(self, run_id: str, params: Mapping[str, Any], tags: Mapping[str, str] | None = None) -> None:
        """Logs parameters and tags in one call. A parameter that is already logged must have the same value."""
        from mlflow.entities import Param, RunTag

        entries = [Param(name, str(value)[:6000]) for name, value in params.items()]
        run_tags = [RunTag(name, value[:MAX_TAG_LENGTH]) for name, value in (tags or {}).items()]
        self.client.log_batch(run_id, params=entries, tags=run_tags)

    def log_history(self, run_id: str, history: Sequence[Mapping[str, float]], first_epoch: int = 0) -> None:
        """Logs one dict of metrics per epoch; the step is the number of finished epochs."""
        metrics = _to_metrics(history, first_epoch)
        for start in range(0, len(metrics), METRICS_PER_BATCH):
            self.client.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_BATCH])

    def log_epoch(
        self, parent: str, key: str, name: str, setting: Mapping[str, Any], epoch: int, metrics: Mapping[str, float]
    ) -> None:
        """Logs an epoch of a trial that is still running; the first one starts its run."""
        run_id, created = self.start_run(key, name, "trial", parent)
        if created:
            self.log_once(run_id, setting)
        self.log_history(run_id, [metrics], epoch)

    def log_trial(self, parent: str, key: str, name: str, trial: LoggedTrial) -> None:
        """Logs a trial that ended, and ends its run; in few calls, because there can be hundreds of trials."""
        from mlflow.entities import Param, RunTag

        run_id, created = self.start_run(key, name, "trial", parent)
        best = {f"best/{name}": value for name, value in trial.final.items() if name.startswith("val/")}
        metrics = [*_to_metrics(trial.history, trial.first_epoch), *_to_metrics([best], -1)]
        params = [Param(name, str(value)) for name, value in trial.setting.items()] if created else []
        tags = [RunTag("raysweep.error", trial.error[:MAX_TAG_LENGTH])] if trial.error else []
        tags += [RunTag("raysweep.pruned", "true")] if trial.status == "KILLED" else []
        for start in range(METRICS_PER_BATCH, len(metrics), METRICS_PER_BATCH):
            self.client.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_BATCH])
        self.client.log_batch(run_id, metrics[:METRICS_PER_BATCH], params, tags)
        self.finish(run_id, trial.status)

    def log_missing_trials(self, parent: str, trials: Sequence[tuple[str, str, LoggedTrial]]) -> None:
        """Logs trials `(key, name, trial)` that are incomplete: the sweep was killed, or the store is new."""
        for key, name, trial in trials:
            run = self._runs_under(parent).get(key)
            if run is None or run.info.status != trial.status:
                self.log_trial(parent, key, name, trial)

    def log_metrics(self, run_id: str, metrics: Mapping[str, float | None]) -> None:
        """Logs final metrics, except those that are None."""
        known = {name: float(value) for name, value in metrics.items() if value is not None}
        self.log_history(run_id, [known], first_epoch=-1)

    def log_dataset(self, run_id: str, name: str, digest: str, source: str, profile: str) -> None:
        """Logs the data of a run as an MLflow dataset input."""
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
        """Logs an exported model as a pyfunc from encoded images to label and probabilities; returns its URI.

        It is logged with a loader module, so that no pickle is written.
        """
        import mlflow.pyfunc
        from mlflow.models import Model, ModelSignature
        from mlflow.pyfunc import log_model  # noqa: F401  # registers the flavour
        from mlflow.types import ColSpec, DataType, Schema

        numbers = ["probability", *(f"probability_{name}" for name in classes)]
        outputs = Schema([ColSpec(DataType.string, "label"), *(ColSpec(DataType.double, name) for name in numbers)])
        signature = ModelSignature(Schema([ColSpec(DataType.binary, "image")]), outputs)
        info = Model.log(
            artifact_path=None,
            name="model",
            flavor=mlflow.pyfunc,
            run_id=run_id,
            loader_module="raysweep.results.model",
            data_path=str(folder),
            signature=signature,
            pip_requirements=[
                f"{name}=={package_version(name)}" for name in ("raysweep", "torch", "transformers", "pillow")
            ],
        )
        return str(info.model_uri)

    def register(self, model_uri: str, name: str) -> str:
        """Registers a logged model, unless a version of that name has it already; returns the version."""
        import mlflow

        for known in self.client.search_model_versions(f"name = '{name}'"):
            if known.tags.get(MODEL_URI) == model_uri:
                return str(known.version)
        with redirect_stderr(io.StringIO()):  # MLflow prints the version, and so does the caller
            return str(mlflow.register_model(model_uri, name, tags={MODEL_URI: model_uri}).version)

    def finish(self, run_id: str, status: RunStatus = "FINISHED") -> None:
        """Ends a run."""
        self.client.set_terminated(run_id, status=status)
        self._open.discard(run_id)

    def fail_unfinished_sweeps(self, root: str) -> None:
        """Ends runs that killed invocations left running, of all sweeps in `root`; the caller holds its lock."""
        for run in self._runs_under(None).values():
            if run.data.tags.get(ROOT_TAG) != root:
                continue
            run_id = run.info.run_id
            if run_id in self._open or run.info.status == "RUNNING":
                for study in self._runs_under(run_id).values():
                    if study.info.status == "RUNNING":
                        self.fail_unfinished_runs(study.info.run_id)
                self.fail_unfinished_runs(run_id)
            if run.info.status == "RUNNING" and run_id not in self._open:
                self.finish(run_id, "FAILED")

    def fail_unfinished_runs(self, parent: str) -> None:
        """Ends runs under `parent` that a killed invocation left running, as FAILED."""
        self._children.pop(parent, None)  # the stored runs have the status from the time of the search
        for run in self._runs_under(parent).values():
            if run.info.status == "RUNNING" and run.info.run_id not in self._open:
                self.finish(run.info.run_id, "FAILED")

    def close(self) -> None:
        """Ends open runs as FAILED; called at the end of every sweep, failed or not."""
        from mlflow import MlflowException

        with _without_retries(), suppress(MlflowException):  # an error of a lost store must not hide why the sweep ends
            for run_id in list(self._open):
                self.finish(run_id, "FAILED")


def _to_metrics(history: Sequence[Mapping[str, float]], first_epoch: int) -> list[Metric]:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    return [
        Metric(name, value, now, epoch)
        for epoch, values in enumerate(history, start=first_epoch + 1)
        for name, value in values.items()
    ]


def _check_postgresql_answers(uri: str) -> None:
    """Connects once to a PostgreSQL server, and raises if it does not answer: MLflow would retry for minutes."""
    scheme, _, rest = uri.partition("://")
    if scheme.partition("+")[0] == "postgresql":
        import psycopg

        psycopg.connect(f"postgresql://{rest}", connect_timeout=10).close()


@contextmanager
def _without_retries() -> Iterator[None]:
    """Makes MLflow's HTTP client try only once; by default it retries for minutes before it raises."""
    name = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    before = os.environ.get(name)
    os.environ[name] = before or "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


@contextmanager
def convert_mlflow_errors(uri: str) -> Iterator[None]:
    """Converts MLflow's errors, because the store worked when the sweep started.

    Raises:
        RaysweepError: MLflow raised.
    """
    from mlflow import MlflowException

    try:
        yield
    except MlflowException as error:
        reason = " ".join(str(error).split())[:500]
        lost = "what is finished is kept, and the same command goes on from here"
        raise RaysweepError(f"tracking.uri: the MLflow store '{uri}' refused: {reason}; {lost}") from error


@contextmanager
def _schema_lock(uri: str) -> Iterator[None]:
    """Locks a SQLite store while its schema is created or migrated: two processes at once would break it for good."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    path = Path(uri.removeprefix("sqlite:///").partition("?")[0])
    if not path.parent.is_dir():  # FileLock would create the folder of a mistyped URI
        raise FileNotFoundError(f"no such folder: '{path.parent}'")
    with FileLock(path.with_name(f".{path.name}.lock")):
        yield
