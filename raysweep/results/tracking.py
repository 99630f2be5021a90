"""MLflow: the runs of sweeps, studies and trials.

Runs form a tree: sweep > study > trial. Each run has a tag `raysweep.key`. A run is searched by this tag before it is
created, so that a resumed sweep continues its runs. What was logged is decided by what a run has, so each call can be
repeated after it was cut short: it adds what is missing, and nothing twice. No call reads or writes MLflow's global
state (active run, default experiment, environment variables).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raysweep.errors import RaysweepError
from raysweep.results.confusion_matrix import confusion_matrix_svg
from raysweep.results.environment import ROOT_TAG
from raysweep.results.logged_model import MODEL_URI, PREFIX, log_model, register_model
from raysweep.results.mlflow_store import open_client, without_retries
from raysweep.results.mlflow_view import VIEW_TAG, view_path, view_state
from raysweep.storage.copies import fetch, fetch_folder, local_path
from raysweep.storage.paths import signature

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

METRICS_PER_BATCH = 800  # the server allows 1,000 of all, and of these 100 parameters and 100 tags
MAX_TAG_LENGTH = 5_000  # the server's limit
REPLACES = "raysweep.replaces"  # of a study's run: id of the run with an earlier best setting
OUTCOME = "raysweep.outcome"  # of a study's run: signature of the outcome that is logged completely
LOGGED_MODEL = "raysweep.logged_model"  # of a study's run: signature of the outcome that is being logged, and its model
# Without this tag, the UI shows its pages for language models first.
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
SOURCE_TAGS = {"mlflow.source.name": "raysweep", "mlflow.source.type": "LOCAL"}
RunStatus = Literal["FINISHED", "FAILED", "KILLED"]
KEY, LEVEL, PARENT = "raysweep.key", "raysweep.level", "mlflow.parentRunId"


@dataclass(frozen=True)
class LoggedTrial:
    """A trial that ended, for MLflow: `history` from `first_epoch` on, and `final`, the metrics that rank it.

    If a scheduler stopped the trial early, its status is KILLED. The parameters are the setting, and what a person
    filters by: encoder, mode, shots, weights. Times are in seconds since 1970; None if they are not known.
    """

    params: Mapping[str, Any]
    history: Sequence[Mapping[str, float]]
    final: Mapping[str, float]
    status: RunStatus
    error: str | None = None
    first_epoch: int = 0
    started: float | None = None
    ended: float | None = None


@dataclass(frozen=True)
class LoggedOutcome:
    """The outcome of a study or baseline, for MLflow.

    Attributes:
        metrics: final metrics.
        confusion_matrix: `labels` and `counts`, and `precision` and `recall` of each class.
        tags: best trial.
        classes: class names, in the order of the logits.
        params: the best setting.
        name: name of the model.
        ended: when the work ended, in seconds since 1970; None if it is not known.
        checkpoint: location of the weights; None if there are none.
        model: location of the exported model; None if there is none.
    """

    metrics: Mapping[str, float]
    confusion_matrix: Mapping[str, Any]
    tags: Mapping[str, str]
    classes: Sequence[str]
    checkpoint: str | None = None
    model: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    name: str = "model"
    ended: float | None = None


@dataclass(frozen=True)
class LoggedRun:
    """The run of a study whose outcome is logged, and MLflow's URI of its model; None if there is none."""

    run_id: str
    model_uri: str | None


def open_tracker(uri: str, experiment: str) -> Tracker:
    """Opens an MLflow store.

    Args:
        uri: MLflow tracking URI.
        experiment: name of the MLflow experiment; created if missing.

    Raises:
        RaysweepError: the store does not exist, or cannot be reached.
    """
    client = open_client(uri)
    try:
        with without_retries():
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
        self._labels: dict[str, Mapping[str, str]] = {}  # of studies' runs: the tags that their trials' runs have too
        self._dataset: tuple[str, str] | None = None  # name and digest
        self._new: set[str] = set()  # runs that no earlier process, and no call that was cut short, has written to

    def forget(self) -> None:
        """Forgets what the store is thought to have, because a call was cut short and will be repeated."""
        self._children.clear()
        self._new.clear()

    def start_run(
        self,
        key: str,
        name: str,
        level: str,
        parent: str | None = None,
        tags: Mapping[str, str] | None = None,
        params: Mapping[str, Any] | None = None,
        started: float | None = None,
    ) -> tuple[str, bool]:
        """Finds or creates the run with `key` under `parent`, and logs the parameters that it lacks.

        A study's run that is finished stays so until `reopen`; other runs are running from now on.

        Args:
            key: tag by which the run is found.
            name: name that the UI shows.
            level: `sweep`, `study` or `trial`.
            parent: id of the parent run; None for a sweep.
            tags: further tags; the runs of a study's trials get those of the study.
            params: parameters.
            started: when the work started, in seconds since 1970; None for now.

        Returns:
            Its id, and whether it was created now.
        """
        known = self._runs_under(parent)
        is_new = key not in known
        if is_new:
            own_tags = {KEY: key, LEVEL: level, **SOURCE_TAGS, **self._labels.get(parent or "", {}), **(tags or {})}
            if parent is not None:
                own_tags[PARENT] = parent
            known[key] = self.client.create_run(self.experiment_id, _to_milliseconds(started), own_tags, name)
            self._new.add(known[key].info.run_id)
        run = known[key]
        run_id = str(run.info.run_id)
        stays = level == "study" and run.info.status == "FINISHED"
        if not is_new and ((run_id not in self._open and not stays) or run.info.run_name != name):
            self.client.update_run(run_id, status=None if stays else "RUNNING", name=name)
        if not stays:
            self._open.add(run_id)
        if level == "study":
            self._labels[run_id] = tags or {}
        if missing := _missing(params or {}, run):
            self.log_once(run_id, missing)
            run.data.params.update({name: str(value) for name, value in missing.items()})
        return run_id, is_new

    def reopen(self, run_id: str) -> None:
        """Marks a finished run as running, because there is work left."""
        if run_id not in self._open:
            self.client.update_run(run_id, status="RUNNING")
            self._open.add(run_id)

    def _runs_under(self, parent: str | None) -> dict[str, Run]:
        """Returns raysweep's runs by key; searched once, then updated by `start_run`."""
        parent_key = parent or ""
        if parent_key not in self._children:
            level = "tags.`raysweep.level` = 'sweep'"
            where = f"tags.`{PARENT}` = '{parent}'" if parent else level
            found, token = [], None
            while True:
                page = self.client.search_runs([self.experiment_id], where, max_results=1000, page_token=token)
                found += [run for run in page if KEY in run.data.tags]
                token = page.token
                if not token:
                    break
            # A run that was to replace another, which is still there: the process was killed, and it is done again.
            ids = {run.info.run_id for run in found}
            kept = [run for run in found if run.data.tags.get(REPLACES) not in ids]
            self._children[parent_key] = {run.data.tags[KEY]: run for run in kept}
        return self._children[parent_key]

    def log_once(
        self,
        run_id: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str] | None = None,
        metrics: Sequence[Metric] = (),
    ) -> None:
        """Logs parameters, tags and metrics, in one call if possible. Logged parameters must have the same value."""
        from mlflow.entities import Param, RunTag

        entries = [Param(name, str(value)[:6000]) for name, value in params.items()]
        run_tags = [RunTag(name, value[:MAX_TAG_LENGTH]) for name, value in (tags or {}).items()]
        first, rest = metrics[:METRICS_PER_BATCH], metrics[METRICS_PER_BATCH:]
        self.client.log_batch(run_id, metrics=first, params=entries, tags=run_tags, synchronous=True)
        self._log_metrics(run_id, rest)

    def log_history(self, run_id: str, history: Sequence[Mapping[str, float]], first_epoch: int = 0) -> None:
        """Logs one dict of metrics per epoch, without what the run has; the step is the number of finished epochs."""
        self._log_metrics(run_id, self._without_logged(run_id, _to_metrics(history, first_epoch)))

    def _log_metrics(self, run_id: str, metrics: Sequence[Metric]) -> None:
        for start in range(0, len(metrics), METRICS_PER_BATCH):
            self.client.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_BATCH], synchronous=True)

    def _without_logged(self, run_id: str, metrics: Sequence[Metric]) -> list[Metric]:
        """Returns the metrics whose name and step the run does not have."""
        if run_id in self._new:
            return list(metrics)
        names = {metric.key for metric in metrics} & self.client.get_run(run_id).data.metrics.keys()
        logged = {(name, point.step) for name in names for point in self.client.get_metric_history(run_id, name)}
        return [metric for metric in metrics if (metric.key, metric.step) not in logged]

    def log_epoch(
        self,
        parent: str,
        key: str,
        name: str,
        params: Mapping[str, Any],
        epoch: int,
        metrics: Mapping[str, float],
        started: float | None = None,
    ) -> None:
        """Logs an epoch of a trial that is still running; the first one starts its run."""
        run_id, _ = self.start_run(key, name, "trial", parent, params=params, started=started)
        self.log_history(run_id, [metrics], epoch)

    def log_trial(self, parent: str, key: str, name: str, trial: LoggedTrial) -> None:
        """Logs a trial that ended, and ends its run; in few calls, because there can be hundreds of trials."""
        run_id, _ = self.start_run(key, name, "trial", parent, started=trial.started)
        best = {f"best/{name}": value for name, value in trial.final.items() if name.startswith("val/")}
        metrics = [*_to_metrics(trial.history, trial.first_epoch), *_to_metrics([best], -1)]
        tags = {"raysweep.error": trial.error} if trial.error else {}
        if trial.status == "KILLED":
            tags["raysweep.pruned"] = "true"
        params = _missing(trial.params, self._runs_under(parent)[key])
        self.log_once(run_id, params, tags, self._without_logged(run_id, metrics))
        self.finish(run_id, trial.status, trial.ended)

    def log_missing_trials(self, parent: str, trials: Sequence[tuple[str, str, LoggedTrial]]) -> None:
        """Logs trials `(key, name, trial)` that are incomplete: the sweep was killed, or the store is new."""
        for key, name, trial in trials:
            run = self._runs_under(parent).get(key)
            if run is None or run.info.status != trial.status:
                self.log_trial(parent, key, name, trial)

    def log_metrics(self, run_id: str, metrics: Mapping[str, float | None], model_id: str | None = None) -> None:
        """Logs final metrics of a run, and of its model, except those that are None and those that both have."""
        from mlflow.entities import Metric

        has = self.client.get_run(run_id).data.metrics
        of_model = (self.client.get_logged_model(model_id).metrics or []) if model_id else []
        linked = {metric.key for metric in of_model}  # a new outcome has a new model
        known = {name: float(value) for name, value in metrics.items() if value is not None}
        changed = [
            (name, value)
            for name, value in known.items()
            if not _has(has, name, value) or (model_id and name not in linked)
        ]
        now, (dataset, digest) = int(time.time() * 1000), self._dataset or (None, None)
        points = [
            Metric(name, value, now, 0, model_id, *((dataset, digest) if model_id else (None, None)))
            for name, value in changed
        ]
        self._log_metrics(run_id, points)

    def log_outcome(self, run_id: str, outcome: LoggedOutcome) -> LoggedRun:
        """Logs metrics, best setting, confusion matrix, best checkpoint and model of a study, and ends its run.

        A run's parameters cannot be changed. If later trials were better, a new run takes the place of this one.
        """
        content = signature(
            [outcome.metrics, outcome.confusion_matrix, outcome.tags, outcome.classes, dict(outcome.params)]
        )
        run = self.client.get_run(run_id)
        if run.data.tags.get(OUTCOME) == content:
            self.finish(run_id, ended=outcome.ended)
            return LoggedRun(run_id, run.data.tags.get(MODEL_URI))
        if any(run.data.params.get(name, str(value)) != str(value) for name, value in outcome.params.items()):
            run = self._replace_study(run, outcome.params)
            run_id = str(run.info.run_id)
        self.log_once(run_id, _missing(outcome.params, run))
        self.log_dict(run_id, outcome.confusion_matrix, "confusion_matrix.json")
        if outcome.confusion_matrix:
            labels, counts = outcome.confusion_matrix["labels"], outcome.confusion_matrix["counts"]
            self.client.log_text(run_id, confusion_matrix_svg(labels, counts), "confusion_matrix.svg")
        model_uri = None
        if outcome.checkpoint is not None:
            self.log_file(run_id, fetch(local_path(outcome.checkpoint)), "checkpoint")
        if outcome.model is not None:
            model = local_path(outcome.model)
            fetch_folder(model)
            # A kill after this must not lead to a second model, to which all metrics would be logged again.
            logged, _, earlier_uri = run.data.tags.get(LOGGED_MODEL, "").partition(" ")
            model_uri = earlier_uri if logged == content else None
            if model_uri is None:
                model_uri = log_model(self.client, run_id, model, outcome.classes, outcome.name)
                self.log_once(run_id, {}, {LOGGED_MODEL: f"{content} {model_uri}"})
        self.log_metrics(run_id, outcome.metrics, model_uri.removeprefix(PREFIX) if model_uri else None)
        # Last, because this tag says that nothing is missing.
        self.log_once(run_id, {}, {**outcome.tags, **({MODEL_URI: model_uri} if model_uri else {}), OUTCOME: content})
        self.finish(run_id, ended=outcome.ended)
        return LoggedRun(run_id, model_uri)

    def _replace_study(self, old: Run, setting: Mapping[str, Any]) -> Run:
        """Makes a study's run anew, without the setting and the outcome, moves its trials there, and deletes it."""
        run_id, parent = str(old.info.run_id), old.data.tags.get(PARENT)
        found = self.client.search_runs([self.experiment_id], f"tags.`{REPLACES}` = '{run_id}'")
        tags = {name: value for name, value in old.data.tags.items() if name not in (OUTCOME, MODEL_URI)}
        tags[REPLACES] = run_id
        new = (
            found[0]
            if found
            else self.client.create_run(self.experiment_id, old.info.start_time, tags, old.info.run_name)
        )
        new_id = str(new.info.run_id)
        kept = {name: value for name, value in old.data.params.items() if name not in setting}
        self.log_once(new_id, _missing(kept, new))
        for trial in self._runs_under(run_id).values():
            self.client.set_tag(trial.info.run_id, PARENT, new_id)
        self.client.delete_run(run_id)
        self._children[new_id] = self._children.pop(run_id)
        self._runs_under(parent)[old.data.tags[KEY]] = new
        self._labels[new_id] = self._labels.pop(run_id, {})
        self._open.discard(run_id)
        self._open.add(new_id)
        return new

    def log_dataset(self, run_id: str, name: str, digest: str, source: str, profile: str) -> None:
        """Logs the data of a run as an MLflow dataset input."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        self._dataset = name[:500], digest
        dataset = Dataset(name=name[:500], digest=digest, source_type="raysweep", source=source, profile=profile)
        self.client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])

    def save_view(self) -> str:
        """Saves the view of studies only with the experiment; returns its link, without the server's address."""
        self.client.set_experiment_tag(self.experiment_id, VIEW_TAG, view_state())
        return view_path(self.experiment_id)

    def describe(self, run_id: str, text: str) -> None:
        """Sets the description of a run, in Markdown."""
        self.log_once(run_id, {}, {"mlflow.note.content": text})

    def log_file(self, run_id: str, path: Path, folder: str | None = None) -> None:
        """Copies a file, or a folder's content, to the run's artifacts."""
        log = self.client.log_artifacts if path.is_dir() else self.client.log_artifact
        log(run_id, str(path), folder)

    def log_dict(self, run_id: str, value: Any, name: str) -> None:
        """Writes a JSON artifact."""
        self.client.log_dict(run_id, value, name)

    def register(self, model_uri: str, name: str) -> str:
        """Registers a logged model, unless a version of that name has it already; returns the version."""
        return register_model(self.client, model_uri, name)

    def finish(self, run_id: str, status: RunStatus = "FINISHED", ended: float | None = None) -> None:
        """Ends a run, unless it has ended: a repeated call must not move its end to the end of the sweep.

        Args:
            run_id: id of the run.
            status: how it ended.
            ended: when the work ended, in seconds since 1970; None for now.
        """
        if run_id in self._open:
            self.client.set_terminated(run_id, status, _to_milliseconds(ended))
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
                self.client.set_terminated(run_id, "FAILED")

    def fail_unfinished_runs(self, parent: str) -> None:
        """Ends runs under `parent` that a killed invocation left running, as FAILED."""
        self._children.pop(parent, None)  # the stored runs have the status from the time of the search
        for run in self._runs_under(parent).values():
            if run.info.status == "RUNNING" and run.info.run_id not in self._open:
                self.client.set_terminated(run.info.run_id, "FAILED")

    def close(self) -> None:
        """Ends open runs as FAILED; called at the end of every sweep, failed or not."""
        from mlflow import MlflowException

        with without_retries(), suppress(MlflowException):  # an error of a lost store must not hide why the sweep ends
            for run_id in list(self._open):
                self.finish(run_id, "FAILED")


def _missing(params: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """Returns the parameters that a run does not have."""
    return {name: value for name, value in params.items() if name not in run.data.params}


def _to_milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds * 1000)


def _has(logged: Mapping[str, float], name: str, value: float) -> bool:
    return name in logged and _same(logged[name], value)


def _to_metrics(history: Sequence[Mapping[str, float]], first_epoch: int) -> list[Metric]:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    return [
        Metric(name, float(value), now, epoch)
        for epoch, values in enumerate(history, start=first_epoch + 1)
        for name, value in values.items()
        if value is not None  # a metric that is missing in one epoch must not hide the others
    ]


def _same(logged: float, value: float) -> bool:
    """Whether a store has this value: NaN is stored as such, infinity as the largest float."""
    if math.isnan(value):
        return math.isnan(logged)
    return logged == value or (math.isinf(value) and abs(logged) > 1e308 and (logged > 0) == (value > 0))
