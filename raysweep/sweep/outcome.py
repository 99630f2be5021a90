"""The end of a study: what its choice got on test, the exported model, the row, and what MLflow is told."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from raysweep.sweep.state import SweepContext
from raysweep.encoders.head import Classifier
from raysweep.experiment.config import StudyConfig
from raysweep.images.cache import Cache
from raysweep.worker.inputs import build_classifier, load_heads
from raysweep.paths import read_json
from raysweep.results.leaderboard import describe_setting
from raysweep.results.model import export_model
from raysweep.sweep.optuna_study import TrialRecord
from raysweep.storage import fetch, fetch_folder, local_path, location
from raysweep.training.checkpoint import load_checkpoint, save_checkpoint


def finalize_search(
    sweep: SweepContext,
    config: StudyConfig,
    records: Sequence[TrialRecord],
    best: TrialRecord,
    *,
    job: dict[str, Any],
    cache: Cache,
    key: str,
    tested: dict[str, Any],
) -> dict[str, Any]:
    """Exports the model of a study's chosen trial and makes its row.

    Args:
        sweep: what the studies share.
        config: the study.
        records: its trials.
        best: the chosen one.
        job: what its trials shared.
        cache: what they trained on.
        key: the study's signature.
        tested: of the chosen trial, from `worker.run_test`.

    Returns:
        `row` of the leaderboard, its `mlflow_run_id` and `study_seconds` still open; `test` metrics; `correct`, per
        test row; `val_metric`, what the trial was chosen by; `validation`, its metrics; `num_records`, the trials there
        were; `best_trial`; `checkpoint`.
    """
    assert best.checkpoint is not None
    checkpoint = local_path(best.checkpoint)
    if config.mode == "linear_probe":
        classifier = probe_classifier(sweep, config, checkpoint)
    else:
        classifier = build_classifier(job)
        classifier.load_state_dict(load_checkpoint(checkpoint)[0])
    about = {"study": config.name, "key": key, "trial": best.number, "setting": best.setting}
    export(sweep, config, classifier, about | {"test_accuracy": tested["test"]["accuracies"][0]})
    if config.mode == "linear_probe" and config.encoder.saved_weights_in_checkpoint:
        add_encoder_weights(checkpoint, classifier)
    succeeded = [record for record in records if record.error is None]
    is_probe = config.mode == "linear_probe"
    # Of trials that were stopped early nobody has measured the memory.
    peak = max(int(record.details.get("peak_memory_bytes", 0)) for record in succeeded)
    gpu_peak = max(int(record.details.get("peak_gpu_memory_bytes", 0)) for record in succeeded)
    row = make_row(sweep, config, tested, setting=best.setting, validation=best.final) | {
        "num_trials": len(succeeded),
        "encoder_passes": int(cache.made_now) if is_probe else sum(len(record.history) for record in succeeded),
        "train_seconds": best.details["train_seconds"] + cache.seconds,
        "peak_memory_bytes": max(cache.peak_memory_bytes, peak),
        "peak_gpu_memory_bytes": max(cache.peak_gpu_memory_bytes, gpu_peak, tested["peak_gpu_memory_bytes"]),
        "images_per_second": cache.num_rows / cache.seconds if is_probe else best.details["images_per_second"],
        "model_path": location(sweep.paths.model(config.name)),
    }
    return make_outcome(sweep, row, tested, best.final) | {
        "num_records": len(records),
        "best_trial": best.number,
        "checkpoint": best.checkpoint,
    }


def finalize_baseline(
    sweep: SweepContext, config: StudyConfig, cache: Cache, tested: dict[str, Any], key: str
) -> dict[str, Any]:
    """Makes the row of a baseline, and exports its model where it is a head on the encoder; as `finalize_search`."""
    checkpoint, setting = tested["checkpoint"], tested["setting"]
    if checkpoint is not None:
        about = {"study": config.name, "key": key, "setting": setting}
        about["test_accuracy"] = tested["test"]["accuracies"][0]  # of the draw that is exported
        export(sweep, config, probe_classifier(sweep, config, local_path(checkpoint)), about)
    row = make_row(sweep, config, tested, setting=setting, validation=tested["validation"]) | {
        "num_trials": tested["num_settings"],
        "encoder_passes": int(cache.made_now),
        "train_seconds": tested["seconds"] + cache.seconds,
        "peak_memory_bytes": max(cache.peak_memory_bytes, tested["peak_memory_bytes"]),
        "peak_gpu_memory_bytes": max(cache.peak_gpu_memory_bytes, tested["peak_gpu_memory_bytes"]),
        "images_per_second": cache.num_rows / cache.seconds,
        "model_path": location(sweep.paths.model(config.name)) if checkpoint else None,
    }
    return make_outcome(sweep, row, tested, tested["validation"]) | {"best_trial": None, "checkpoint": checkpoint}


def make_row(
    sweep: SweepContext,
    config: StudyConfig,
    tested: dict[str, Any],
    *,
    setting: dict[str, Any],
    validation: dict[str, float],
) -> dict[str, Any]:
    """Returns what all rows of the leaderboard have in common, and says the result.

    `train_seconds` is what the chosen model cost from images to weights: the pass that made its cache, and its
    training. `encoder_passes` counts the passes over the images: of features the one that was made now, or none.
    """
    test = tested["test"]
    interval = f"{test['accuracy']:.3f} [{test['accuracy_low']:.3f}, {test['accuracy_high']:.3f}]"
    sweep.progress.say(f"{config.name}: test accuracy {interval} with {describe_setting(setting)}")
    return {
        "study": config.name,
        "encoder": config.encoder_name,
        "mode": config.mode,
        "shots": config.shots,
        "num_seeds": test["num_seeds"],
        "best_params": setting,
        "val_accuracy": validation["val/accuracy"],
        "test_accuracy": test["accuracy"],
        "test_accuracy_low": test["accuracy_low"],
        "test_accuracy_high": test["accuracy_high"],
        "test_macro_f1": test["macro_f1"],
        "num_test": test["num_rows"],
        "study_seconds": 0.0,
        "mlflow_run_id": None,
    }


def make_outcome(
    sweep: SweepContext, row: dict[str, Any], tested: dict[str, Any], validation: dict[str, float]
) -> dict[str, Any]:
    """Returns what every study leaves behind, ready for JSON."""
    test = dict(tested["test"])
    return {
        "row": row,
        "val_metric": validation[sweep.experiment.metric],
        "validation": {name: value for name, value in validation.items() if name.startswith("val/")},
        "correct": test.pop("correct"),
        "test": test,
        "model_uri": None,
    }


def probe_classifier(sweep: SweepContext, config: StudyConfig, checkpoint: Path) -> Classifier:
    """The frozen encoder with a checkpoint's head, that of the first few-shot draw."""
    (head, *_), source = load_heads(checkpoint)
    return Classifier(sweep.encoder(config).model, head, source)


def export(sweep: SweepContext, config: StudyConfig, classifier: Classifier, about: dict[str, Any]) -> None:
    """Writes the study's model folder."""
    export_model(sweep.paths.model(config.name), classifier, sweep.index.classes, about)


def add_encoder_weights(checkpoint: Path, classifier: Classifier) -> None:
    """Puts the frozen encoder's weights beside the head in a probe's checkpoint (`saved_weights_in_checkpoint`)."""
    tensors, metadata = load_checkpoint(checkpoint)
    weights = {f"encoder.{name}": tensor for name, tensor in classifier.encoder.state_dict().items()}
    save_checkpoint(checkpoint, tensors | weights, metadata)


def has_model(sweep: SweepContext, config: StudyConfig, key: str, best: TrialRecord) -> bool:
    """Whether the exported model is that of this trial; a study of the same name may have been changed and back."""
    about = model_about(sweep, config)
    return (about.get("key"), about.get("trial")) == (key, best.number)


def model_about(sweep: SweepContext, config: StudyConfig) -> dict[str, Any]:
    """Where the exported model of a study comes from; empty where there is none."""
    description = sweep.paths.model(config.name) / "model.json"
    return dict(read_json(description)["about"]) if description.exists() else {}


def log_outcome(
    sweep: SweepContext,
    run_id: str,
    outcome: dict[str, Any],
    setting: dict[str, Any],
    checkpoint: str | None,
    best_trial: int | None,
) -> Future[str] | None:
    """Logs a study's figures, confusion matrix, best checkpoint and model to its run; returns the model's URI to be."""
    send, row, test = sweep.recorder.send, outcome["row"], outcome["test"]
    tested = {f"test/{name}": test[name] for name in ("accuracy", "accuracy_low", "accuracy_high", "macro_f1", "loss")}
    cost = {
        "time/train_s": row["train_seconds"],
        "memory/peak_bytes": row["peak_memory_bytes"],
        "gpu/peak_memory_bytes": row["peak_gpu_memory_bytes"],
        "train/images_per_second": row["images_per_second"],
    }
    send("log_metrics", run_id, outcome["validation"] | tested | cost)
    matrix = {"labels": list(sweep.index.classes), "counts": test["confusion_matrix"]}
    send("log_dict", run_id, matrix, "confusion_matrix.json")
    tags = {f"raysweep.best.{name}": str(value) for name, value in setting.items()}
    send("log_once", run_id, {}, tags | ({} if best_trial is None else {"raysweep.best_trial": str(best_trial)}))
    if checkpoint is None:
        return None
    send("log_file", run_id, fetch(local_path(checkpoint)), "checkpoint")
    model = local_path(row["model_path"])
    fetch_folder(model)
    return send("log_model", run_id, model, list(sweep.index.classes))
