"""The outcome of a study or a baseline: its row of the leaderboard, its exported model, its figures in MLflow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from raysweep.encoders.head import Classifier
from raysweep.errors import DataError, one_line
from raysweep.experiment.metrics import METRICS
from raysweep.experiment.space import Setting
from raysweep.experiment.studies import RowConfig, StudyConfig
from raysweep.images.cache import Cache
from raysweep.images.rows import Draws
from raysweep.results.leaderboard import Row, class_metrics, describe_setting
from raysweep.results.model import DESCRIPTION, export_model, is_intact
from raysweep.results.tracking import LoggedOutcome, LoggedRun, Tracker
from raysweep.storage.copies import local_path, location
from raysweep.storage.paths import read_json, write_json
from raysweep.sweep.state import SweepState
from raysweep.training.baseline_task import REFITTED
from raysweep.training.bias_correction import search_optimism
from raysweep.training.checkpoint import load_checkpoint, save_checkpoint
from raysweep.training.evaluation import TestMetrics
from raysweep.worker.inputs import build_classifier, load_heads
from raysweep.worker.job import BaselineFit, Job, TestResult, TrialResult


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a finished study or baseline.

    Attributes:
        row: its row of the leaderboard; `mlflow_run_id` and `study_seconds` are filled in at the end.
        validation: metrics of the chosen classifier on the validation split.
        test: its metrics on the test split.
        corrected: value of the experiment's metric on validation without the optimism of the search; None if that is
            not known.
        checkpoint: location of its weights; None if there are none.
        best_trial: number of the chosen trial; None for a baseline.
        num_records: number of trials that ended; None for a baseline.
        model_uri: MLflow's URI of the exported model; None if there is none.
    """

    row: Row
    validation: Mapping[str, float]
    test: TestMetrics
    checkpoint: str | None
    best_trial: int | None = None
    num_records: int | None = None
    model_uri: str | None = None
    corrected: float | None = None

    def ranking_metrics(self, metric: str) -> dict[str, float]:
        """Returns the validation metrics that rank it: the metric without the optimism of the search, if known."""
        return dict(self.validation) | ({} if self.corrected is None else {metric: self.corrected})


def write_outcome(path: Path, outcome: Outcome) -> None:
    """Writes an outcome as JSON."""
    write_json(path, asdict(outcome))


def read_outcome(path: Path) -> Outcome | None:
    """Reads a file from `write_outcome`; returns None if there is no such file.

    Raises:
        DataError: the file is damaged, or of a version that this one does not know.
    """
    if not path.exists():
        return None
    try:
        values = read_json(path)
        test = values["test"]
        if "values" not in test:  # version 0.1 stored the metrics one level higher
            test |= {"values": {name: test[name] for name in METRICS if name in test}, "correct": values["correct"]}
        if "hits" not in test:  # it stored the share of right models by row, which for one model is 0 or 1
            test["hits"] = ["".join(str(int(share)) for share in test["correct"])] if test["num_seeds"] == 1 else []
        shares = _class_shares(test["confusion_matrix"])  # the rows of earlier versions lack them
        values["row"] = {"test_largest_class": shares[-1], "test_smallest_class": shares[0], **values["row"]}
        return _reader().validate_python(values)
    except (KeyError, TypeError, ValidationError) as error:
        reason = one_line(error, 300)
        raise DataError(
            f"{path}: not a result that this version can read ({reason}); delete it to have the study tested again"
        ) from error


def with_places(outcome: Outcome, change: Callable[[str], str]) -> Outcome:
    """Returns an outcome with the locations of its files changed, as `SweepPaths.relative` and `resolve` do."""
    checkpoint, model = outcome.checkpoint, outcome.row.model_path
    return replace(
        outcome,
        checkpoint=change(checkpoint) if checkpoint else None,
        row=replace(outcome.row, model_path=change(model) if model else None),
    )


@cache
def _reader() -> TypeAdapter[Outcome]:
    # Building it takes milliseconds, and a finished sweep reads each outcome more than once.
    return TypeAdapter(Outcome)


def study_outcome(
    state: SweepState,
    config: StudyConfig,
    *,
    key: str,
    draws: Draws | None,
    job: Job,
    cache: Cache,
    results: Sequence[TrialResult],
    best: TrialResult,
    tested: TestResult,
) -> Outcome:
    """Exports the model of a study's chosen trial and makes its row.

    Args:
        state: state that all studies share.
        config: the study.
        key: signature of the study.
        draws: its few-shot draws; None if it trains on all rows.
        job: the job of its trials.
        cache: the features or pixels that they trained on.
        results: results of its trials.
        best: result of the chosen trial.
        tested: test result of the chosen trial.
    """
    assert best.checkpoint is not None, "the best trial of a study has a checkpoint"
    assert tested.metrics is not None
    place, setting = tested.refitted or best.checkpoint, best.setting | (REFITTED if tested.refitted else {})
    best, checkpoint = replace(best, checkpoint=place, setting=setting), local_path(place)
    if config.reads_features:
        classifier = _probe_classifier(state, config, checkpoint)
    else:
        classifier = build_classifier(job)
        classifier.load_state_dict(load_checkpoint(checkpoint)[0])
    if not config.reads_features and best.best_epoch < 0:
        worse = "no epoch was better on validation than the weights that training starts from, so its model has these"
        state.progress.say(f"{config.name}: {worse}")
    _export(state, config, classifier, key, best.setting, tested.metrics, {"trial": best.number})
    if config.reads_features and config.encoder.saved_weights_in_checkpoint:
        _add_encoder_weights(checkpoint, classifier)
    corrected = _corrected_metric(state, draws, results, best)
    row = _study_row(state, config, cache, results, best, tested)
    return Outcome(
        row=replace(row, val_accuracy_corrected=corrected if state.ranking.metric == "val/accuracy" else None),
        validation=_val_metrics(best.final),
        corrected=corrected,
        test=tested.metrics,
        checkpoint=best.checkpoint,
        best_trial=best.number,
        num_records=len(results),
    )


def _corrected_metric(
    state: SweepState, draws: Draws | None, results: Sequence[TrialResult], best: TrialResult
) -> float | None:
    """Returns the experiment's metric of the chosen trial without the optimism of the search; None if unknown."""
    row_losses = {one.number: one.row_losses for one in results if one.error is None and not one.pruned}
    rows = np.arange(len(state.rows["validation"]))[None] if draws is None else draws.validation
    metric = state.ranking.metric
    luck = search_optimism(metric, row_losses, best.number, rows, state.experiment.seed)
    return None if luck is None else best.final[metric] - luck


def _study_row(
    state: SweepState,
    config: StudyConfig,
    cache: Cache,
    results: Sequence[TrialResult],
    best: TrialResult,
    tested: TestResult,
) -> Row:
    """Makes the row of a study, with the costs of its cache and its trials."""
    succeeded = [result for result in results if result.error is None]
    row = _row(state, config, cache, best.setting, best.final, tested)
    row = replace(
        row,
        num_trials=len(succeeded),
        train_seconds=best.train_seconds + cache.seconds,
        # The memory of trials that were stopped early is not measured.
        peak_memory_bytes=max(cache.peak_memory_bytes, *(result.peak_memory_bytes for result in succeeded)),
        peak_gpu_memory_bytes=max(row.peak_gpu_memory_bytes, *(result.peak_gpu_memory_bytes for result in succeeded)),
        model_path=location(state.paths.model(config.name)),
    )
    if config.reads_features:
        return row
    num_epochs = sum(len(result.history) for result in succeeded)
    return replace(row, encoder_passes=num_epochs, images_per_second=best.images_per_second)


def baseline_outcome(
    state: SweepState, config: RowConfig, *, key: str, cache: Cache, fit: BaselineFit, tested: TestResult
) -> Outcome:
    """Makes the row of a baseline, and exports its model if that is a head on the encoder."""
    assert tested.metrics is not None
    if fit.checkpoint is not None:
        classifier = _probe_classifier(state, config, local_path(fit.checkpoint))
        _export(state, config, classifier, key, fit.setting, tested.metrics, {})
    row = replace(
        _row(state, config, cache, fit.setting, fit.validation, tested),
        num_trials=fit.num_settings,
        train_seconds=fit.seconds + cache.seconds,
        peak_memory_bytes=max(cache.peak_memory_bytes, fit.peak_memory_bytes),
        model_path=location(state.paths.model(config.name)) if fit.checkpoint else None,
        folds=fit.folds,
    )
    if fit.folds is not None:
        state.progress.say(f"{config.name}: accuracy over {len(fit.folds.accuracies)} folds {fit.folds.describe()}")
    return Outcome(row=row, validation=_val_metrics(fit.validation), test=tested.metrics, checkpoint=fit.checkpoint)


def _row(
    state: SweepState,
    config: RowConfig,
    cache: Cache,
    setting: Setting,
    validation: Mapping[str, float],
    tested: TestResult,
) -> Row:
    """Makes the columns that all rows share, and prints the result; costs are those of the cache alone."""
    test = tested.metrics
    assert test is not None
    accuracy = test.values["accuracy"]
    interval = f"{accuracy:.3f} [{test.accuracy_low:.3f}, {test.accuracy_high:.3f}]"
    state.progress.say(f"{config.name}: test accuracy {interval} with {describe_setting(setting)}")
    return Row(
        study=config.name,
        encoder=config.encoder_name,
        mode=config.kind,
        shots=config.shots,
        num_seeds=test.num_seeds,
        num_trials=0,
        best_params=setting,
        val_accuracy=validation["val/accuracy"],
        test_accuracy=accuracy,
        test_accuracy_low=test.accuracy_low,
        test_accuracy_high=test.accuracy_high,
        test_macro_f1=test.values["macro_f1"],
        num_test=test.num_rows,
        encoder_passes=int(cache.made_now),
        train_seconds=cache.seconds,
        study_seconds=0.0,
        peak_memory_bytes=cache.peak_memory_bytes,
        peak_gpu_memory_bytes=max(cache.peak_gpu_memory_bytes, tested.peak_gpu_memory_bytes),
        images_per_second=cache.num_rows / cache.seconds,
        mlflow_run_id=None,
        model_path=None,
        test_largest_class=_class_shares(test.confusion_matrix)[-1],
        test_smallest_class=_class_shares(test.confusion_matrix)[0],
        test_metrics=test.values,
        test_per_class=dict(zip(state.index.classes, class_metrics(test.confusion_matrix), strict=True)),
    )


def _class_shares(confusion_matrix: Sequence[Sequence[int]]) -> list[float]:
    """Returns the share of each class in the test split, the smallest first."""
    counts = sorted(sum(row) for row in confusion_matrix)
    return [count / sum(counts) for count in counts]


def _val_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name.startswith("val/")}


def _probe_classifier(state: SweepState, config: RowConfig, checkpoint: Path) -> Classifier:
    """Returns the frozen encoder with the head from a checkpoint: that of the first few-shot draw."""
    (head, *_), source = load_heads(checkpoint)
    return Classifier(state.encoder(config).model, head, source)


def _export(
    state: SweepState,
    config: RowConfig,
    classifier: Classifier,
    key: str,
    setting: Setting,
    test: TestMetrics,
    more: Mapping[str, Any],
) -> None:
    """Writes the study's model folder. Test accuracy and temperature in it are those of the exported draw."""
    about = {"study": config.name, "key": key, **more, "setting": setting, "test_accuracy": test.accuracies[0]}
    export_model(
        state.paths.model(config.name),
        classifier,
        state.index.classes,
        about,
        state.index.decode_options,
        test.temperatures[0],
    )


def _add_encoder_weights(checkpoint: Path, classifier: Classifier) -> None:
    """Adds the frozen encoder's weights to a probe's checkpoint (`saved_weights_in_checkpoint`)."""
    tensors, metadata = load_checkpoint(checkpoint)
    weights = {f"encoder.{name}": tensor for name, tensor in classifier.encoder.state_dict().items()}
    save_checkpoint(checkpoint, tensors | weights, metadata)


def is_exported(state: SweepState, config: RowConfig, key: str, trial: int | None = None) -> bool:
    """Whether the exported model is from this study and trial: another study may have had the same name."""
    model = state.paths.model(config.name)
    if not is_intact(model):  # missing, damaged, or not ours: it is exported again
        return False
    about = read_json(model / DESCRIPTION)["about"]
    return about.get("key") == key and (trial is None or about.get("trial") == trial)


def log_outcome(state: SweepState, run_id: str, outcome: Outcome, ended: float | None = None) -> Future[LoggedRun]:
    """Logs metrics, best setting, confusion matrix, best checkpoint and model to a study's run.

    Args:
        state: state that all studies share.
        run_id: id of the run.
        outcome: the outcome.
        ended: when the work ended, in seconds since 1970; None for an outcome of an earlier invocation.

    Returns:
        The future run and model.
    """
    row, test = outcome.row, outcome.test
    tested = {f"test/{name}": value for name, value in test.values.items()}
    interval = {"test/accuracy_low": test.accuracy_low, "test/accuracy_high": test.accuracy_high}
    corrected = {} if outcome.corrected is None else {f"{state.ranking.metric}_corrected": outcome.corrected}
    folds = {} if row.folds is None else {f"folds/{name}": value for name, value in row.folds.figures().items()}
    temperature = {"val/temperature": test.temperatures[0]} if test.temperatures else {}
    cost = {
        "time/train_s": row.train_seconds,
        "memory/peak_bytes": row.peak_memory_bytes,
        # On CPUs it would be the first chart, and empty.
        **({"gpu/peak_memory_bytes": row.peak_gpu_memory_bytes} if row.peak_gpu_memory_bytes else {}),
        "train/images_per_second": row.images_per_second,
    }
    classes = list(state.index.classes)
    # Rows of earlier versions lack them.
    per_class = list(row.test_per_class.values()) or class_metrics(test.confusion_matrix)
    tags = {} if outcome.best_trial is None else {"raysweep.best_trial": str(outcome.best_trial)}
    logged = LoggedOutcome(
        metrics={**outcome.validation, **corrected, **tested, **interval, **temperature, **folds, **cost},
        confusion_matrix={
            "labels": classes,
            "counts": test.confusion_matrix,
            "precision": [one.precision for one in per_class],
            "recall": [one.recall for one in per_class],
        },
        tags=tags,
        classes=classes,
        checkpoint=outcome.checkpoint,
        model=row.model_path,
        params=row.best_params,
        name=row.study,
        ended=ended,
    )
    return state.recorder.send(Tracker.log_outcome, run_id, logged)
